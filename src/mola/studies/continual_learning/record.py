"""`continual.json`, the record of a sequence: what was begun, and whether a command can resume the sequence.

continual.json           stages with settings and fingerprints, accuracies, OP, PD, versions, machine, status
00-start/evaluation/     the tests before the first stage, with `evaluate_base`
skills/                  the skills folder, with `growth` skills
01-NAME/                 run folder of a stage; its tests are in `evaluation/`
"""

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.digests import WEIGHTS_FILE, file_sha256
from mola.options.fields import find_difference
from mola.studies.continual_learning.record_file import RECORD_FILE, SKILLS_FOLDER
from mola.studies.continual_learning.stages import Stage
from mola.training.checkpoints import RUN_FILE, checkpoints_in, has_finished

START_FOLDER = "00-start"
EVALUATION_FOLDER = "evaluation"
START_KEY = "start_adapter_sha256"
BASE_KEY = "base_model_weights"  # records of earlier versions may lack it


def stage_entries(stages: Sequence[Stage], record: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What the record says about each stage; the checksums of finished adapters are kept."""
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


def check_same_sequence(
    record: Mapping[str, Any], stages: Sequence[Stage], folder: Path, weights: Mapping[str, str | None]
) -> None:
    """Raise if a begun stage has changed, or was trained on weights that are missing or have changed.

    Stages that were not begun may be changed, added and removed. `weights` are the checksums of the starting adapter
    (`START_KEY`) and of the base model (`BASE_KEY`). The latter is "" if the weights are missing, and is not compared
    in that case.
    """
    known = {entry["folder"] for entry in record["stages"]}
    for index, entry in enumerate(record["stages"]):
        if not _is_begun(folder / entry["folder"]):
            continue
        if index >= len(stages) or stages[index].folder.name != entry["folder"]:
            raise MolaError(
                f"`stages` must begin with those already begun: {entry['folder']!r} in {str(folder)!r} is not "
                f"stage {index + 1} now. Keep its name and position, delete its folder, or pass a different "
                "`output_dir`."
            )
        _check_same_stage(entry, stages[index])
    for stage in stages:
        if stage.folder.name not in known and _is_begun(stage.folder):
            raise MolaError(f"`output_dir`: {str(stage.folder)!r} does not belong to this sequence. Move it away.")
    for earlier, later in itertools.pairwise(stages):
        if _is_begun(later.folder) and not has_finished(earlier.folder):
            raise MolaError(
                f"`stages`: {later.folder.name!r} was trained after {earlier.folder.name!r}, which is not finished in "
                f"{str(folder)!r}. Delete {later.folder.name!r} as well."
            )
    first = stages[0]
    for key, option in ((START_KEY, "adapter"), (BASE_KEY, "base_model")):
        is_changed = key in record and record[key] != weights[key] and weights[key] != ""
        if is_changed and _is_begun(first.folder):
            raise MolaError(
                f"stage `{first.name}` was begun with different weights than those now in `{option}` "
                f"({getattr(first.options, option)!r}). Restore those weights, delete {str(first.folder)!r} and the "
                "later stages, or pass a different `output_dir`."
            )


def _is_begun(folder: Path) -> bool:
    """Whether a training was begun in this folder; files of other kinds do not matter."""
    return any((folder / name).exists() for name in (RUN_FILE, WEIGHTS_FILE)) or bool(checkpoints_in(folder))


def _check_same_stage(entry: Mapping[str, Any], stage: Stage) -> None:
    for part, new in (("settings", stage.settings), ("data_fingerprints", stage.fingerprints)):
        old, new = entry[part], json.loads(json.dumps(new))  # JSON has lists for tuples
        if (key := find_difference(old, new)) is not None:
            raise MolaError(
                f"stage `{stage.name}` was begun with a different `{key}` ({part.replace('_', ' ')}): "
                f"{old.get(key)!r} in {str(stage.folder)!r}, now {new.get(key)!r}. Use the same options and data, "
                "delete that folder and the later ones to train them again, or pass a different `output_dir`."
            )
    checksum = entry.get("adapter_sha256")
    if checksum is not None and has_finished(stage.folder) and file_sha256(stage.folder / WEIGHTS_FILE) != checksum:
        raise MolaError(
            f"stage `{stage.name}`: the adapter in {str(stage.folder)!r} is not the adapter that was trained in it. "
            "Restore that adapter, or delete the folder and the later ones."
        )


def clear_sequence(folder: Path, record: Mapping[str, Any]) -> None:
    """Delete the record of an earlier sequence and the folders that it names."""
    skills = [SKILLS_FOLDER] if record.get("settings", {}).get("growth") == "skills" else []
    for name in (START_FOLDER, *skills, *(entry["folder"] for entry in record["stages"])):
        shutil.rmtree(folder / Path(name).name, ignore_errors=True)
    (folder / RECORD_FILE).unlink()
