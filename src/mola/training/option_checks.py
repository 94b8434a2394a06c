"""Checks of `TrainOptions` that need neither data nor a model.

Rejected are options that would be ignored, options that would make the result silently wrong, and options that would
fail only after a long training. Everything else is left to Transformers, Accelerate and torch. This module imports
none of them, so that the command line finds most mistakes at once.

The options are typed as `Any`, because these functions run while a `TrainOptions` is being made.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Iterable
from typing import Any

from mola.checkpoints.adapter_settings import is_skills_folder
from mola.checkpoints.recorded_base import base_model_of
from mola.checkpoints.skills_folder import check_name_is_free, check_skill_name
from mola.errors import MolaError
from mola.files.atomic import check_new_folder

logger = logging.getLogger(__name__)

_AT_LEAST_1 = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "eval_limit",
)
_ABOVE_0 = (
    "num_train_epochs",
    "learning_rate",
    "loraplus_lr_ratio",
    "logging_steps",
    "eval_steps",
    "save_steps",
)
# Schedules that begin at the full learning rate, and schedules that follow the evaluation loss.
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
EVALUATION_SCHEDULES = ("reduce_lr_on_plateau", "greedy")

_MISSING = {
    "base_model": "`base_model` must name a model. Pass --base_model with a folder or a hub id.",
    "data": "`data` must name the training data. Pass --data with a file or a saved dataset.",
}


def name_of(value: Any) -> str:
    """The text of an option that may be an enum of Transformers."""
    return str(getattr(value, "value", value))


def settle_skill(options: Any, refused: Iterable[str]) -> None:
    """Check the options of a skill against each other, and set the base model and the run folder by its skills folder.

    `options` is a `TrainOptions` that is being made, `refused` names the options that are not for skills.

    Raises:
        MolaError: an option is missing, or would be ignored.
    """
    if options.skill is None:
        for name in ("into", "layer"):
            if getattr(options, name) is not None:
                raise MolaError(f"`{name}` has no effect without `skill`. Pass --skill NAME, or leave it out.")
        return
    check_skill_name(options.skill)
    if options.into is None:
        raise MolaError("`skill` needs a skills folder to be added to. Pass --into FOLDER; a new one is created.")
    for name in refused:
        if (value := getattr(options, name)) is not None:
            raise MolaError(f"`{name}` ({value!r}) is not for skills, which are new plain LoRAs. Leave it out.")
    folder = options.into = os.path.expanduser(options.into)
    if is_skills_folder(folder):
        options.base_model = base_model_of(options.base_model, [folder])
    options.output_dir = options.output_dir or f"{folder.rstrip('/')}-runs/{options.skill}"


def check_skill_is_new(options: Any) -> None:
    """Raise if `into` has a skill of this name that is not to be replaced, or is another folder with files."""
    if not is_skills_folder(options.into):
        check_new_folder("into", options.into)
    check_name_is_free(options.into, options.skill, options.overwrite_output_dir)


def check_given(options: Any, name: str) -> None:
    """Raise if `base_model` or `data` is not given."""
    if getattr(options, name) is None:
        raise MolaError(_MISSING[name])


def check_values(options: Any) -> None:
    """Check single values, before Transformers reads them.

    Raises:
        MolaError: `output_dir` is missing, or a number is out of its range.
    """
    if not options.output_dir:
        raise MolaError("`output_dir` must name a folder for the adapter and the run's files. Pass --output DIR.")
    for names, rule, lowest in ((_AT_LEAST_1, "at least 1", 1), (_ABOVE_0, "above 0", 1e-30)):
        for name in names:
            value = getattr(options, name)
            if value is not None and not lowest <= value < math.inf:
                raise MolaError(f"`{name}` must be {rule}: got {value}.")
    if options.max_steps != -1 and options.max_steps < 1:
        raise MolaError(f"`max_steps` must be at least 1, or -1 to count epochs instead: got {options.max_steps}.")


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
    if options.push_to_hub and name_of(options.hub_strategy) != "end":
        raise MolaError(
            f"`hub_strategy` must be end: got {name_of(options.hub_strategy)}. Only a finished run is uploaded."
        )


def check_trainer_values(options: Any) -> None:
    """Check options that `TrainingArguments` alone has, before Transformers reads them.

    Raises:
        MolaError: a value is out of its range, or the result would not be what the options say.
    """
    if not 0 <= options.label_smoothing_factor <= 1:
        raise MolaError(f"`label_smoothing_factor` must be between 0 and 1: got {options.label_smoothing_factor}.")
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


def settle_schedule(options: Any) -> None:
    """Check when the run evaluates and saves, and set the options that depend on this.

    - Without evaluation no checkpoint is the best one, so the last weights are kept.
    - With `load_best_model_at_end` every evaluation needs a checkpoint: `save_steps` follows `eval_steps`.
    - Schedules without a warm-up have 0 `warmup_steps`.

    Raises:
        MolaError: the best checkpoint could not be found, or a number of steps would be ignored.
    """
    schedule_free = ("schedule_free_adamw", "schedule_free_sgd")  # these optimisers warm up themselves
    if name_of(options.lr_scheduler_type) in _WITHOUT_WARMUP and name_of(options.optim) not in schedule_free:
        options.warmup_steps = 0
    for kind in ("save", "eval"):
        steps, strategy = getattr(options, f"{kind}_steps"), name_of(getattr(options, f"{kind}_strategy"))
        if strategy not in ("no", "steps") and steps != getattr(type(options), f"{kind}_steps"):
            raise MolaError(
                f"`{kind}_steps` ({steps}) needs `{kind}_strategy` steps, which is {strategy}. "
                f"Pass --{kind}_strategy steps as well."
            )
    evaluate, save = name_of(options.eval_strategy), name_of(options.save_strategy)
    if evaluate == "no":
        options.load_best_model_at_end = False
        if save == "best":
            raise MolaError(
                "`save_strategy` best needs evaluations, and `eval_strategy` is no. Pass --eval_strategy epoch."
            )
    if save == "best":
        options.metric_for_best_model, options.greater_is_better = options.metric_for_best_model or "loss", False
    elif options.load_best_model_at_end and evaluate == save == "steps":
        interval = options.eval_steps or options.logging_steps
        if options.save_steps == type(options).save_steps:
            options.save_steps, options.saves_as_evaluated = interval, True
            logger.info("A checkpoint at every evaluation: `save_steps` is %g.", interval)
        if options.save_steps != interval:
            raise MolaError(
                "`load_best_model_at_end` needs a checkpoint at every evaluation: `save_steps` is "
                f"{options.save_steps}, `eval_steps` {interval}. Make them equal, or pass "
                "--load_best_model_at_end false to keep the last weights."
            )


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
    from transformers.integrations import get_available_reporting_integrations
    from transformers.trainer_pt_utils import LabelSmoother

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
            "`auto_find_batch_size` works in one process only: several would wait for each other. Got "
            f"{options.world_size} processes. Pass a --batch_size that fits."
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
