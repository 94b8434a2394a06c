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
from mola.files.digests import CONFIG_FILE, check_digest, damaged_record
from mola.files.reading import read_json_object
from mola.files.schema import ANYTHING, INTEGER, TEXT, check_form
from mola.options.fields import first_difference
from mola.training.digests import DIGESTS_FILE, changed_file

RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
CLEARING = "clearing"  # status in run.json while an earlier run is being removed
_WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_FILE, _WEIGHTS_FILE)
_SAME_WHEN_RESUMED = ("adapter_settings", "data_fingerprints", "quantization")
# How samples become tokens, their order, and what the optimiser's state brings with it: another value would be ignored.
_SAME_SETTINGS = (
    *("cutoff_len", "truncation", "train_on_inputs", "add_eos_token", "seed", "data_seed"),
    *("optim", "optim_args", "learning_rate", "loraplus_lr_ratio", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
)

logger = logging.getLogger(__name__)


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint folders, complete or not, newest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and step_in_name(path) >= 0]
    return sorted(found, key=step_in_name, reverse=True)


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
    try:
        with safe_open(path / _WEIGHTS_FILE, "pt"):
            pass
        check_digest(path)
    except (OSError, SafetensorError, MolaError):
        return f"has a broken {_WEIGHTS_FILE}"
    changed = changed_file(path)
    return f"has a {changed} that is not as it was saved (if that was meant, remove {DIGESTS_FILE})" if changed else ""


def _is_whole(archive: Path) -> bool:
    try:
        return damaged_record(archive) is None and zipfile.is_zipfile(archive)
    except (OSError, ValueError):
        return False


def checkpoint_step(checkpoint: Path) -> int:
    """Optimiser steps done when a checkpoint was written."""
    return read_json_object(checkpoint / STATE_FILE)["global_step"]


def check_same_run(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """Refuse to go on with another adapter, other data or another optimiser than the run began with.

    Args:
        checkpoint: checkpoint of a run; the run's own record lies beside it.
        record: what the new part of the run would write.

    Raises:
        MolaError: something that a resumed run must share is different.
    """
    _warn_of_other_random_numbers(checkpoint, record.get("processes", 1))
    before = read_json_object(checkpoint.parent / RUN_FILE)
    if not before:
        logger.warning("There is no readable %s beside %s: cannot tell if data are the same.", RUN_FILE, checkpoint)
        return
    form: dict[str, Any] = {f"{name}?": ({str: ANYTHING}, None) for name in (*_SAME_WHEN_RESUMED, "settings")}
    form["effective_batch_size?"] = INTEGER
    check_form(before, form, str(checkpoint.parent / RUN_FILE), "Restore the file, or start a new run.")
    _warn_of_changes(before, record)
    _check_loss_scale(checkpoint, record)
    _check_same_schedule(before.get("settings") or {}, record.get("settings") or {})
    known = [name for name in _SAME_SETTINGS if name in (before.get("settings") or {})]
    # By the task, if no option says it.
    templates: tuple[Any, ...] = tuple(
        {"template": each["template"]} if each.get("template") else {} for each in (before, record)
    )
    parts: list[tuple[str, Any, Any, Any]] = [
        (name, before.get(name) or {}, record.get(name) or {}, None) for name in _SAME_WHEN_RESUMED
    ]
    parts += [("settings", before.get("settings") or {}, record.get("settings") or {}, known)]
    parts += [("prompts", *templates, None)] if all(templates) else []
    for name, old, new, keys in parts:
        if (key := first_difference(old, new, keys)) is not None:
            raise MolaError(
                f"`resume_from_checkpoint` goes on with the same run, but `{key}` ({name.replace('_', ' ')}) differs: "
                f"{old.get(key)!r} in {checkpoint.parent}, now {new.get(key)!r}. Use the same options and data, or "
                "start a new run with --adapter."
            )


def _warn_of_changes(before: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    began, now = (each.get("effective_batch_size") for each in (before, record))
    if None not in (began, now) and began != now:
        logger.warning(
            "The run goes on with %s samples per step, it began with %s: steps are counted, so samples of this epoch "
            "are left out or come again.",
            now,
            began,
        )
    began, now = (_precision(each.get("settings") or {}) for each in (before, record))
    if None not in (began, now) and began != now:  # the default is another on another processor
        logger.warning("The run goes on in %s, it began in %s: --dtype %s keeps that.", now, began, began)


def _check_loss_scale(checkpoint: Path, record: Mapping[str, Any]) -> None:
    """The trainer would load a loss scale, as float16 has one, into nothing."""
    if (checkpoint / "scaler.pt").is_file() and _precision(record.get("settings") or {}) in ("bfloat16", "float32"):
        raise MolaError(
            f"`resume_from_checkpoint` {str(checkpoint)!r} has the loss scale of a run in float16, and this one "
            "computes in another precision. Pass --dtype float16, or start a new run with --adapter."
        )


def _check_same_schedule(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """What a schedule that goes by the evaluation loss has saved fits no other one, and holds its own settings."""
    for name in ("lr_scheduler_type", "lr_scheduler_kwargs"):
        kinds = {each.get("lr_scheduler_type") for each in (before, now)}
        if name in before and before[name] != now.get(name) and kinds & {"reduce_lr_on_plateau", "greedy"}:
            raise MolaError(
                f"`resume_from_checkpoint` goes on with the same schedule where one goes by the evaluation loss, but "
                f"`{name}` differs: {before[name]!r} before, now {now.get(name)!r}. Use the same, or start a new run "
                "with --adapter."
            )


def _precision(settings: Mapping[str, Any]) -> str | None:
    """Format in which a run computes; None if its record does not say."""
    if not {"bf16", "fp16"} <= settings.keys():
        return None
    return "bfloat16" if settings["bf16"] else "float16" if settings["fp16"] else "float32"


def check_nothing_is_left(checkpoint: Path, num_train_epochs: float) -> None:
    """Refuse to call a run finished whose steps are done, with larger batches than before, and its epochs are not.

    Raises:
        MolaError: as said.
    """
    epoch = read_json_object(checkpoint / STATE_FILE).get("epoch")
    if isinstance(epoch, (int, float)) and epoch < num_train_epochs - 0.01:
        raise MolaError(
            f"`resume_from_checkpoint` counts steps, and with this effective batch all are done at epoch {epoch:.2f} "
            f"of {num_train_epochs:g}. Use the batch size, accumulation and processes that the run began with, or more "
            "epochs."
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
    if best is not None and any(not os.path.isfile(best / name) for name in ADAPTER_FILES):
        raise MolaError(
            f"`load_best_model_at_end` needs the best checkpoint so far, but {str(best)!r} holds no adapter. Pass "
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
