"""The checkpoints of a run folder: from which of them a run can resume, and whether it would be the same run."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mola.architecture.notation import unambiguous
from mola.errors import MolaError
from mola.files.digests import CONFIG_FILE, WEIGHTS_FILE
from mola.files.reading import read_json_object
from mola.options.fields import find_difference
from mola.training.option_checks import EVALUATION_SCHEDULES

if TYPE_CHECKING:
    from transformers import TrainerState

PREFIX_CHECKPOINT_DIR = "checkpoint"  # as the Trainer names its folders
RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
CLEARING = "clearing"  # status in run.json while an earlier run is being removed
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
# Parts of run.json that a resumed run must share.
_SAME_PARTS = ("adapter_settings", "data_fingerprints", "quantization")
# Options that a resumed run must share: how samples become tokens, their order, and settings of the optimiser.
_SAME_SETTINGS = (
    "cutoff_len",
    "truncation",
    "packing",
    "train_on_inputs",
    "add_eos_token",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "optim",
    "optim_args",
    "learning_rate",
    "loraplus_lr_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)
logger = logging.getLogger(__name__)


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint folders, complete or not, newest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and step_in_name(path) >= 0]
    return sorted(found, key=step_in_name, reverse=True)


def step_in_name(path: Path) -> int:
    """N of `checkpoint-N`; -1 for any other name."""
    found = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", path.name)
    return int(found[1]) if found else -1


def step_of_saved_weights(options: Any, state: TrainerState) -> int:
    """The step whose weights a run ends with: that of the best checkpoint if there is one, else the last."""
    if options.load_best_model_at_end and state.best_model_checkpoint is not None:
        return step_in_name(Path(state.best_model_checkpoint))
    return state.global_step


def keep_one(folder: Path, step: int) -> None:
    """Remove the checkpoints of a run but that of `step`, or the newest one if there is no such checkpoint."""
    kept_first = sorted(checkpoints_in(folder), key=lambda path: step_in_name(path) != step)
    for path in kept_first[1:]:
        shutil.rmtree(path)


def is_in(checkpoint: Path, folder: Path) -> bool:
    """Whether a checkpoint belongs to the run in `folder`."""
    return checkpoint.resolve().parent == folder.resolve()


def has_finished(folder: Path) -> bool:
    """Whether a run folder holds a run that has ended, and its adapter."""
    return read_json_object(folder / RUN_FILE).get("status") == "finished" and (folder / WEIGHTS_FILE).is_file()


def asks_to_resume(resume: str | None) -> bool:
    """Whether `resume_from_checkpoint` asks to resume a run."""
    return resume is not None and resume.strip().lower() not in ("", "false", "no", "none")


def asks_for_last(resume: str | None) -> bool:
    """Whether `resume_from_checkpoint` means the newest checkpoint of the run folder."""
    return resume is not None and resume.strip().lower() in ("last", "true")


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint to resume from, or None to start a new run.

    Args:
        folder: the run folder.
        resume: None or empty: start a new run; "last" or "true": the newest complete checkpoint of
            `folder`; else the path of a checkpoint.

    Raises:
        MolaError: there is no such checkpoint, or it is incomplete.
    """
    if resume is None or not asks_to_resume(resume):
        return None
    if not asks_for_last(resume):
        if reason := _why_incomplete(Path(resume)):
            raise MolaError(
                f"`resume_from_checkpoint` must be a checkpoint folder of a run: {resume!r} {reason}. "
                "Pass DIR/checkpoint-N, or 'last' for the newest one in --output."
            )
        return Path(resume)
    for path in checkpoints_in(folder):
        if reason := _why_incomplete(path):
            logger.warning("Skipping %s, which %s.", path, reason)
        else:
            return path
    raise MolaError(
        f"`resume_from_checkpoint` is 'last', but {str(folder)!r} holds no complete checkpoint. "
        "To start from the beginning leave the option out and, if the folder is not empty, pass --overwrite."
    )


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint that a run in `folder` could resume from, or None."""
    return next((path for path in checkpoints_in(folder) if not _why_incomplete(path)), None)


def _why_incomplete(path: Path) -> str | None:
    """None if a run can resume from a checkpoint, else the reason why it cannot.

    Checkpoints are complete when they appear, but they are removed file by file.
    """
    if not os.path.isdir(path):
        return "does not exist"
    if read_json_object(path.parent / RUN_FILE).get("status") == CLEARING:
        return "belongs to a run that was being replaced when the command was killed"
    # What a checkpoint needs -> file patterns, of which one must match. DeepSpeed has its own files.
    needed = {name: [name] for name in (*ADAPTER_FILES, STATE_FILE)}
    needed["optimiser state (`save_only_model` leaves it out)"] = ["optimizer*", "global_step*/*optim_states.pt"]
    needed["scheduler.pt"] = ["scheduler.pt", "global_step*"]
    needed["random state"] = ["rng_state*.pth"]
    if any(path.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*/scaler.pt")):  # a run in float16, which saves one every time
        needed["scaler.pt"] = ["scaler.pt"]
    for what, patterns in needed.items():
        if not any(any(path.glob(pattern)) for pattern in patterns):
            return f"has no {what}"
    if not isinstance(read_json_object(path / STATE_FILE).get("global_step"), int):
        return f"has a broken {STATE_FILE}"
    return None


def check_best_checkpoint(checkpoint: Path) -> None:
    """Check that the best checkpoint so far exists: the run may have to end with its weights.

    Raises:
        MolaError: the best checkpoint is missing.
    """
    recorded = read_json_object(checkpoint / STATE_FILE).get("best_model_checkpoint")
    if not recorded:
        return
    # The run folder may have been moved or copied after the path was recorded.
    folders = (checkpoint.parent / Path(recorded).name, Path(recorded))
    if not any(all((folder / name).is_file() for name in ADAPTER_FILES) for folder in folders):
        raise MolaError(
            f"`load_best_model_at_end` needs the best checkpoint so far, but {recorded!r} holds no adapter. Pass "
            "--load_best_model_at_end false to end with the last weights, or resume from another checkpoint."
        )


def check_same_run(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Check that a resumed run has the adapter, the data and the optimiser that it began with.

    The record of its beginning is beside `checkpoint`; `record` is the one that the resumed run would write.

    Raises:
        MolaError: something that a resumed run must share is different.
    """
    before = read_json_object(checkpoint.parent / RUN_FILE)
    if not before:
        logger.warning("There is no readable %s beside %s: cannot tell if data are the same.", RUN_FILE, checkpoint)
        return
    old, new = before.get("settings") or {}, record.get("settings") or {}
    _warn_of_other_batches(before, record)
    names = [name for name in _SAME_SETTINGS if name in old]
    if {old.get("lr_scheduler_type"), new.get("lr_scheduler_type")} & {*EVALUATION_SCHEDULES}:
        # The checkpoint holds the losses that these schedules have seen.
        names += ["lr_scheduler_type", "lr_scheduler_kwargs"]
    if old.get("fp16"):
        names.append("fp16")  # the checkpoint holds the loss scale of float16
    elif old.get("bf16") != new.get("bf16"):
        logger.warning("The run continues with `bf16` %s, it began with %s.", new.get("bf16"), old.get("bf16"))
    adapter = before.get("adapter_settings") or {}
    if "num_experts" in adapter:
        before = {**before, "adapter_settings": {**adapter, "num_experts": unambiguous(adapter["num_experts"])}}
    parts: list[tuple[str, Any, Any, list[str] | None]] = [("settings", old, new, names)]
    parts += [(name, before.get(name) or {}, record.get(name) or {}, None) for name in _SAME_PARTS]
    if before.get("template") and record.get("template"):
        parts.append(("prompts", before, record, ["template"]))
    for part, was, now, compared in parts:
        if (key := find_difference(was, now, compared)) is not None:
            raise MolaError(
                f"`resume_from_checkpoint` continues the same run, but `{key}` ({part.replace('_', ' ')}) differs: "
                f"{was.get(key)!r} in {checkpoint.parent}, now {now.get(key)!r}. Use the same options and data, or "
                "start a new run with --adapter."
            )


def evaluates_alike(checkpoint: Path, record: Mapping[str, Any]) -> bool:
    """Whether the run of a checkpoint measured the evaluation loss like the resumed run, which has this record.

    The loss is a mean over batches, so it depends on how samples are put into batches.
    """
    before = read_json_object(checkpoint.parent / RUN_FILE)
    names = ("per_device_eval_batch_size", "label_smoothing_factor")
    same_settings = find_difference(before.get("settings") or {}, record["settings"], names) is None
    return same_settings and before.get("processes") == record["processes"]


def _warn_of_other_batches(before: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    was, now = before.get("effective_batch_size"), record.get("effective_batch_size")
    if None not in (was, now) and was != now and not record.get("settings", {}).get("auto_find_batch_size"):
        logger.warning(
            "The run continues with %s samples per step, it began with %s: steps are counted, so samples of this epoch "
            "are skipped or repeated.",
            now,
            was,
        )
