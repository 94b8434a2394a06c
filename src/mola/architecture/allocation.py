"""What an allocation of experts to layers costs. Pure functions, no torch.

- `check_top_k`, `effective_top_k`, `top_k_of_module`: experts used per token, checked against the numbers of experts.
- `plan_allocation`: parameters, FLOPs and bytes from the shapes of the adapted linears.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mola.architecture.patterns import by_pattern, check_matches
from mola.errors import MolaError


def check_top_k(num_experts: Sequence[int], top_k: Sequence[int]) -> None:
    """Check `1 <= top_k <= num_experts` in every layer.

    If `top_k` is the same in all layers, it may be larger than 1 in a layer with one expert, see `effective_top_k`.

    Raises:
        MolaError: a layer uses more experts than it has, or none.
    """
    is_uniform = len(set(top_k)) == 1
    for layer_index, (experts, chosen) in enumerate(zip(num_experts, top_k, strict=True)):
        if chosen < 1 or (chosen > experts and not (is_uniform and experts == 1)):
            raise MolaError(
                f"`top_k` must be between 1 and `num_experts` in every layer: layer {layer_index} has "
                f"top_k {chosen} and num_experts {experts}. Lower `top_k` to {max(experts, 1)} or give the "
                f"layer at least {max(chosen, 1)} experts."
            )


def effective_top_k(num_experts: Sequence[int], top_k: Sequence[int]) -> list[int]:
    """Experts that each layer uses per token: 1 in a layer with one expert, else `top_k`; checked by `check_top_k`."""
    check_top_k(num_experts, top_k)
    return [1 if experts == 1 else chosen for experts, chosen in zip(num_experts, top_k, strict=True)]


def top_k_of_module(num_experts: int, top_k: int, module: str) -> int:
    """Experts that one module uses per token: the `top_k` of its layer, or 1 if the module has one expert.

    Raises:
        MolaError: `top_k` is above the module's number of experts.
    """
    if top_k > num_experts > 1:
        raise MolaError(
            f"`top_k` must not be above `num_experts`: {module!r} has {num_experts} experts (`num_experts_pattern`) "
            f"and top_k {top_k}. Give it at least {top_k} experts, or lower `top_k`."
        )
    return min(num_experts, top_k)


@dataclass(frozen=True)
class LinearShape:
    """One adapted linear: module name, decoder layer (None outside the layers), number of inputs and of outputs."""

    name: str
    layer_index: int | None
    in_features: int
    out_features: int


@dataclass(frozen=True)
class StackShape:
    """An adapted parameter that stacks `count` linear maps of equal size; `count` is 1 for a matrix."""

    module: str
    parameter: str
    layer_index: int | None
    count: int
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        """Name of the parameter in the model."""
        return f"{self.module}.{self.parameter}"


@dataclass(frozen=True)
class LayerPlan:
    """Settings and cost of one decoder layer; `plan_allocation` has the formulas.

    `num_experts`, `top_k` and `r` hold for modules that match no key of a pattern.
    """

    layer_index: int
    num_experts: int
    top_k: int
    r: int
    expert_parameters: int
    router_parameters: int
    flops_per_token: int
    active_flops_per_token: int
    adapter_bytes: int


_TOTALS = (
    "num_experts",
    "expert_parameters",
    "router_parameters",
    "trainable_parameters",
    "base_parameters",
    "trainable_share",
    "flops_per_token",
    "active_flops_per_token",
    "adapter_bytes",
)


@dataclass(frozen=True)
class AllocationPlan:
    """The cost of an adapter, per layer and in total.

    Attributes:
        layers: one `LayerPlan` per decoder layer, lowest first.
        base_parameters: parameters of the model without the adapter; None if not counted.
        kernels: the backends that would compute the adapter on this machine, one line each; empty if not requested.
        memory: "training" and "serving" -> bytes by purpose and in total; empty if not requested.
    """

    layers: tuple[LayerPlan, ...]
    base_parameters: int | None = None
    kernels: tuple[str, ...] = ()
    memory: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def expert_parameters(self) -> int:
        """Parameters of all `A` and `B` matrices."""
        return sum(layer.expert_parameters for layer in self.layers)

    @property
    def router_parameters(self) -> int:
        """Parameters of all routers."""
        return sum(layer.router_parameters for layer in self.layers)

    @property
    def trainable_parameters(self) -> int:
        """Parameters of experts and routers together."""
        return self.expert_parameters + self.router_parameters

    @property
    def flops_per_token(self) -> int:
        """FLOPs that the adapter adds to the forward pass of one token if all experts are computed."""
        return sum(layer.flops_per_token for layer in self.layers)

    @property
    def active_flops_per_token(self) -> int:
        """FLOPs that the adapter adds to the forward pass of one token if only the chosen experts are computed."""
        return sum(layer.active_flops_per_token for layer in self.layers)

    @property
    def adapted_layers(self) -> list[LayerPlan]:
        """Layers with an adapted linear; if there are none, layers with an adapted parameter."""
        with_linears = [layer for layer in self.layers if layer.flops_per_token]
        return with_linears or [layer for layer in self.layers if layer.expert_parameters]

    @property
    def num_experts(self) -> int:
        """Sum over the adapted layers of the number of experts that each module of the layer has."""
        return sum(layer.num_experts for layer in self.adapted_layers)

    @property
    def adapter_bytes(self) -> int:
        """Size of the tensors of the saved adapter, in bytes."""
        return sum(layer.adapter_bytes for layer in self.layers)

    @property
    def trainable_share(self) -> float | None:
        """Trainable parameters / parameters of the base model; None if the base model's are not counted."""
        return self.trainable_parameters / self.base_parameters if self.base_parameters else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `layers`, `kernels`, `memory`, and `totals` over the adapted layers."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "kernels": list(self.kernels),
            "memory": {use: dict(parts) for use, parts in self.memory.items()},
            "totals": {"num_layers": len(self.adapted_layers), **{name: getattr(self, name) for name in _TOTALS}},
        }


