"""Rows in the form of OpenOrca, of their usual length, for several tests."""

import json
import random

GROUPS = {"flan": 0.6, "t0": 0.3, "niv": 0.06, "cot": 0.04}
_WORDS = [f"{a}{b}{c}" for a in ("ba", "do", "ki", "re") for b in ("lo", "mi", "na") for c in ("n", "ster", "ve")]


def orca_rows(count, seed=0):
    """So many rows, one after the other; all texts differ."""
    rng = random.Random(seed)
    for index in range(count):
        group = rng.choices(list(GROUPS), GROUPS.values())[0]
        yield {
            "id": f"{group}.{index}",
            "system_prompt": "You are a helpful assistant.",
            "question": f"  Question {index}: {' '.join(rng.choices(_WORDS, k=25))}?\n",
            "response": f" {' '.join(rng.choices(_WORDS, k=60))}. ",
        }


def write_orca(path, count, seed=0):
    """A JSON lines file of such rows."""
    with path.open("w", encoding="utf-8") as file:
        for row in orca_rows(count, seed):
            file.write(json.dumps(row) + "\n")
    return path


def files_of(folder):
    """Bytes of every file in a folder, by its name there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
