"""What is refused in `TrainOptions`: values out of range, and options that contradict each other.

The functions know them as `Any`, since they are called while the options are made.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_liger_kernel_available

from mola.data.encode import TRUNCATIONS
from mola.errors import MolaError

logger = logging.getLogger(__name__)

_LOSS_NAMES = (None, "loss", "eval_loss")
# Lowest and highest value, and the rule in words.
_RANGES: dict[str, tuple[float, float, str]] = {
    "per_device_train_batch_size": (1, math.inf, "at least 1"),
    "per_device_eval_batch_size": (1, math.inf, "at least 1"),
    "gradient_accumulation_steps": (1, math.inf, "at least 1"),
    "num_train_epochs": (1e-9, math.inf, "above 0"),
    "learning_rate": (1e-30, math.inf, "above 0"),
    "weight_decay": (0, math.inf, "at least 0"),
    "loraplus_lr_ratio": (1e-30, math.inf, "above 0"),
    "warmup_steps": (0, math.inf, "at least 0"),
    "ddp_timeout": (1, math.inf, "at least 1 (seconds)"),
    "seed": (0, 2**32 - 1, "between 0 and 2**32 - 1"),
    "validation_size": (0, math.inf, "at least 0"),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), (1e-9, math.inf, "above 0, and finite")),
    "save_total_limit": (1, math.inf, "at least 1; left out for all"),
    "eval_limit": (1, math.inf, "at least 1"),
    "eval_accumulation_steps": (1, math.inf, "at least 1"),
    "max_grad_norm": (0, math.inf, "at least 0"),
    "label_smoothing_factor": (0, 1, "between 0 and 1"),
    "neftune_noise_alpha": (0, math.inf, "at least 0"),
}


def check_choices(options: Any) -> None:
    """Refuse what there is no such thing of, and what excludes each other."""
    if not options.output_dir:
        raise MolaError("`output_dir` must name a folder for the adapter and the run's files. Pass --output_dir DIR.")
    if options.truncation not in TRUNCATIONS:
        raise MolaError(f"`truncation` must be one of {', '.join(TRUNCATIONS)}: got {options.truncation!r}.")
    if options.validation_size > 1 and options.validation_size % 1:
        raise MolaError(
            f"`validation_size` must be a number of samples or a share below 1: got {options.validation_size}."
        )
    if options.validation_size and (options.eval_data is not None or options.eval_split != type(options).eval_split):
        other = "eval_data" if options.eval_data is not None else "eval_split"
        raise MolaError(
            f"`validation_size` ({options.validation_size:g}) takes samples out of the training data, and "
            f"`{other}` ({getattr(options, other)!r}) names others. Leave one of the two out."
        )
    if options.metric_for_best_model not in _LOSS_NAMES:
        raise MolaError(
            f"`metric_for_best_model` must be eval_loss: got {options.metric_for_best_model!r}. Training measures "
            "the loss only; for accuracy run `mola evaluate` on the checkpoints."
        )
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(options, name):
            raise MolaError(
                f"`{name}` would round the weights that are saved: the trainer casts the model before its last "
                "evaluation. Leave it out; `dtype` sets that of the base model."
            )
    if options.use_liger_kernel and not is_liger_kernel_available():
        raise MolaError("`use_liger_kernel` needs the package liger-kernel. Run: pip install liger-kernel")
    if options.greater_is_better:
        raise MolaError("`greater_is_better` must be false: a lower loss is better. Leave it out.")
    if options.do_predict:
        raise MolaError("`do_predict` is no part of training: run `mola evaluate` afterwards. Leave it out.")


def check_adapter_options(options: Any, brought: Iterable[str]) -> None:
    """Refuse options that an adapter to train on brings itself, the names in `brought`."""
    given = [name for name in brought if getattr(options, name) is not None]
    if options.adapter is not None and given:
        raise MolaError(
            f"`adapter` brings its own {', '.join(f'`{name}`' for name in given)}: leave these options out, "
            "or leave `adapter` out to start with new experts."
        )


def check_launcher(options: Any) -> None:
    """Transformers would compute in what accelerate's configuration has, whatever `dtype` says."""
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    wanted = "bf16" if options.bf16 else "fp16" if options.fp16 else "no"
    if given not in ("", "no", wanted):
        raise MolaError(
            f"`dtype` {options.base_dtype} and the launcher's `mixed_precision` {given} (ACCELERATE_MIXED_PRECISION) "
            "contradict each other. Set mixed_precision to 'no': `dtype` decides."
        )