def plan_allocation(
    linears: Iterable[LinearShape],
    num_experts: Sequence[int],
    top_k: Sequence[int],
    r: Sequence[int],
    bytes_per_parameter: int = 4,
    *,
    num_experts_pattern: Mapping[str, int] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    stacks: Iterable[StackShape] = (),
) -> AllocationPlan:
    """Parameters, FLOPs and bytes of an adapter.

    An adapted linear with `E` experts of rank `r`, of which a token uses `K = top_k`, has:

        expert_parameters       E * r * (in + out)
        router_parameters       E * in, or 0 if E = 1: one expert needs no router
        flops_per_token         2 * (expert_parameters + router_parameters)
        active_flops_per_token  2 * (K * r * (in + out) + router_parameters)

    `flops_per_token` holds for backends that compute all experts for every token (`dense`), `active_flops_per_token`
    for backends that compute the chosen experts only (`cpu_train`, `cpu_decode`, `grouped`).

    A parameter with `N` stacked experts of the base model adds `N * r * (in + out)` to the experts' parameters. The
    cost of its update does not depend on the number of tokens, so FLOPs per token leave it out.

    Args:
        linears: the adapted linears.
        num_experts: experts per decoder layer.
        top_k: experts used per token, per decoder layer.
        r: rank per decoder layer.
        bytes_per_parameter: size of one saved number; 4 = float32.
        num_experts_pattern: number of experts of single modules, by patterns of their names.
        rank_pattern: rank of single modules, by patterns of their names.
        stacks: the adapted parameters.

    Returns:
        The plan, one entry per decoder layer; layers without adapted linears cost nothing.

    Raises:
        MolaError: `top_k` is above `num_experts`, or a linear is outside the layers.
    """
    used_top_k = effective_top_k(num_experts, top_k)
    linears, stacks = list(linears), list(stacks)
    linear_names, stack_names = [linear.name for linear in linears], [stack.name for stack in stacks]
    check_matches(num_experts_pattern, linear_names, "num_experts_pattern")
    check_matches(rank_pattern, [*linear_names, *stack_names], "rank_pattern")
    experts, active_experts, routers, stacked = ([0] * len(num_experts) for _ in range(4))  # parameters per layer
    for linear in linears:
        index = _layer_of(linear, len(num_experts))
        count = by_pattern(num_experts_pattern, linear.name, num_experts[index])
        one_expert = by_pattern(rank_pattern, linear.name, r[index]) * (linear.in_features + linear.out_features)
        experts[index] += count * one_expert
        active_experts[index] += top_k_of_module(count, top_k[index], linear.name) * one_expert
        routers[index] += count * linear.in_features if count > 1 else 0
    for stack in stacks:
        index = _layer_of(stack, len(num_experts))
        rank = by_pattern(rank_pattern, stack.name, r[index])
        stacked[index] += stack.count * rank * (stack.in_features + stack.out_features)
    layers = [
        LayerPlan(
            layer_index=index,
            num_experts=num_experts[index],
            top_k=used_top_k[index],
            r=r[index],
            expert_parameters=experts[index] + stacked[index],
            router_parameters=routers[index],
            flops_per_token=2 * (experts[index] + routers[index]),  # one multiply and one add per weight
            active_flops_per_token=2 * (active_experts[index] + routers[index]),
            adapter_bytes=bytes_per_parameter * (experts[index] + stacked[index] + routers[index]),
        )
        for index in range(len(num_experts))
    ]
    return AllocationPlan(tuple(layers))


def _layer_of(adapted: LinearShape | StackShape, num_layers: int) -> int:
    index = adapted.layer_index
    if index is None or index >= num_layers:
        field, how = "target_parameters", ""
        if isinstance(adapted, LinearShape):
            field, how = "target_modules", ", for example with a regular expression for whole names"
        raise MolaError(
            f"`{field}` must be inside the {num_layers} decoder layers, each with its own number of experts: "
            f"{adapted.name!r} is not. Leave it out of `{field}`{how}."
        )
    return index
