"""The folder of one run: what it may contain at the start, and what the run writes.

adapter_config.json, adapter_model.safetensors    the adapter (the best one, when evaluated)
run.json         settings, versions, machine, data fingerprints, metrics, status
metrics.jsonl    the loss curve: one JSON object per log entry
routing.jsonl    how often experts are used: one JSON object per logging interval
README.md        the model card; loss.png is its picture
checkpoint-N/    adapter, optimiser, schedule and random state after step N
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files import locking
from mola.files.atomic import WRITE_TEST, atomic_write_json, check_writable, flush_to_disk
from mola.files.digests import is_own_file
from mola.files.reading import read_json_object
from mola.insight import ROUTING_FILE
from mola.models.prompts import CHAT_TEMPLATE_DIR, TOKENIZER_FILES
from mola.reporting import CARD_FILE, PLOT_FILE, REPORT_FILE
from mola.training.checkpoints import (
    ADAPTER_FILES,
    CLEARING,
    RUN_FILE,
    STATE_FILE,
    asks_for_last,
    asks_to_resume,
    checkpoints_in,
    is_in,
    step_in_name,
)

METRICS_FILE = "metrics.jsonl"
SAVING = ".saving-"  # names of folders in which an adapter or a checkpoint is written
_COMMON_FILES = (*ADAPTER_FILES, *TOKENIZER_FILES, "training_args.bin")  # other programs write these files too
_RUN_FILES = (METRICS_FILE, ROUTING_FILE, PLOT_FILE, *_COMMON_FILES, RUN_FILE)
# Files, besides checkpoints, that a run can leave if it is killed while it writes.
_LEFTOVERS = (
    f"{SAVING}*",
    *(f".{name}.*.tmp" for name in (RUN_FILE, METRICS_FILE, ROUTING_FILE, CARD_FILE, PLOT_FILE)),
    f"{WRITE_TEST}*",
)
# What the Trainer and PEFT write beside an adapter: a run has its own record and card.
_NOT_IN_RESULT = ("training_args.bin", CARD_FILE)

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------- the folder at the start


def check_start_is_kept(adapter: str, folder: str | None, option: str = "adapter") -> None:
    """Check that the adapter a run starts from is outside the run folder, since the run would replace it.

    `option` is the name of the option that names the adapter.

    Raises:
        MolaError: the adapter's folder is the run folder, or is inside it.
    """
    if folder and Path(adapter).resolve().is_relative_to(Path(folder).resolve()):
        raise MolaError(
            f"`{option}` must be outside `output_dir`: got {adapter!r} and {folder!r}, so the run would remove the "
            "experts that it starts from. Pass a different --output."
        )


def check_output_dir(options: Any) -> Path:
    """`find_output_dir`, and check that the folder can be written to; creates it."""
    folder = find_output_dir(options)
    check_writable(folder / RUN_FILE)
    return folder


def find_output_dir(options: Any) -> Path:
    """Check that a run may use its folder, and return the folder; changes nothing.

    Raises:
        MolaError: the folder is not empty without `overwrite_output_dir` or `resume_from_checkpoint`,
            holds the checkpoints or the adapter of another program, or holds the adapter that the run starts from.
    """
    if options.adapter is not None:
        check_start_is_kept(options.adapter, options.output_dir)
    folder, resume = Path(options.output_dir or ""), options.resume_from_checkpoint
    if os.path.exists(folder) and not folder.is_dir():
        raise MolaError(f"`output_dir` must be a folder: {str(folder)!r} is a file. Pass a different name.")
    # A checkpoint in a different folder does not allow writing into this folder.
    resumes_here = asks_to_resume(resume) and (asks_for_last(resume) or is_in(Path(resume or ""), folder))
    # Other processes of this run may be testing at this moment whether they can write.
    is_used = os.path.isdir(folder) and any(not path.name.startswith(WRITE_TEST) for path in folder.iterdir())
    if is_used and not resumes_here:
        if not options.overwrite_output_dir:
            raise MolaError(
                f"`output_dir` must be empty: {str(folder)!r} is not. Pass a different folder, "
                "--resume_from_checkpoint last to resume its run, or --overwrite to replace it."
            )
        common = [*checkpoints_in(folder), *(folder / name for name in (*_COMMON_FILES, CHAT_TEMPLATE_DIR))]
        foreign = [path.name for path in common if path.exists()]
        if foreign and not (folder / RUN_FILE).exists():  # a run of mola writes its record before its first step
            raise MolaError(
                f"`overwrite_output_dir` removes an earlier run of mola, and {str(folder)!r} holds {foreign[0]!r} but "
                f"no {RUN_FILE}: no run has written it. Pass a different --output, or remove the file yourself."
            )
    return folder


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Lock a run folder during the block, without a lock file.

    Raises:
        MolaError: another run on this machine uses the folder.
    """
    return locking.locked(
        folder,
        f"`output_dir` must be one run's alone: another one is at work in {str(folder)!r}. Wait for its end, or pass "
        "another folder.",
    )


def start_run(folder: Path, checkpoint: Path | None, *, overwrite: bool) -> None:
    """Remove files of an earlier run that could be mistaken for files of the run that starts now.

    A run that resumes from `checkpoint` keeps the checkpoints up to it. Else `overwrite` removes the earlier run.
    """
    if checkpoint is not None and is_in(checkpoint, folder):
        step = step_in_name(checkpoint)
        if step < 0:  # a copy of a checkpoint, under a name of the user's
            step = read_json_object(checkpoint / STATE_FILE)["global_step"]
        for path in checkpoints_in(folder):
            if step_in_name(path) > step:
                logger.warning("Removing %s: the run resumes from %s.", path, checkpoint.name)
                shutil.rmtree(path)
    elif overwrite:
        clear_run(folder)
    for path in [path for pattern in _LEFTOVERS for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def clear_run(folder: Path) -> None:
    """Remove the files of an earlier run, and nothing else."""
    checkpoints = checkpoints_in(folder)
    if checkpoints:
        # If the command is killed from here on, the remaining checkpoints must not be resumed by the new run.
        atomic_write_json(folder / RUN_FILE, {"status": CLEARING})
    for path in checkpoints:
        shutil.rmtree(path)
    for name in (CARD_FILE, REPORT_FILE):
        if is_own_file(folder / name):
            (folder / name).unlink()
    for name in _RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / CHAT_TEMPLATE_DIR, ignore_errors=True)


# ---------------------------------------------------------------------- the result


def move_result(written: Path, folder: Path) -> None:
    """Move the files of an adapter from the folder `written` into a run folder, one by one."""
    for file in sorted(path for path in written.rglob("*") if path.is_file()):
        name = file.relative_to(written)
        if name.parts[0] not in _NOT_IN_RESULT:
            (folder / name).parent.mkdir(exist_ok=True, parents=True)  # named chat templates are in a subfolder
            flush_to_disk(file)
            os.replace(file, folder / name)
