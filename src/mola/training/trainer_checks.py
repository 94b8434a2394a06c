"""Options of `TrainingArguments` that do not do in `mola train` what they say: refused, with the reason.

The function knows them as `Any`, since it is called while the options are made; some are not in every version.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from transformers.trainer_pt_utils import LabelSmoother

from mola.errors import MolaError


def check_trainer_options(options: Any) -> None:
    """Refuse what Transformers would ignore for experts, compute wrongly, or notice when an earlier run is gone.

    Raises:
        MolaError: the first of these.
    """
    reason = next((reason for check in _CHECKS if (reason := check(options)) is not None), None)
    if reason is not None:
        raise MolaError(reason)


def _optimizer(options: Any) -> str | None:
    if not options.optim.startswith(("galore", "apollo")):
        if options.optim_target_modules is None:
            return None
        return "`optim_target_modules` is for galore and apollo, which are no optimisers of experts. Leave it out."
    name = options.optim.value
    return f"`optim` {name} projects the gradients of linears, and experts are none: it would be AdamW. Pass another."


_READ_NO_ARGUMENTS = ("adamw_torch", "adamw_torch_fused", "adafactor", "lomo", "adalomo")


def _optimizer_arguments(options: Any) -> str | None:
    given = options.optim_args
    if given is None:
        return None
    if not all(len(part.split("=")) == 2 for part in _parts(given)):
        return f"`optim_args` must be key=value, with commas between several: got {given!r}."
    name = options.optim.value
    is_packed = name.endswith("bit") and not any(word in name for word in ("ademamix", "rmsprop"))
    if name in _READ_NO_ARGUMENTS or is_packed:
        names = "`adam_beta1`, `adam_beta2` and `adam_epsilon`"
        return f"`optim_args` ({given!r}) is not read by `optim` {name}. Pass {names}, or leave it out."
    if any(part.startswith("weight_decay=") for part in _parts(given)):
        return "`optim_args` must leave weight_decay to the option `weight_decay`, which counts instead. Pass that."
    return None


def _parts(given: str) -> list[str]:
    return given.replace(" ", "").split(",")


def check_optimizer(options: Any) -> None:
    """Refuse an optimiser that cannot be made, or does not take what it is given; as far as it needs no model.

    Raises:
        MolaError: its package is missing, or an option changes nothing.
    """
    from transformers import Trainer  # it takes long to import

    name = options.optim.value
    try:
        made = Trainer.get_optimizer_cls_and_kwargs(options)
    except (ImportError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and "lomo" in name:  # of a model that is not there yet
            return
        raise MolaError(f"`optim` {name} cannot be made: {error}") from error

    def changes(**without: Any) -> bool:
        other = copy.copy(options)
        vars(other).update(without)
        return bool(Trainer.get_optimizer_cls_and_kwargs(other) != made)

    # Transformers looks for what it knows and leaves the rest, which differs from version to version.
    parts = _parts(options.optim_args) if options.optim_args else []
    for part in parts:
        if not changes(optim_args=",".join(other for other in parts if other != part) or None):
            raise MolaError(f"`optim_args`: {part!r} changes nothing in `optim` {name}. Leave it out.")
    for beta in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        value, default = getattr(options, beta), getattr(type(options), beta)
        if value != default and not changes(**{beta: default}):
            raise MolaError(f"`{beta}` ({value}) is not read by `optim` {name}. Leave it out.")


def _signals(options: Any) -> str | None:
    if not getattr(options, "enable_jit_checkpoint", False):
        return None
    return "`enable_jit_checkpoint` takes SIGTERM from `mola train`, which saves a checkpoint then. Leave it out."


def _sampling(options: Any) -> str | None:
    strategy = getattr(options, "train_sampling_strategy", None)
    if strategy != "batch_rebalance":
        return None
    return "`train_sampling_strategy` batch_rebalance knows no seed, and no place to go on from. Pass group_by_length."


def _loading(options: Any) -> str | None:
    workers, prefetch = options.dataloader_num_workers, options.dataloader_prefetch_factor
    if workers < 0:
        return f"`dataloader_num_workers` must be at least 0: got {workers}."
    if prefetch is not None and prefetch < 1:
        return f"`dataloader_prefetch_factor` must be at least 1: got {prefetch}."
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if getattr(options, name, None) and not workers:
            return f"`{name}` needs `dataloader_num_workers`, which is 0. Pass both, or leave it out."
    return None


def _checkpointing(options: Any) -> str | None:
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        value = getattr(options, name, None)
        if isinstance(value, str):
            return f"`{name}` must be a mapping, on the command line as JSON: got {value!r}."
    return None


def _accelerate(options: Any) -> str | None:
    config = options.accelerator_config
    if getattr(config, "split_batches", False) and options.world_size > 1:
        return "`accelerator_config` with split_batches shares one batch among processes. Pass a smaller batch instead."
    if getattr(config, "even_batches", True) is False and options.world_size > 1:
        return "`accelerator_config` with even_batches false gives processes other numbers of steps. Leave it out."
    if getattr(config, "dispatch_batches", None) and options.world_size > 1:
        return (
            "`accelerator_config` with dispatch_batches needs batches of one length, which they have not. Leave it out."
        )
    if (getattr(config, "gradient_accumulation_kwargs", None) or {}).get("num_steps") is not None:
        return "`accelerator_config` must leave num_steps to `gradient_accumulation_steps`. Pass that."
    if getattr(config, "use_seedable_sampler", True) is False:
        return "`accelerator_config` with use_seedable_sampler false has no order to go on from. Leave it out."
    return None


def _labels(options: Any) -> str | None:
    if options.label_names not in (None, ["labels"]):
        return f"`label_names` can only be labels: got {options.label_names}. Leave it out."
    if not options.label_smoothing_factor:
        return None
    if options.use_liger_kernel:
        return "`label_smoothing_factor` needs logits, of which `use_liger_kernel` makes none. Leave one out."
    knows_count = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters
    is_summed = options.world_size > 1 and options.average_tokens_across_devices
    if not knows_count and (options.gradient_accumulation_steps > 1 or is_summed):
        return (
            "`label_smoothing_factor` with `gradient_accumulation_steps` or several processes needs a newer version of "
            "Transformers: this one adds losses up where it should average them."
        )
    return None


_CHECKS = (
    _optimizer,
    _optimizer_arguments,
    _signals,
    _sampling,
    _loading,
    _checkpointing,
    _accelerate,
    _labels,
)
