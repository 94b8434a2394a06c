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
from collections.abc import Callable
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mola.errors import MolaError
from mola.files import check_writable

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
STATE_FILE = "trainer_state.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_RUN_FILES = (RUN_FILE, METRICS_FILE, *_ADAPTER_FILES, "README.md", "training_args.bin")
# What the trainer adds for itself and a reader of the finished adapter has no use for.
_NOT_IN_RESULT = ("training_args.bin",)

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
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(checkpoint)


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from.

    Args:
        folder: the run folder.
        resume: None or empty: start anew; "last" or "true": the newest complete checkpoint of
            `folder`; else the path of a checkpoint.

    Raises:
        MolaError: there is no such checkpoint, or it is incomplete.
    """
    if resume is None or resume.strip().lower() in ("", "false", "none"):
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
    for path in sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step, reverse=True):
        problem = _problem(path)
        if not problem:
            return path
        logger.warning("Skipping %s, which %s (interrupted while it was written).", path, problem)
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
    try:
        json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except ValueError:
        return f"has a broken {STATE_FILE}"
    return ""


def save_result(save: Callable[[str], None], folder: Path, *, is_main_process: bool = True) -> None:
    """Put the finished adapter into `folder`: written beside it first, then renamed file by file.

    Args:
        save: writes the adapter into the folder it is given; called in every process.
        folder: the run folder.
        is_main_process: whether this process moves the files.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        save(temporary)
        if is_main_process:
            for file in sorted(Path(temporary).iterdir()):
                if file.name not in _NOT_IN_RESULT:
                    os.replace(file, folder / file.name)
