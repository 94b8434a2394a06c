"""`continual.json`, the record of a sequence of stages: what was begun, and whether it can be gone on with.

continual.json      stages with their settings and fingerprints, R, OP, PD, versions, machine, status
00-start/evaluation the tests before the first stage, with `evaluate_base`
01-NAME/            run folder of a stage; its tests are in `evaluation`
"""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.atomic import WRITE_TEST, check_writable
from mola.files.digests import WEIGHTS_FILE, file_sha256
from mola.files.reading import read_json
from mola.files.schema import ANYTHING, TEXT, check_form
from mola.models.prompts import TOKENIZER_FILES
from mola.options.fields import first_difference
from mola.studies.continual_learning.stages import Stage
from mola.training.checkpoints import RUN_FILE, checkpoints_in, has_finished
from mola.training.run_folder import clear_run

RECORD_FILE = "continual.json"
START_FOLDER = "00-start"
EVALUATION_FOLDER = "evaluation"
START_KEY = "start_adapter_sha256"  # in the record
BASE_KEY = "base_model_weights"  # in the record; those of earlier versions lack it
_FORM = {"stages": [{"folder": TEXT, "settings": {str: ANYTHING}, "data_fingerprints": {str: ANYTHING}}]}
_PARTIAL = ".partial.jsonl"
_LEFTOVERS = (f".{RECORD_FILE}.", WRITE_TEST)  # of a call that was killed while it wrote


def read_record(folder: Path, overwrite: bool) -> dict[str, Any] | None:
    """The record of an earlier call in this folder; None for a new folder.

    Raises:
        MolaError: the folder cannot be written, holds something else, or the record is unreadable.
    """
    if os.path.exists(folder) and not folder.is_dir():
        raise MolaError(f"`output_dir` must be a folder: {str(folder)!r} is a file. Pass another name.")
    path = check_writable(folder / RECORD_FILE)
    if not path.exists():
        if not overwrite and any(not entry.name.startswith(_LEFTOVERS) for entry in folder.iterdir()):
            raise MolaError(
                f"`output_dir` must be empty or hold a sequence to go on with: {str(folder)!r} is neither, it has no "
                f"{RECORD_FILE}. Pass another folder."
            )
        return None
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise MolaError(f"{str(path)!r} cannot be read ({error}). Pass another `output_dir`.") from error
    check_form(record, _FORM, str(path), "Restore it, or pass another `output_dir`.")
    return record


def is_begun(folder: Path) -> bool:
    """Whether a stage was begun there; what else lies in a folder is the user's, and in nobody's way."""
    return any((folder / name).exists() for name in (RUN_FILE, WEIGHTS_FILE)) or bool(checkpoints_in(folder))


def stage_entries(stages: Sequence[Stage], record: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What the record says of each stage; the weights' checksums of finished ones are kept."""
    before = {entry["folder"]: entry.get("adapter_sha256") for entry in (record or {}).get("stages", ())}
    return [
        {
            "name": stage.name,
            "folder": stage.folder.name,
            "settings": stage.settings,
            "data_fingerprints": stage.fingerprints,
            "adapter_sha256": before.get(stage.folder.name) if has_finished(stage.folder) else None,
        }
        for stage in stages
    ]


def check_same_sequence(record: Mapping[str, Any], stages: Sequence[Stage], folder: Path) -> None:
    """Refuse to go on if a stage that was begun is another one now, or stands on weights that are gone.

    Stages that were not begun may be changed, added and left out.

    Raises:
        MolaError: the message names the stage and what differs.
    """
    for index, entry in enumerate(record["stages"]):
        if not is_begun(folder / entry["folder"]):
            continue
        if index >= len(stages) or stages[index].folder.name != entry["folder"]:
            raise MolaError(
                f"`stages` must go on with those begun: {entry['folder']!r} in {str(folder)!r} is not stage "
                f"{index + 1} now. Keep its name and place, delete its folder, or pass another `output_dir`."
            )
        _check_same_stage(entry, stages[index])
    known = {entry["folder"] for entry in record["stages"]}
    for stage in stages:
        if stage.folder.name not in known and is_begun(stage.folder):
            raise MolaError(f"`output_dir`: {str(stage.folder)!r} is not of this sequence. Move it away.")
    for earlier, later in itertools.pairwise(stages):
        if is_begun(later.folder) and not has_finished(earlier.folder):
            raise MolaError(
                f"`stages`: {later.folder.name!r} was trained on {earlier.folder.name!r}, which is not finished in "
                f"{str(folder)!r}. Delete {later.folder.name!r} as well."
            )


def check_same_start(record: Mapping[str, Any], first: Stage, start: str | None) -> None:
    """Refuse to go on if the first stage was begun from other weights than those at its `adapter` now."""
    if START_KEY in record and record[START_KEY] != start and is_begun(first.folder):
        raise MolaError(
            f"stage `{first.name}` was begun from other weights than those in `adapter`, {first.options.adapter!r}, "
            f"now. Put them back, delete {str(first.folder)!r} and the later ones, or pass another `output_dir`."
        )


def check_same_base(record: Mapping[str, Any], first: Stage, weights: str) -> None:
    """Refuse to go on if the first stage was begun with other weights of the base model than there are now.

    Where there are none now (""), a finished sequence can still be read.
    """
    if weights and record.get(BASE_KEY, weights) != weights and is_begun(first.folder):
        raise MolaError(
            f"stage `{first.name}` was begun with other weights than those in `base_model`, "
            f"{first.options.base_model!r}, now. Put them back, delete {str(first.folder)!r} and the later ones, or "
            "pass another `output_dir`."
        )


def clear_tests(folder: Path) -> None:
    """Remove the results of tests, finished or not, in the folder of a stage or of the start; nothing else."""
    for pattern in (f"*.json{_PARTIAL}", "[0-9][0-9]*-*.json", ".[0-9][0-9]*-*.tmp", ".[0-9][0-9]*-*.lock"):
        for path in (folder / EVALUATION_FOLDER).glob(pattern):
            path.unlink()


def _check_same_stage(entry: Mapping[str, Any], stage: Stage) -> None:
    parts = (("settings", stage.settings), ("data_fingerprints", stage.fingerprints))
    for part, new in parts:
        # Through JSON once, so that tuples and lists compare equal.
        old, new = entry[part], json.loads(json.dumps(new))
        key = first_difference(old, new)
        if key is not None:
            raise MolaError(
                f"stage `{stage.name}` was begun with another `{key}` ({part.replace('_', ' ')}): {old.get(key)!r} in "
                f"{str(stage.folder)!r}, now {new.get(key)!r}. Use the same options and data, delete that folder and "
                "the later ones to train from there again, or pass another `output_dir`."
            )
    checksum = entry.get("adapter_sha256")
    weights = stage.folder / WEIGHTS_FILE
    if checksum is not None and has_finished(stage.folder) and file_sha256(weights) != checksum:
        raise MolaError(
            f"stage `{stage.name}`: the adapter in {str(stage.folder)!r} is not the one that was trained there. Put it "
            "back, or delete that folder and the later ones."
        )


def clear_sequence(folder: Path, record: Mapping[str, Any] | None) -> None:
    """Remove an earlier sequence's own files; nothing else."""
    for name in (START_FOLDER, *(entry["folder"] for entry in (record or {}).get("stages", ()))):
        place = folder / name
        if not place.is_dir():
            continue
        clear_tests(place)
        clear_run(place)
        for name in TOKENIZER_FILES:
            (place / name).unlink(missing_ok=True)
        for path in (place / EVALUATION_FOLDER, place):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    (folder / RECORD_FILE).unlink(missing_ok=True)