def check_ranges(options: Any) -> None:
    """Refuse numbers out of range."""
    for name, (low, high, rule) in _RANGES.items():
        value = getattr(options, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise MolaError(f"`{name}` must be {rule}: got {value}.")
    if options.max_steps != -1 and options.max_steps < 1:
        raise MolaError(f"`max_steps` must be at least 1, or -1 to count epochs instead: got {options.max_steps}.")


def check_warmup(options: Any) -> None:
    """Refuse what schedules that begin at the full rate do not read; unless asked for there is no warm-up then."""
    name = getattr(options.lr_scheduler_type, "value", options.lr_scheduler_type)
    if name in ("constant", "constant_with_warmup") and options.lr_scheduler_kwargs:
        raise MolaError(
            f"`lr_scheduler_kwargs` ({options.lr_scheduler_kwargs!r}) is not read by `lr_scheduler_type` {name}. Leave "
            "it out."
        )
    optimizer = str(getattr(options.optim, "value", options.optim))
    warms_up = optimizer in ("schedule_free_adamw", "schedule_free_sgd")  # by itself
    if name not in ("constant", "reduce_lr_on_plateau", "greedy") or warms_up:
        return
    if options.warmup_steps not in (0, type(options).warmup_steps):
        other = "constant_with_warmup" if name == "constant" else "another schedule"
        raise MolaError(
            f"`warmup_steps` ({options.warmup_steps:g}) is not read by `lr_scheduler_type` {name}, which begins at the "
            f"full rate. Pass {other}, or leave it out."
        )
    options.warmup_steps = 0


def check_schedule(options: Any) -> None:
    """What is evaluated and saved when; Transformers ignores some contradictions in silence."""
    strategies = options.eval_strategy, options.save_strategy, options.logging_strategy
    evaluate, save, log = (getattr(value, "value", value) for value in strategies)
    if evaluate not in ("no", "steps", "epoch") or save not in ("no", "steps", "epoch", "best"):
        return  # TrainingArguments names the choices
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
    sets_evaluations = evaluate == "steps" and options.eval_steps is None
    if log in ("no", "epoch") and options.logging_steps != type(options).logging_steps and not sets_evaluations:
        raise MolaError(
            f"`logging_steps` ({options.logging_steps:g}) counts only with `logging_strategy` steps, which is {log}. "
            "Leave one of the two out."
        )
    if evaluate == "no" and save == "best":
        raise MolaError(
            "`save_strategy` best needs evaluations, and `eval_strategy` is no. Pass --eval_strategy epoch or "
            "steps, or another --save_strategy."
        )
    if save == "best":  # which the trainer needs to be told where it does not load it
        options.metric_for_best_model, options.greater_is_better = options.metric_for_best_model or "loss", False
    if evaluate == "no":
        options.load_best_model_at_end = False  # nothing tells which one is the best
    elif options.load_best_model_at_end and save not in (evaluate, "best"):
        raise MolaError(
            "`load_best_model_at_end` needs a checkpoint at every evaluation: `eval_strategy` is "
            f"{evaluate}, `save_strategy` is {save}. Make them equal, pass --eval_strategy no if there is no "
            "evaluation data, or pass --load_best_model_at_end false to keep the last weights."
        )
    elif options.load_best_model_at_end and evaluate == save == "steps":
        every = options.eval_steps or options.logging_steps
        if options.save_steps == TrainingArguments.save_steps:
            options.save_steps, options.saves_as_evaluated = every, True
            logger.info("A checkpoint at every evaluation: `save_steps` is %g.", every)
        if options.save_steps != every:
            raise MolaError(
                "`load_best_model_at_end` needs a checkpoint at every evaluation: `save_steps` is "
                f"{options.save_steps}, `eval_steps` {every}{'' if options.eval_steps else ' (as `logging_steps`)'}. "
                "Make them equal, or pass --load_best_model_at_end false to keep the last weights."
            )
