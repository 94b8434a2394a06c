"""The providers that are compared: the frozen base, PEFT's LoRA, a plain loop over experts, and mola.

- `frozen`: the frozen base. `lora_8`: LoRA of rank 8. `lora_equal`: LoRA of the rank whose number of trainable
  parameters is nearest to mola's. `loop`: see `benchmarks.loop`. `mola`: `get_peft_model` with a `MolaConfig`.
- All share the tensors of one base model, so memory caches treat them alike.
- In training steps the embeddings' output requires a gradient for all providers. Without this gradient the frozen base
  would have no backward pass; with it, the frozen base's step is the work that no adapter can avoid: forward, and
  backward to the input of the first decoder layer. For the other providers the gradient adds the input gradient of one
  layer's query, key and value projections.
- Adapters are kept in float32 and, on a bfloat16 base, computed under autocast, like in PEFT and `mola train`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from benchmarks.loop import add_loops
from benchmarks.models import Case
from mola import MolaConfig
from mola.architecture.allocation import LinearShape, effective_top_k, plan_allocation
from mola.architecture.notation import resolve_per_layer
from mola.architecture.targets import default_target_modules, linear_shapes

PROVIDERS = ("frozen", "lora_8", "lora_equal", "loop", "mola")
# Suites in which only some providers take part.
TAKES_PART = {
    "decode": ("frozen", "lora_8", "mola"),
    "growth": ("frozen", "lora_8", "loop", "mola"),
    "curve": ("loop", "mola"),
    "telemetry": ("mola",),
    "logits": ("mola",),
    "attention": ("mola",),
    "redundancy": ("mola",),
}
_SCALING = 2.0  # lora_alpha / r, for every provider


class Provider(NamedTuple):
    """One model that is measured.

    Attributes:
        model: ready for steps.
        trainable_parameters: 0 for the frozen base.
        num_linears: number of adapted linears; for the frozen base, of those that the other providers adapt.
        rank: rank of LoRA, or of each expert; 0 for the frozen base.
    """

    name: str
    model: Any
    trainable_parameters: int
    num_linears: int
    rank: int

    def row(self) -> dict[str, Any]:
        """What every row of the results says about its provider."""
        return {
            "provider": self.name,
            "trainable_parameters": self.trainable_parameters,
            "adapted_linears": self.num_linears,
            "rank": self.rank,
        }


def build(name: str, base: PreTrainedModel, case: Case, *, inference: bool = False, fresh: bool = False) -> Provider:
    """Make a provider from a base model, which is left unchanged.

    Args:
        name: one of `PROVIDERS`.
        base: the frozen model.
        case: adapter settings.
        inference: whether to build adapters without gradients, in the base's dtype, like `mola.load_model`.
        fresh: whether to keep the zeros that adapters start from; if not, they become small random numbers.
    """
    model: Any = share_weights(base)
    linears = _linears(model)
    torch.manual_seed(case.seed)
    rank = {"frozen": 0, "lora_8": 8}.get(name, case.r)
    if name == "lora_equal":
        rank = _equal_rank(linears, model, case)
    if name.startswith("lora"):
        config = LoraConfig(
            r=rank,
            lora_alpha=_SCALING * rank,
            lora_dropout=case.dropout,
            target_modules=_targets(model),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config, autocast_adapter_dtype=not inference)
    elif name == "mola":
        config = MolaConfig(
            num_experts=case.num_experts,
            top_k=_top_k(model, case),
            r=case.r,
            lora_alpha=_SCALING * case.r,
            lora_dropout=case.dropout,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config, autocast_adapter_dtype=not inference)
    elif name == "loop":
        experts, top_k = _num_experts(model, case), _top_k(model, case)
        add_loops(model, linears, experts, top_k, case.r, _SCALING * case.r, case.dropout)
    if not fresh:
        _make_trained(model)
    if inference:
        model.requires_grad_(False).eval()
    else:
        _transformer(model).enable_input_require_grads()
    trainable = sum(parameter.numel() for parameter in trainable_parameters(model))
    return Provider(name, model, trainable, len(linears), rank)


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with modules of its own and the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The model's trainable parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_step(model: nn.Module, batch: dict[str, torch.Tensor], case: Case) -> Callable[[], None]:
    """One training step as a function: gradients to None, forward, backward and, if asked for, AdamW."""
    forward = make_forward(model, batch, case)
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5) if case.optimizer and parameters else None

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        forward().backward()
        if optimizer is not None:
            optimizer.step()

    return step


def make_forward(model: nn.Module, batch: dict[str, torch.Tensor], case: Case) -> Callable[[], torch.Tensor]:
    """The forward pass of a training step, as a function that returns the loss."""
    device_type = torch.device(case.device).type
    enabled = case.dtype == "bfloat16"

    def forward() -> torch.Tensor:
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=enabled):
            return model(**batch, use_cache=False).loss

    return forward


def _transformer(model: Any) -> PreTrainedModel:
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def _targets(model: PreTrainedModel) -> list[str]:
    return default_target_modules([name for name, _ in model.named_modules()], model.config.model_type)


def _linears(model: PreTrainedModel) -> list[LinearShape]:
    return linear_shapes(model, _targets(model))


def _num_experts(model: PreTrainedModel, case: Case) -> list[int]:
    return resolve_per_layer(case.num_experts, model.config.num_hidden_layers, "num_experts")


def _top_k(model: PreTrainedModel, case: Case) -> list[int]:
    return effective_top_k(_num_experts(model, case), [case.top_k] * model.config.num_hidden_layers)


def _equal_rank(linears: list[LinearShape], model: PreTrainedModel, case: Case) -> int:
    experts = _num_experts(model, case)
    plan = plan_allocation(linears, experts, _top_k(model, case), [case.r] * len(experts))
    per_rank = sum(linear.in_features + linear.out_features for linear in linears)
    return max(1, round(plan.trainable_parameters / per_rank))


@torch.no_grad()
def _make_trained(model: nn.Module) -> None:
    """Replace the zeros that adapters start from by small random numbers."""
    for parameter in trainable_parameters(model):
        if not parameter.any():
            parameter.normal_(std=0.02)
