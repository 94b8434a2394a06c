"""What an allocation of experts to layers means and costs. Pure functions, no torch.

- `check_top_k`, `effective_top_k`, `top_k_of_module`: experts used against experts there are.
- `plan_allocation`: parameters, FLOPs and bytes from the shapes of the adapted linears.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mola.architecture.patterns import by_pattern, check_matches
from mola.errors import MolaError


def check_top_k(num_experts: Sequence[int], top_k: Sequence[int]) -> None:
    """Check `1 <= top_k <= num_experts` in every layer.

    A layer with one expert is plain LoRA without a router: a `top_k` that is the same in all layers is
    allowed there, see `effective_top_k`. A `top_k` that differs between layers has to fit exactly.

    Args:
        num_experts: experts per layer.
        top_k: experts used per token, per layer.

    Raises:
        MolaError: the lists differ in length, or a layer uses more experts than it has; the first such
            layer is named.
    """
    _check_same_length(num_experts, top_k)
    is_uniform = len(set(top_k)) == 1
    for layer_index, (experts, chosen) in enumerate(zip(num_experts, top_k, strict=True)):
        if chosen < 1 or (chosen > experts and not (is_uniform and experts == 1)):
            raise MolaError(
                f"`top_k` must be between 1 and `num_experts` in every layer: layer {layer_index} has "
                f"top_k {chosen} and num_experts {experts}. Lower `top_k` to {max(experts, 1)} or give the "
                f"layer at least {max(chosen, 1)} experts."
            )


def effective_top_k(num_experts: Sequence[int], top_k: Sequence[int]) -> list[int]:
    """`top_k` per layer as it is used: 1 where a layer has one expert, else as given.

    Args:
        num_experts: experts per layer.
        top_k: experts used per token, per layer; checked with `check_top_k`.

    Returns:
        One integer per layer.

    Raises:
        MolaError: as `check_top_k`.
    """
    check_top_k(num_experts, top_k)
    return [1 if experts == 1 else chosen for experts, chosen in zip(num_experts, top_k, strict=True)]


def top_k_of_module(num_experts: int, top_k: int, module: str) -> int:
    """The layer's `top_k` where a module has a number of experts of its own; 1 for one expert.

    Raises:
        MolaError: more are used than there are.
    """
    if top_k > num_experts > 1:
        raise MolaError(
            f"`top_k` must not be above `num_experts`: {module!r} has {num_experts} experts (`num_experts_pattern`) "
            f"and top_k {top_k}. Give it at least {top_k} experts, or lower `top_k`."
        )
    return min(num_experts, top_k)


@dataclass(frozen=True)
class LinearShape:
    """One adapted linear: module name, decoder layer (None outside the decoder) and its two sizes."""

    name: str
    layer_index: int | None
    in_features: int
    out_features: int


@dataclass(frozen=True)
class StackShape:
    """A parameter that holds `count` linear maps of one size; one with two dimensions holds one."""

    module: str
    parameter: str
    layer_index: int | None
    count: int
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        """Its whole name."""
        return f"{self.module}.{self.parameter}"


@dataclass(frozen=True)
class LayerPlan:
    """What one decoder layer gets and costs; the formulas are in `plan_allocation`.

    `num_experts`, `top_k` and `r` are those of its modules that no pattern names.
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


