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
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mola.errors import MolaError
from mola.files import atomic_write_json, check_writable, read_json_object

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "trainer_state.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
_ADAPTER_FILES = ("adapter_config.json", _WEIGHTS_FILE)
_MODEL_CARD = "README.md"
_SAVING = ".saving-"  # the adapter on its way into the run folder
_RUN_FILES = (METRICS_FILE, *_ADAPTER_FILES, "training_args.bin", RUN_FILE)
# What a run that was killed while it wrote can leave behind besides checkpoints.
_LEFTOVERS = (f"{_SAVING}*", f".{RUN_FILE}.*.tmp", f".{METRICS_FILE}.*.tmp", ".write-test-*")
_CLEARING = "clearing"  # status in run.json while an earlier run is being removed
# What the trainer adds for itself and a reader of the finished adapter has no use for.
_NOT_IN_RESULT = ("training_args.bin",)
_SAME_WHEN_RESUMED = ("adapter_settings", "data_fingerprints")

logger = logging.getLogger(__name__)


def check_start_is_kept(adapter: str, folder: str | None, option: str = "adapter") -> None:
    """Refuse to start from an adapter in the run folder: the run would remove or replace it.

    Args:
        adapter: folder of the adapter that the run starts from.
        folder: the run folder.
        option: the option that names the adapter.

    Raises:
        MolaError: the adapter's folder is the run folder, or lies in it.
    """
    if folder and Path(adapter).resolve().is_relative_to(Path(folder).resolve()):
        raise MolaError(
            f"`{option}` must lie outside of `output_dir`: got {adapter!r} and {folder!r}, so the run would remove the "
            "experts that it starts from. Pass another --output_dir."
        )


def check_output_dir(folder: str | None, *, overwrite: bool, resume: str | None) -> Path:
    """Refuse a folder that can not be written or that holds something else's files; deletes nothing.

    Args:
        folder: the run folder.
        overwrite: whether an earlier run in it may be replaced.
        resume: as in `find_checkpoint`; a checkpoint of another folder is no reason to write into this one.

    Raises:
        MolaError: no folder given, not writable, or not empty without `overwrite` or `resume`.
    """
    if not folder:
        raise MolaError("`output_dir` must name a folder for the adapter and the run's files. Pass --output_dir DIR.")
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise MolaError(f"`output_dir` must be a folder: {folder!r} is a file. Pass another name.")
    goes_on = _is_set(resume) and (_is_last(resume) or _is_in(Path(resume or ""), path))
    if path.is_dir() and any(path.iterdir()) and not (overwrite or goes_on):
        raise MolaError(
            f"`output_dir` must be empty: {folder!r} is not. Pass another folder, --resume_from_checkpoint last to "
            "go on with its run, or --overwrite_output_dir to replace it."
        )
    check_writable(path / RUN_FILE)
    return path


def start_run(folder: Path, checkpoint: Path | None, *, overwrite: bool) -> None:
    """Remove what the run that starts now must not find. Not before nothing can be wrong any more.

    Args:
        folder: the run folder.
        checkpoint: where the run goes on from, or None.
        overwrite: whether to remove an earlier run; not if `checkpoint` belongs to it.
    """
    if checkpoint is not None and _is_in(checkpoint, folder):
        _drop_later_checkpoints(folder, checkpoint)
    elif overwrite:
        clear_run(folder)
    _remove_leftovers(folder)


def clear_run(folder: Path) -> None:
    """Remove an earlier run's own files, so that none of them is taken for the new run's; nothing else."""
    checkpoints = _checkpoints(folder)
    if checkpoints:
        # Killed from here on, the checkpoints that are still there must not be resumed as those of the new run.
        atomic_write_json(folder / RUN_FILE, {"status": _CLEARING})
    for path in checkpoints:
        shutil.rmtree(path)
    if _is_model_card(folder / _MODEL_CARD):
        (folder / _MODEL_CARD).unlink()
    for name in _RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    _remove_leftovers(folder)


