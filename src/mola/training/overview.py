"""What `mola train` says before the first step: the run in one table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.picture import picture_of_modules
from mola.checkpoints.recorded_base import model_name
from mola.models.devices import DTYPES
from mola.models.memory import AdaptedLinear, training_memory
from mola.models.quantization import weight_bytes
from mola.training.checks import CheckedRun
from mola.training.distributed import shards_weights
from mola.training.option_checks import name_of
from mola.training.options import TrainOptions
from mola.tuner.layer import MolaLinear
from mola.tuner.stacked import StackedParameters

_ADAPTED = (MolaLinear, LoraLayer)


def overview(options: TrainOptions, model: PeftModel, run: CheckedRun, needed_logits: bool) -> str:
    """A table of a run that is about to begin, as lines of text that suit a terminal and a log file.

    Args:
        options: of the run.
        model: ready to train.
        run: the checked run.
        needed_logits: whether logits are computed only where the loss needs them.

    Returns:
        A title, then one line for each property.
    """
    rows = [*_adapter_rows(model), *_run_rows(options, run)]
    if not shards_weights(options):  # the memory of one of several devices is not estimated
        rows.append(("memory", _memory(options, model, run, needed_logits)))
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {value}" for name, value in rows]
    return "\n".join([f"Training {model_name(options.base_model or '')} in {run.folder}", *lines])


def _adapter_rows(model: PeftModel) -> Iterable[tuple[str, str]]:
    config: Any = model.active_peft_config
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, MolaLinear)]
    adapter = model.active_adapter
    num_layers = LayerStacks.of(model.get_base_model()).num_layers or 1

    def of_modules(attribute: str) -> list[str]:
        numbers = {
            (name.rpartition(f".{layer.layer_index}.")[2], layer.layer_index or 0): getattr(layer, attribute)[adapter]
            for name, layer in layers
        }
        return picture_of_modules(numbers, num_layers)

    def value_or_picture(attribute: str) -> str:
        values = {getattr(layer, attribute)[adapter] for _, layer in layers if layer.num_experts[adapter] > 1}
        values = values or {getattr(layer, attribute)[adapter] for _, layer in layers}
        return str(values.pop()) if len(values) == 1 else "; ".join(of_modules(attribute))

    if layers:
        for index, line in enumerate(of_modules("num_experts")):
            yield "" if index else "experts per layer", line
        yield "r, top_k", f"{value_or_picture('r')}, {value_or_picture('top_k')}"
    else:
        yield "adapter", f"{config.peft_type.value}, r {getattr(config, 'r', 'none')}"
    adapted = (name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, _ADAPTED))
    targets = dict.fromkeys(adapted) or config.target_modules or ()
    stacks = [module for module in model.modules() if isinstance(module, StackedParameters)]
    parameters = sorted(config.target_parameters or ()) if stacks else []
    names = [*([targets] if isinstance(targets, str) else targets), *parameters]
    yield "target modules", ", ".join(names)
    trainable, total = model.get_nb_trainable_parameters()
    yield "trainable", f"{trainable:,} parameters, {trainable / (total - trainable):.3%} of the base model's"


def _memory(options: TrainOptions, model: PeftModel, run: CheckedRun, needed_logits: bool) -> str:
    """The memory expected in a step with the longest samples; see `training_memory`."""
    report, samples, adapter = run.data.reports["train"], options.train_batch_size, model.active_adapter
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    memory = training_memory(
        run.config,
        [
            AdaptedLinear(getattr(layer, "num_experts", {adapter: 1})[adapter], layer.r[adapter], layer.in_features)
            for layer in model.modules()
            if isinstance(layer, _ADAPTED)
        ],
        weight_bytes=weight_bytes(model.get_base_model()) - trained,
        trainable_parameters=model.get_nb_trainable_parameters()[0],
        itemsize=DTYPES[options.base_dtype].itemsize,
        batch_size=samples,
        length=min(report.longest, options.cutoff_len),
        # Logits are computed where any sample of a batch has a label: at most as often as there are labels.
        logit_positions=math.ceil(samples * report.trained_tokens / report.kept) if needed_logits else None,
        checkpointing=bool(options.activation_checkpointing),
        optimizer=name_of(options.optim),
    )
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in asdict(memory).items())
    return f"up to {memory.total / 2**20:,.0f} MiB with the longest samples ({parts})"


def _run_rows(options: TrainOptions, run: CheckedRun) -> Iterable[tuple[str, str]]:
    report, evaluation = run.data.reports["train"], run.data.reports.get("evaluation")
    yield (
        "tokens per epoch",
        f"{report.tokens:,}, {report.trained_tokens / report.tokens:.0%} of them contribute to the loss",
    )
    yield "samples", f"{report.kept:,}" + (f"; {evaluation.kept:,} for evaluation" if evaluation else "; no evaluation")
    done = f", {run.steps_before_resume:,} of them done" if run.checkpoint is not None else ""
    yield "steps", f"{run.steps:,}{done}"
    parts = {
        "": options.train_batch_size,
        " accumulated": options.gradient_accumulation_steps,
        " processes": options.world_size,
    }
    product = " x ".join(f"{count}{what}" for what, count in parts.items() if count > 1 or not what)
    yield "effective batch", f"{options.effective_batch_size} samples" + (f" ({product})" if " x " in product else "")
    yield "dtype", options.dtype_reason
