"""Checks of `TrainOptions` that need neither data nor a model.

What Transformers, Accelerate or torch reject themselves is left to them. Here are rejected: options that would be
ignored, options that would make the result silently wrong, and options that would fail only after a long training.
The options are typed as `Any`, because these functions run while a `TrainOptions` is being made.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Iterable
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import LabelSmoother

from mola.errors import MolaError

logger = logging.getLogger(__name__)

# Lowest and highest allowed value, and the rule in words.
_RANGES: dict[str, tuple[float, float, str]] = {
    "per_device_train_batch_size": (1, math.inf, "at least 1"),
    "per_device_eval_batch_size": (1, math.inf, "at least 1"),
    "gradient_accumulation_steps": (1, math.inf, "at least 1"),
    "num_train_epochs": (1e-9, math.inf, "above 0"),
    "learning_rate": (1e-30, math.inf, "above 0"),
    "loraplus_lr_ratio": (1e-30, math.inf, "above 0"),
    "weight_decay": (0, math.inf, "at least 0"),
    "warmup_steps": (0, math.inf, "at least 0"),
    "validation_size": (0, math.inf, "at least 0"),
    "eval_limit": (1, math.inf, "at least 1"),
    "label_smoothing_factor": (0, 1, "between 0 and 1"),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), (1e-9, math.inf, "above 0, and finite")),
}
# Schedules that begin at the full learning rate, and schedules that follow the evaluation loss.
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
EVALUATION_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


def name_of(value: Any) -> str:
    """The text of an option that may be an enum of Transformers."""
    return str(getattr(value, "value", value))


def check_values(options: Any) -> None:
    """Check single values, before Transformers reads them.

    Raises:
        MolaError: `output_dir` is missing, or a number is out of its range.
    """
    if not options.output_dir:
        raise MolaError("`output_dir` must name a folder for the adapter and the run's files. Pass --output_dir DIR.")
    for name, (low, high, rule) in _RANGES.items():
        value = getattr(options, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise MolaError(f"`{name}` must be {rule}: got {value}.")
    if options.max_steps != -1 and options.max_steps < 1:
        raise MolaError(f"`max_steps` must be at least 1, or -1 to count epochs instead: got {options.max_steps}.")
    if options.validation_size > 1 and options.validation_size % 1:
        raise MolaError(
            f"`validation_size` must be a number of samples or a share below 1: got {options.validation_size}."
        )


def check_combinations(options: Any, adapter_options: Iterable[str]) -> None:
    """Check options against each other, before Transformers reads them.

    Args:
        options: a `TrainOptions` that is being made.
        adapter_options: names of the options whose values an existing adapter fixes.

    Raises:
        MolaError: an option would be ignored, or the result would not be what the options say.
    """
    given = [name for name in adapter_options if getattr(options, name) is not None]
    if options.adapter is not None and given:
        raise MolaError(
            f"`adapter` brings its own {', '.join(f'`{name}`' for name in given)}: leave these options out, "
            "or leave `adapter` out to start with new experts."
        )
    if options.validation_size and (options.eval_data is not None or options.eval_split != type(options).eval_split):
        other = "eval_data" if options.eval_data is not None else "eval_split"
        raise MolaError(
            f"`validation_size` ({options.validation_size:g}) takes samples out of the training data, and "
            f"`{other}` ({getattr(options, other)!r}) names different samples. Leave one of the two out."
        )
    if options.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise MolaError(
            f"`metric_for_best_model` must be eval_loss: got {options.metric_for_best_model!r}. Training measures "
            "the loss only; for accuracy run `mola evaluate` on the checkpoints."
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(options, name):
            raise MolaError(
                f"`{name}` would round the weights that are saved: the Trainer casts the model before its last "
                "evaluation. Leave it out; `dtype` sets the format of the base model."
            )
    if options.push_to_hub and name_of(options.hub_strategy) != "end":
        raise MolaError(
            f"`hub_strategy` must be end: got {name_of(options.hub_strategy)}. A run is uploaded once, when it is "
            "finished."
        )


def settle_schedule(options: Any) -> None:
    """Check when the run evaluates and saves, and set the options that depend on this.

    - Without evaluation no checkpoint is the best one, so the last weights are kept.
    - With `load_best_model_at_end` every evaluation needs a checkpoint: `save_steps` follows `eval_steps`.
    - Schedules without a warm-up have 0 `warmup_steps`.

    Raises:
        MolaError: the best checkpoint could not be found, or a number of steps would be ignored.
    """
    if name_of(options.lr_scheduler_type) in _WITHOUT_WARMUP and not _optimizer_warms_up(options):
        options.warmup_steps = 0
    evaluate, save = name_of(options.eval_strategy), name_of(options.save_strategy)
    if save != "steps" and options.save_steps != TrainingArguments.save_steps:
        raise MolaError(
            f"`save_steps` ({options.save_steps}) counts only with `save_strategy` steps, which is {save}. "
            "Pass --save_strategy steps as well."
        )
    if evaluate == "epoch" and options.eval_steps is not None:
        raise MolaError(
            f"`eval_steps` ({options.eval_steps}) counts only with `eval_strategy` steps, which is epoch. "
            "Pass --eval_strategy steps as well."
        )
    if save == "best":
        if evaluate == "no":
            raise MolaError(
                "`save_strategy` best needs evaluations, and `eval_strategy` is no. Pass --eval_strategy epoch or "
                "steps, or a different --save_strategy."
            )
        options.metric_for_best_model, options.greater_is_better = options.metric_for_best_model or "loss", False
    if evaluate == "no":
        options.load_best_model_at_end = False
    if not options.load_best_model_at_end or save == "best":
        return
    if evaluate != save:
        raise MolaError(
            "`load_best_model_at_end` needs a checkpoint at every evaluation: `eval_strategy` is "
            f"{evaluate}, `save_strategy` is {save}. Make them equal, pass --eval_strategy no if there is no "
            "evaluation data, or pass --load_best_model_at_end false to keep the last weights."
        )
    if evaluate == "steps":
        interval = options.eval_steps or options.logging_steps
        if options.save_steps == TrainingArguments.save_steps:
            options.save_steps, options.saves_as_evaluated = interval, True
            logger.info("A checkpoint at every evaluation: `save_steps` is %g.", interval)
        if options.save_steps != interval:
            raise MolaError(
                "`load_best_model_at_end` needs a checkpoint at every evaluation: `save_steps` is "
                f"{options.save_steps}, `eval_steps` {interval}{'' if options.eval_steps else ' (as `logging_steps`)'}."
                " Make them equal, or pass --load_best_model_at_end false to keep the last weights."
            )


def _optimizer_warms_up(options: Any) -> bool:
    return name_of(options.optim) in ("schedule_free_adamw", "schedule_free_sgd")


def check_launcher(options: Any) -> None:
    """Check that the launcher requests the format that `dtype` means: Accelerate would use the launcher's format.

    Raises:
        MolaError: the two differ.
    """
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    wanted = "bf16" if options.bf16 else "fp16" if options.fp16 else "no"
    if given not in ("", "no", wanted):
        raise MolaError(
            f"`dtype` {options.base_dtype} and the launcher's `mixed_precision` {given} (ACCELERATE_MIXED_PRECISION) "
            "contradict each other. Set mixed_precision to 'no': `dtype` decides."
        )


def check_trainer_options(options: Any) -> None:
    """Check options of `TrainingArguments` that do not work with experts.

    Raises:
        MolaError: an optimiser would not do what its name says, a resumed run could not repeat the order of samples,
            the loss would be wrong, or a tracker is not installed.
    """
    optimizer = name_of(options.optim)
    if optimizer.startswith(("galore", "apollo")):
        raise MolaError(
            f"`optim` {optimizer} projects the gradients of linear layers. Experts are not linear layers, so it would "
            "be AdamW. Pass a different optimiser."
        )
    if getattr(options, "train_sampling_strategy", None) == "batch_rebalance":
        raise MolaError(
            "`train_sampling_strategy` batch_rebalance has no seed, so a resumed run could not repeat it. Pass "
            "group_by_length."
        )
    if options.auto_find_batch_size and options.world_size > 1:
        raise MolaError(
            "`auto_find_batch_size` works in one process only: each process would look for a batch size of its own, "
            f"and they would wait for each other. Got {options.world_size} processes. Pass a "
            "--per_device_train_batch_size that fits."
        )
    averages = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters  # Transformers 5.16
    if options.label_smoothing_factor and options.gradient_accumulation_steps * options.world_size > 1 and not averages:
        raise MolaError(
            "`label_smoothing_factor` with `gradient_accumulation_steps` or several processes needs Transformers 5.16: "
            "older versions add up losses instead of averaging them."
        )
    available = get_available_reporting_integrations()
    if missing := [name for name in options.report_to or () if name not in available]:
        raise MolaError(
            f"`report_to` must name installed trackers: {', '.join(missing)} is not; installed are "
            f"{', '.join(available) or 'none'}. Install its package, or pass --report_to none."
        )
