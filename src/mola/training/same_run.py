"""Whether a run that goes on is the one that was begun: refused or said where something is another now."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mola.errors import MolaError
from mola.files.reading import read_json_object
from mola.files.schema import ANYTHING, INTEGER, check_form
from mola.options.fields import first_difference
from mola.training.checkpoints import RUN_FILE, STATE_FILE

logger = logging.getLogger(__name__)

_SAME_WHEN_RESUMED = ("adapter_settings", "data_fingerprints", "quantization")
# How samples become tokens, their order, and what the optimiser's state brings with it: another value would be ignored.
_SAME_SETTINGS = (
    *("cutoff_len", "truncation", "train_on_inputs", "add_eos_token", "seed", "data_seed"),
    "train_sampling_strategy",
    *("optim", "optim_args", "learning_rate", "loraplus_lr_ratio", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
)


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
    _warn_of_changes(before, record, checkpoint)
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


def _samples_per_step(before: Mapping[str, Any], checkpoint: Path) -> int | None:
    """Of the steps before a checkpoint: the record of a run that was killed has the batch that was asked for."""
    settings = before.get("settings") or {}
    parts: list[Any] = [
        read_json_object(checkpoint / STATE_FILE).get("train_batch_size"),
        settings.get("gradient_accumulation_steps"),
        before.get("processes"),
    ]
    if settings.get("auto_find_batch_size") and all(isinstance(part, int) for part in parts):
        return math.prod(parts)
    return before.get("effective_batch_size")


def _warn_of_changes(before: Mapping[str, Any], record: Mapping[str, Any], checkpoint: Path) -> None:
    samples, now = _samples_per_step(before, checkpoint), record.get("effective_batch_size")
    if None not in (samples, now) and samples != now:
        logger.warning(
            "The run goes on with %s samples per step, it began with %s: steps are counted, so samples of this epoch "
            "are left out or come again.",
            now,
            samples,
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
