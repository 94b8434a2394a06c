"""The folder of one run: what may be there at the start, what it keeps. Its checkpoints: `checkpoints`.

adapter_config.json, adapter_model.safetensors    the adapter (the best one, when evaluated)
run.json         settings, versions, machine, data fingerprints, metrics, status
metrics.jsonl    the loss curve: one JSON object per log entry
routing.jsonl    the use of experts: one JSON object per logging interval
README.md        the model card; loss.png, its picture
checkpoint-N/    adapter, optimiser, schedule and random state after step N, and their sha256
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers.utils import CHAT_TEMPLATE_DIR

from mola.errors import MolaError
from mola.files.atomic import WRITE_TEST, atomic_write_json, check_writable, keep_on_disk
from mola.files.digests import is_own_file
from mola.files.locks import warn_of_no_locks
from mola.insight import ROUTING_FILE
from mola.models.prompts import TOKENIZER_FILES
from mola.reporting import REPORT_FILE
from mola.reporting.model_card import CARD_FILE, PLOT_FILE
from mola.training.checkpoints import (
    ADAPTER_FILES,
    CLEARING,
    RUN_FILE,
    asks_for_last,
    asks_to_resume,
    checkpoint_step,
    checkpoints_in,
    is_in,
    step_in_name,
)

METRICS_FILE = "metrics.jsonl"
_SAVING = ".saving-"  # the adapter on its way into the run folder
_OTHERS_TOO = (*ADAPTER_FILES, *TOKENIZER_FILES, "training_args.bin")  # files that other programs write as well
_RUN_FILES = (METRICS_FILE, ROUTING_FILE, PLOT_FILE, *_OTHERS_TOO, RUN_FILE)
# What a run that was killed while it wrote can leave behind besides checkpoints.
_LEFTOVERS = (
    f"{_SAVING}*",
    *(f".{name}.*.tmp" for name in (RUN_FILE, METRICS_FILE, ROUTING_FILE, CARD_FILE, PLOT_FILE)),
    f"{WRITE_TEST}*",
)
# What the trainer adds for itself, and PEFT's card: the run has its own.
_NOT_IN_RESULT = ("training_args.bin", CARD_FILE)

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
    """Refuse a folder that cannot be written or that holds something else's files; deletes nothing.

    Args:
        folder: the run folder.
        overwrite: whether an earlier run in it may be replaced.
        resume: as in `checkpoints.find_checkpoint`; a checkpoint of another folder is no reason to write into this one.

    Raises:
        MolaError: no folder given, not writable, not empty without `overwrite` or `resume`, or with the checkpoints or
            the adapter of another program.
    """
    if not folder:
        raise MolaError("`output_dir` must name a folder for the adapter and the run's files. Pass --output_dir DIR.")
    path = Path(folder)
    if os.path.exists(path) and not path.is_dir():
        raise MolaError(f"`output_dir` must be a folder: {folder!r} is a file. Pass another name.")
    goes_on = asks_to_resume(resume) and (asks_for_last(resume) or is_in(Path(resume or ""), path))
    # Other processes of this run may be trying whether they can write.
    is_used = os.path.isdir(path) and any(not each.name.startswith(WRITE_TEST) for each in path.iterdir())
    if is_used and not (overwrite or goes_on):
        raise MolaError(
            f"`output_dir` must be empty: {folder!r} is not. Pass another folder, --resume_from_checkpoint last to "
            "go on with its run, or --overwrite_output_dir to replace it."
        )
    if is_used and not goes_on:
        _check_own(path)
    check_writable(path / RUN_FILE)
    return path


def _check_own(folder: Path) -> None:
    """Refuse to overwrite what no run has written: their folders hold a record from the first step on."""
    places = [*checkpoints_in(folder), *(folder / name for name in (*_OTHERS_TOO, CHAT_TEMPLATE_DIR))]
    foreign = [path.name for path in places if path.exists()]
    if foreign and not (folder / RUN_FILE).exists():
        raise MolaError(
            f"`overwrite_output_dir` removes an earlier run of mola, and {str(folder)!r} holds {foreign[0]!r} but no "
            f"{RUN_FILE}: no run has written it. Pass another --output_dir, or remove it yourself."
        )


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder is one run's alone within the block, which leaves no file behind.

    Raises:
        MolaError: another run of this machine is at work in it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        warn_of_no_locks(folder)
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MolaError(
                f"`output_dir` must be one run's alone: another one is at work in {str(folder)!r}. Wait for its end, "
                "or pass another folder."
            ) from None
        except OSError:  # of a file system without locks
            warn_of_no_locks(folder)
        yield
    finally:
        with contextlib.suppress(OSError):  # also for processes that were forked meanwhile
            fcntl.flock(place, fcntl.LOCK_UN)
        os.close(place)


def start_run(folder: Path, checkpoint: Path | None, *, overwrite: bool) -> None:
    """Remove what the run that starts now must not find. Not before nothing can be wrong any more.

    Args:
        folder: the run folder.
        checkpoint: where the run goes on from, or None.
        overwrite: whether to remove an earlier run; not if `checkpoint` belongs to it.
    """
    if checkpoint is not None and is_in(checkpoint, folder):
        _drop_later_checkpoints(folder, checkpoint)
    elif overwrite:
        clear_run(folder)
    _remove_leftovers(folder)


def clear_run(folder: Path) -> None:
    """Remove an earlier run's own files, so that none of them is taken for the new run's; nothing else."""
    checkpoints = checkpoints_in(folder)
    if checkpoints:
        # Killed from here on, the checkpoints that are still there must not be resumed as those of the new run.
        atomic_write_json(folder / RUN_FILE, {"status": CLEARING})
    for path in checkpoints:
        shutil.rmtree(path)
    for name in (CARD_FILE, REPORT_FILE):
        if is_own_file(folder / name):
            (folder / name).unlink()
    for name in _RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / CHAT_TEMPLATE_DIR, ignore_errors=True)
    _remove_leftovers(folder)


def _drop_later_checkpoints(folder: Path, checkpoint: Path) -> None:
    """The trainer would write into their folders file by file: killed then, old and new files were mixed."""
    step = step_in_name(checkpoint)
    step = checkpoint_step(checkpoint) if step < 0 else step  # of a copy somebody has kept
    for path in checkpoints_in(folder):
        if step_in_name(path) > step:
            logger.warning("Removing %s: the run goes on from %s.", path, checkpoint.name)
            shutil.rmtree(path)


def _remove_leftovers(folder: Path) -> None:
    for path in [path for pattern in _LEFTOVERS for path in folder.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def save_result(save: Callable[[str], None], folder: Path, *, is_main_process: bool = True) -> list[str]:
    """Put the finished adapter into `folder`: written beside it first, then renamed file by file.

    Args:
        save: writes the adapter into the folder it is given; called in every process.
        folder: the run folder.
        is_main_process: whether this process moves the files.

    Returns:
        Names of the files that were moved, below `folder`.
    """
    moved = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=_SAVING) as temporary:
        save(temporary)
        if is_main_process:
            # Some lie in folders, as chat templates with a name.
            for file in sorted(path for path in Path(temporary).rglob("*") if path.is_file()):
                name = file.relative_to(temporary)
                if name.parts[0] not in _NOT_IN_RESULT:
                    (folder / name).parent.mkdir(exist_ok=True, parents=True)
                    keep_on_disk(file)  # the record that says so is
                    os.replace(file, folder / name)
                    moved.append(name.as_posix())
    return moved