def _drop_later_checkpoints(folder: Path, checkpoint: Path) -> None:
    """The trainer would write into their folders file by file: killed then, old and new files were mixed."""
    for path in _checkpoints(folder):
        if _step(path) > _step(checkpoint):
            logger.warning("Removing %s: the run goes on from %s.", path, checkpoint.name)
            shutil.rmtree(path)


def _remove_leftovers(folder: Path) -> None:
    for path in [path for pattern in _LEFTOVERS for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


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
    if resume is None or not _is_set(resume):
        return None
    if not _is_last(resume):
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
        "To start from the beginning leave the option out and, if the folder is not empty, pass --overwrite_output_dir."
    )


def _is_set(resume: str | None) -> bool:
    return resume is not None and resume.strip().lower() not in ("", "false", "no", "none")


def _is_last(resume: str | None) -> bool:
    return resume is not None and resume.strip().lower() in ("last", "true")


def _is_in(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.resolve().parent == folder.resolve()


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _problem(path: Path) -> str:
    """Why a checkpoint can not be used; empty if it can.

    The trainer writes its state file last, but deletes an old checkpoint in any order: every file is looked for.
    """
    if not path.is_dir():
        return "does not exist"
    if read_json_object(path.parent / RUN_FILE).get("status") == _CLEARING:
        return "belongs to a run that was being replaced when the command was killed"
    for name in (*_ADAPTER_FILES, STATE_FILE):
        if not (path / name).is_file():
            return f"has no {name}"
    # optimizer.pt, or the names of FSDP and DeepSpeed.
    if not _has(path, "optimizer*") and not _has(path, "global_step*"):
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
    """What is cut off; the contents of complete files are not read."""
    if not isinstance(read_json_object(path / STATE_FILE).get("global_step"), int):
        return f"has a broken {STATE_FILE}"
    try:
        with safe_open(path / _WEIGHTS_FILE, "pt"):
            pass
    except (OSError, SafetensorError):
        return f"has a broken {_WEIGHTS_FILE}"
    # torch.save writes zip files, whose directory is at their end.
    broken = [file.name for file in sorted(path.glob("*.pt*")) if file.is_file() and not zipfile.is_zipfile(file)]
    return f"has a broken {broken[0]}" if broken else ""


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
    _warn_of_other_random_numbers(checkpoint, record.get("processes", 1))
    before = read_json_object(checkpoint.parent / RUN_FILE)
    if not before:
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


def _warn_of_other_random_numbers(checkpoint: Path, processes: int) -> None:
    """Each process has a file of its own; the trainer goes on without one."""
    names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{index}.pth" for index in range(processes)]
    missing = [name for name in names if not (checkpoint / name).is_file()]
    if missing:
        logger.warning(
            "%s has no %s: written by another number of processes, or cut short. The run goes on with other random "
            "numbers than it would have had.",
            checkpoint,
            ", ".join(missing),
        )


def check_best_checkpoint(checkpoint: Path) -> None:
    """Refuse to go on if the best checkpoint so far is gone: the run may have to end with its weights.

    Raises:
        MolaError: its folder or its weights are missing.
    """
    best = best_checkpoint(read_json_object(checkpoint / STATE_FILE), checkpoint.parent)
    if best is not None and any(not (best / name).is_file() for name in _ADAPTER_FILES):
        raise MolaError(
            f"`load_best_model_at_end` needs the best checkpoint so far, but {str(best)!r} holds no adapter. Pass "
            "--load_best_model_at_end false to end with the last weights, or resume from another checkpoint."
        )


def best_checkpoint(state: Mapping[str, Any], folder: Path) -> Path | None:
    """The best checkpoint so far by a trainer's state: where it was written, or in `folder`, if that was moved."""
    recorded = state.get("best_model_checkpoint")
    if not recorded:
        return None
    return Path(recorded) if Path(recorded).is_dir() else folder / Path(recorded).name


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
