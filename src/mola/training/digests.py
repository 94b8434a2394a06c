"""Whether a checkpoint's files are those that were saved: their sha256 in a file beside them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mola.files.atomic import atomic_write_json
from mola.files.digests import file_sha256
from mola.files.reading import read_json_object

DIGESTS_FILE = "sha256.json"
_NOT_READ = (DIGESTS_FILE, "README.md")


class CheckpointDigests(TrainerCallback):
    """Writes the digests when all else of a checkpoint is there: killed before, it has none and is taken as it is."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Once, by the main process."""
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in _NOT_READ)
            digests = {path.name: file_sha256(path) for path in files}
            atomic_write_json(folder / DIGESTS_FILE, {**digests, DIGESTS_FILE: _sum(digests)})


def _sum(digests: Mapping[str, str]) -> str:
    """Of the list itself: a changed name would otherwise be that of a file that was removed, which may be."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def changed_file(checkpoint: Path, only: str | None = None) -> str | None:
    """The first file that is not as it was saved; None if there is none, or nothing is known. Missing files pass.

    `only`: the name of the one file that is asked about.
    """
    if not os.path.lexists(checkpoint / DIGESTS_FILE):
        return None
    digests = read_json_object(checkpoint / DIGESTS_FILE)
    if digests.pop(DIGESTS_FILE, None) != _sum(digests):
        return DIGESTS_FILE
    for name, digest in digests.items():
        if only not in (None, name):
            continue
        try:
            if file_sha256(checkpoint / Path(name).name) != digest:
                return name
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return name
    return None
