"""The folder of one run: what may be there at the start, where it can go on from, what it keeps.

adapter_config.json, adapter_model.safetensors    the adapter (the best one, when evaluated)
run.json         settings, versions, machine, data fingerprints, metrics, status
metrics.jsonl    the loss curve: one JSON object per log entry
checkpoint-N/    adapter, optimiser, schedule and random state after step N
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mola.errors import MolaError
from mola.files import check_writable

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "trainer_state.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MODEL_CARD = "README.md"
_SAVING = ".saving-"  # the adapter on its way into the run folder
_RUN_FILES = (RUN_FILE, METRICS_FILE, *_ADAPTER_FILES, "training_args.bin")
# What the trainer adds for itself and a reader of the finished adapter has no use for.
_NOT_IN_RESULT = ("training_args.bin",)
_SAME_WHEN_RESUMED = ("adapter_settings", "data_fingerprints")

logger = logging.getLogger(__name__)


def check_output_dir(folder: str | None, *, overwrite: bool, resume: bool) -> Path:
    """Refuse a folder that can not be written or that holds something else's files; deletes nothing.

    Raises:
        MolaError: no folder given, not writable, or not empty without `overwrite` or `resume`.
    """
    if not folder:
        raise MolaError("`output_dir` must name a folder for the adapter and the run's files. Pass --output_dir DIR.")
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise MolaError(f"`output_dir` must be a folder: {folder!r} is a file. Pass another name.")
    if path.is_dir() and any(path.iterdir()) and not (overwrite or resume):
        raise MolaError(
            f"`output_dir` must be empty: {folder!r} is not. Pass another folder, --resume_from_checkpoint last to "
            "go on with its run, or --overwrite_output_dir to replace it."
        )
    check_writable(path / RUN_FILE)
    return path


def clear_run(folder: Path) -> None:
    """Remove an earlier run's own files, so that none of them is taken for the new run's; nothing else."""
    for name in _RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    if _is_model_card(folder / _MODEL_CARD):
        (folder / _MODEL_CARD).unlink()
    for path in (*_checkpoints(folder), *folder.glob(f"{_SAVING}*")):
        shutil.rmtree(path)


def _is_model_card(path: Path) -> bool:
    """Whether a README was written with an adapter, not by a person for the folder."""
    return path.is_file() and "library_name: peft" in path.read_text(encoding="utf-8", errors="replace")


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, complete or not, newest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and _step(path) >= 0]
    return sorted(found, key=_step, reverse=True)


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from.

    Args:
        folder: the run folder.
        resume: None or empty: start anew; "last" or "true": the newest complete checkpoint of
            `folder`; else the path of a checkpoint.

    Raises:
        MolaError: there is no such checkpoint, or it is incomplete.
    """
    if resume is None or resume.strip().lower() in ("", "false", "no", "none"):
        return None
    if resume.strip().lower() not in ("last", "true"):
        path = Path(resume)
        problem = _problem(path)
        if problem:
            raise MolaError(
                f"`resume_from_checkpoint` must be a checkpoint folder of a run: {resume!r} {problem}. "
                "Pass DIR/checkpoint-N, or 'last' for the newest one in --output_dir."
            )
        return path
    for path in _checkpoints(folder):
        problem = _problem(path)
        if not problem:
            return path
        logger.warning("Skipping %s, which %s.", path, problem)
    raise MolaError(
        f"`resume_from_checkpoint` is 'last', but {str(folder)!r} holds no complete checkpoint. "
        "Leave the option out to start from the beginning."
    )


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _problem(path: Path) -> str:
    """Why a checkpoint can not be used; empty if it can. The trainer writes its state file last."""
    if not path.is_dir():
        return "does not exist"
    for name in (*_ADAPTER_FILES, STATE_FILE):
        if not (path / name).is_file():
            return f"has no {name}"
    # optimizer.pt, or the names of FSDP and DeepSpeed.
    if not any(True for pattern in ("optimizer*", "global_step*") for _ in path.glob(pattern)):
        return "has no optimiser state (`save_only_model` leaves it out)"
    try:
        json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["global_step"]
    except (ValueError, KeyError, TypeError):
        return f"has a broken {STATE_FILE}"
    return ""


def checkpoint_step(checkpoint: Path) -> int:
    """Optimiser steps done when a checkpoint was written."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["global_step"]


def check_same_run(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on with another adapter or other data than the run began with.

    Args:
        checkpoint: checkpoint of a run; the run's own record lies beside it.
        record: what the new part of the run would write.

    Raises:
        MolaError: something that a resumed run must share is different.
    """
    try:
        before = json.loads((checkpoint.parent / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        logger.warning("There is no readable %s beside %s: can not tell if data are the same.", RUN_FILE, checkpoint)
        return
    pairs = [(name, (before.get(name) or {}), (record.get(name) or {})) for name in _SAME_WHEN_RESUMED]
    for name, old, new in pairs:
        different = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        if different:
            key = different[0]
            raise MolaError(
                f"`resume_from_checkpoint` goes on with the same run, but `{key}` ({name.replace('_', ' ')}) differs: "
                f"{old.get(key)!r} in {checkpoint.parent}, now {new.get(key)!r}. Use the same options and data, or "
                "start a new run with --adapter."
            )


def save_result(save: Callable[[str], None], folder: Path, *, is_main_process: bool = True) -> None:
    """Put the finished adapter into `folder`: written beside it first, then renamed file by file.

    Args:
        save: writes the adapter into the folder it is given; called in every process.
        folder: the run folder.
        is_main_process: whether this process moves the files.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=_SAVING) as temporary:
        save(temporary)
        if is_main_process:
            for file in sorted(Path(temporary).iterdir()):
                target = folder / file.name
                is_foreign = file.name == _MODEL_CARD and target.exists() and not _is_model_card(target)
                if file.name not in _NOT_IN_RESULT and not is_foreign:
                    os.replace(file, target)
