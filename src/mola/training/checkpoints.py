"""The checkpoints of a run folder: which there are, which are complete, which one a run can go on from."""

from __future__ import annotations

import logging
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mola.errors import MolaError
from mola.files.digests import CONFIG_FILE, WEIGHTS_FILE, check_digest, damaged_record
from mola.files.reading import read_json_object
from mola.files.schema import TEXT, check_form
from mola.training.digests import DIGESTS_FILE, changed_file

RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
CLEARING = "clearing"  # status in run.json while an earlier run is being removed
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
logger = logging.getLogger(__name__)


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint folders, complete or not, newest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and step_in_name(path) >= 0]
    return sorted(found, key=step_in_name, reverse=True)


def has_finished(folder: Path) -> bool:
    """Whether a run folder holds a run that has ended, and its adapter."""
    return read_json_object(folder / RUN_FILE).get("status") == "finished" and (folder / WEIGHTS_FILE).is_file()


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints of a run beyond `limit`, but not the newest nor the best one.

    The trainer's own would remove whatever is called `checkpoint-...`.
    """
    found = checkpoints_in(folder)
    if not limit or limit < 0 or not found:
        return
    kept = {found[0].resolve(), *([Path(best).resolve()] if best else [])} & {path.resolve() for path in found}
    others = [path for path in found if path.resolve() not in kept]
    for path in others[max(limit - len(kept), 0) :]:
        shutil.rmtree(path, ignore_errors=True)


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint that a run in `folder` could go on from, or None."""
    return next((path for path in checkpoints_in(folder) if not _problem(path)), None)


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from.

    Args:
        folder: the run folder.
        resume: None or empty: start anew; "last" or "true": the newest complete checkpoint of
            `folder`; else the path of a checkpoint.

    Raises:
        MolaError: there is no such checkpoint, or it is incomplete.
    """
    if resume is None or not asks_to_resume(resume):
        return None
    if not asks_for_last(resume):
        path = Path(resume)
        problem = _problem(path)
        if problem:
            raise MolaError(
                f"`resume_from_checkpoint` must be a checkpoint folder of a run: {resume!r} {problem}. "
                "Pass DIR/checkpoint-N, or 'last' for the newest one in --output_dir."
            )
        return path
    for path in checkpoints_in(folder):
        problem = _problem(path)
        if not problem:
            return path
        logger.warning("Skipping %s, which %s.", path, problem)
    raise MolaError(
        f"`resume_from_checkpoint` is 'last', but {str(folder)!r} holds no complete checkpoint. "
        "To start from the beginning leave the option out and, if the folder is not empty, pass --overwrite_output_dir."
    )


def asks_to_resume(resume: str | None) -> bool:
    """Whether the option asks to go on with a run."""
    return resume is not None and resume.strip().lower() not in ("", "false", "no", "none")


def asks_for_last(resume: str | None) -> bool:
    """Whether it means the newest checkpoint of the run folder."""
    return resume is not None and resume.strip().lower() in ("last", "true")


def is_in(checkpoint: Path, folder: Path) -> bool:
    """Whether a checkpoint is one of the run in `folder`."""
    return checkpoint.resolve().parent == folder.resolve()


def step_in_name(path: Path) -> int:
    """N of `checkpoint-N`; -1 for another name, such as that of a copy somebody keeps."""
    found = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", path.name)
    return int(found[1]) if found else -1


def _problem(path: Path) -> str:
    """Why a checkpoint cannot be used; empty if it can.

    The trainer writes its state file last, but deletes an old checkpoint in any order: every file is looked for.
    """
    if not os.path.isdir(path):
        return "does not exist"
    if read_json_object(path.parent / RUN_FILE).get("status") == CLEARING:
        return "belongs to a run that was being replaced when the command was killed"
    for name in (*ADAPTER_FILES, STATE_FILE):
        if not (path / name).is_file():
            return f"has no {name}"
    # optimizer.pt, or the names of FSDP and DeepSpeed.
    if not _has(path, "optimizer*") and not _has(path, "global_step*/*optim_states.pt"):
        return "has no optimiser state (`save_only_model` leaves it out)"
    if not _has(path, "scheduler.pt") and not _has(path, "global_step*"):
        return "has no scheduler.pt"
    if not _has(path, "scaler.pt") and _has(path.parent, f"{PREFIX_CHECKPOINT_DIR}-*/scaler.pt"):
        return "has no scaler.pt, as others of its run have"
    if not _has(path, "rng_state*.pth"):
        return "has no random state"
    return _broken_file(path)


def _has(folder: Path, pattern: str) -> bool:
    return next(folder.glob(pattern), None) is not None


def _broken_file(path: Path) -> str:
    """What is cut off, or not as it was written."""
    if not isinstance(read_json_object(path / STATE_FILE).get("global_step"), int):
        return f"has a broken {STATE_FILE}"
    # torch.save writes zip files, whose directory is at their end.
    files = sorted([*path.glob("*.pt*"), *path.glob("*.bin"), *path.glob("global_step*/*.pt")])
    broken = [file.name for file in files if file.is_file() and not _is_whole(file)]
    if broken:
        return f"has a broken {broken[0]}"
    if broken_weights := _broken_weights(path):
        return broken_weights
    changed = changed_file(path)
    return f"has a {changed} that is not as it was saved (if that was meant, remove {DIGESTS_FILE})" if changed else ""


def _broken_weights(path: Path) -> str:
    try:
        with safe_open(path / WEIGHTS_FILE, "pt"):
            pass
        check_digest(path)
    except (OSError, SafetensorError, MolaError):
        return f"has a broken {WEIGHTS_FILE}"
    return ""


def _changed_weights(path: Path) -> str:
    names = [WEIGHTS_FILE, *(file.name for file in sorted(path.glob("pytorch_model_fsdp*")))]  # which FSDP loads
    changed = [name for name in names if changed_file(path, name) == name]
    return f"has a broken {changed[0]}" if changed else ""


def _is_whole(archive: Path) -> bool:
    try:
        return damaged_record(archive) is None and zipfile.is_zipfile(archive)
    except (OSError, ValueError):
        return False


def checkpoint_step(checkpoint: Path) -> int:
    """Optimiser steps done when a checkpoint was written."""
    return read_json_object(checkpoint / STATE_FILE)["global_step"]


def check_best_checkpoint(checkpoint: Path) -> None:
    """Refuse to go on if the best checkpoint so far is gone or damaged: the run may have to end with its weights.

    Raises:
        MolaError: its folder or its weights are missing, or are not those that were saved.
    """
    best = best_checkpoint(read_json_object(checkpoint / STATE_FILE), checkpoint.parent)
    if best is not None:
        check_best_weights(best)


def check_best_weights(best: Path) -> None:
    """Look at the weights that a run is to end with.

    Raises:
        MolaError: they are missing, or are not those that were saved.
    """
    is_there = all(os.path.isfile(best / name) for name in ADAPTER_FILES)
    if reason := (_broken_weights(best) or _changed_weights(best)) if is_there else "holds no adapter":
        raise MolaError(
            f"`load_best_model_at_end` needs the best checkpoint so far, but {str(best)!r} {reason}. Pass "
            "--load_best_model_at_end false to end with the last weights, or resume from another checkpoint."
        )


def best_checkpoint(state: Mapping[str, Any], folder: Path) -> Path | None:
    """The best checkpoint so far by a trainer's state: in `folder`, moved or copied as that may be, or elsewhere."""
    recorded = state.get("best_model_checkpoint")
    if not recorded:
        return None
    check_form(recorded, TEXT, STATE_FILE, "It is the `best_model_checkpoint`; resume from another checkpoint.")
    here = folder / Path(recorded).name
    return here if here.is_dir() or not os.path.isdir(recorded) else Path(recorded)