@dataclass(frozen=True)
class AllocationPlan:
    """The cost of an adapter, layer by layer and in all.

    Attributes:
        layers: one `LayerPlan` per decoder layer, lowest first.
        base_parameters: parameters of the model without the adapter; None if not counted.
        kernels: which backends would compute it on this machine, a line each; empty if that was not asked.
    """

    layers: tuple[LayerPlan, ...]
    base_parameters: int | None = None
    kernels: tuple[str, ...] = ()

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
        """Experts and routers together."""
        return self.expert_parameters + self.router_parameters

    @property
    def flops_per_token(self) -> int:
        """FLOPs that the adapter adds to the forward pass of one token where all experts are computed."""
        return sum(layer.flops_per_token for layer in self.layers)

    @property
    def active_flops_per_token(self) -> int:
        """The same where chosen experts are computed only."""
        return sum(layer.active_flops_per_token for layer in self.layers)

    @property
    def adapted_layers(self) -> list[LayerPlan]:
        """Layers with an adapted linear, if there is one; what others have for a number of experts means nothing."""
        with_linears = [layer for layer in self.layers if layer.flops_per_token]
        return with_linears or [layer for layer in self.layers if layer.expert_parameters]

    @property
    def num_experts(self) -> int:
        """Experts per kind of module, of all adapted layers together."""
        return sum(layer.num_experts for layer in self.adapted_layers)

    @property
    def adapter_bytes(self) -> int:
        """Size of the saved adapter's tensors."""
        return sum(layer.adapter_bytes for layer in self.layers)

    @property
    def trainable_share(self) -> float | None:
        """Trainable parameters / parameters of the base model; None if those were not counted."""
        return self.trainable_parameters / self.base_parameters if self.base_parameters else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `layers` (a list) and `totals`, which count adapted layers and their experts."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "kernels": list(self.kernels),
            "totals": {
                "num_layers": len(self.adapted_layers),
                "num_experts": self.num_experts,
                "expert_parameters": self.expert_parameters,
                "router_parameters": self.router_parameters,
                "trainable_parameters": self.trainable_parameters,
                "base_parameters": self.base_parameters,
                "trainable_share": self.trainable_share,
                "flops_per_token": self.flops_per_token,
                "active_flops_per_token": self.active_flops_per_token,
                "adapter_bytes": self.adapter_bytes,
            },
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

    Per adapted linear of a layer with `E` experts of rank `r`:

        experts  E * r * (in + out)  parameters
        routers  E * in              parameters; 0 if E = 1, such a layer has no router
        forward  2*E*r*(in + out) + 2*E*in  FLOPs per token (the last term only with a router)
        active   2*K*r*(in + out) + 2*E*in  FLOPs per token, with K = top_k

    A parameter with `N` stacked experts of the base model has `N * r * (in + out)` parameters among the experts'. Its
    update costs the same for any number of tokens and is not in the FLOPs.

    Backends that compute all experts for every token need the former (`dense`), those that compute chosen experts only
    the latter (`cpu_train`, `cpu_decode`, `grouped`).

    Args:
        linears: the adapted linears.
        num_experts: experts per decoder layer.
        top_k: experts used per token, per decoder layer.
        r: rank per decoder layer.
        bytes_per_parameter: size of one saved number; 4 = float32.
        num_experts_pattern: experts of modules by their names, where they differ from their layer's.
        rank_pattern: the same for the rank.
        stacks: the adapted parameters.

    Returns:
        The plan, one entry per decoder layer; layers without adapted linears cost nothing.

    Raises:
        MolaError: lists of different lengths, `top_k` above `num_experts`, or a linear that is in none
            of the layers.
    """
    _check_same_length(num_experts, r, "r")
    chosen = effective_top_k(num_experts, top_k)
    linears, stacks = list(linears), list(stacks)
    check_matches(num_experts_pattern, [linear.name for linear in linears], "num_experts_pattern")
    check_matches(rank_pattern, [*(each.name for each in linears), *(each.name for each in stacks)], "rank_pattern")
    # Per layer: parameters of experts, of them in experts that a token uses, parameters of routers.
    counts = [[0, 0, 0] for _ in num_experts]
    for linear in linears:
        index = _layer(linear, len(counts))
        experts = by_pattern(num_experts_pattern, linear.name, num_experts[index])
        rank = by_pattern(rank_pattern, linear.name, r[index])
        one = rank * (linear.in_features + linear.out_features)
        used = top_k_of_module(experts, top_k[index], linear.name)
        router = experts * linear.in_features if experts > 1 else 0
        counts[index] = [a + b for a, b in zip(counts[index], (experts * one, used * one, router), strict=True)]
    stacked = [0] * len(counts)
    for stack in stacks:
        index = _layer(stack, len(counts))
        rank = by_pattern(rank_pattern, stack.name, r[index])
        stacked[index] += stack.count * rank * (stack.in_features + stack.out_features)
    layers = [
        LayerPlan(
            layer_index=index,
            num_experts=num_experts[index],
            top_k=chosen[index],
            r=r[index],
            expert_parameters=experts + stacked[index],
            router_parameters=routers,
            flops_per_token=2 * (experts + routers),  # one multiply and one add per weight
            active_flops_per_token=2 * (active + routers),
            adapter_bytes=bytes_per_parameter * (experts + stacked[index] + routers),
        )
        for index, (experts, active, routers) in enumerate(counts)
    ]
    return AllocationPlan(tuple(layers))


def _layer(adapted: LinearShape | StackShape, num_layers: int) -> int:
    index = adapted.layer_index
    if index is None or index >= num_layers:
        is_linear = isinstance(adapted, LinearShape)
        field = "target_modules" if is_linear else "target_parameters"
        how = r", which may be one regular expression for whole names, such as .*language_model.*\.(q_proj|v_proj)"
        raise MolaError(
            f"`{field}` must be inside the {num_layers} decoder layers, each with its own "
            f"number of experts: {adapted.name!r} is not. Leave it out of `{field}`{how if is_linear else ''}."
        )
    return index


def _check_same_length(num_experts: Sequence[int], other: Sequence[int], name: str = "top_k") -> None:
    if len(num_experts) != len(other):
        raise MolaError(
            f"`num_experts` and `{name}` need one entry per decoder layer each: got {len(num_experts)} and "
            f"{len(other)} entries. Resolve both for the same model."
        )
