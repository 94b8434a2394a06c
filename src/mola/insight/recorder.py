"""Records router decisions of a model.

- `recorded_gates` keeps the gates of every token while a model computes without gradients.
- `RouterRecorder` sums up the router decisions in the forward passes of a training.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from mola.architecture.layer_stacks import LayerStacks
from mola.errors import MolaError
from mola.tuner.layer import MolaLinear
from mola.tuner.router_losses import call_arguments
from mola.tuner.router_statistics import RouterOutput
from mola.tuner.routing import DEFAULT_ROUTER, route_dense

# Columns of a router's sums that are not per expert: entropies, margins, effective experts, first gates above, tokens.
SCALAR_SUMS = 5
FIRST_GATE = 0.9  # above it, one expert does nearly all of a token's update

# ---------------------------------------------------------------------- gates of every token


class ModuleGates(NamedTuple):
    """Gates of one adapted module in one forward pass.

    Attributes:
        module: its name in the model.
        layer_index: its decoder layer, from 0; None outside the layers.
        gates: float32 `(N, E)` on the CPU, one row per token in the order of the input; 0 for experts not chosen.
        entropies: float32 `(N,)`, entropy of the router's softmax over all experts, divided by its maximum `log E`.
    """

    module: str
    layer_index: int | None
    gates: torch.Tensor
    entropies: torch.Tensor


@contextmanager
def recorded_gates(model: nn.Module) -> Iterator[list[ModuleGates]]:
    """Record the gates of the active adapters' routers in every forward pass of a `with` block.

    A hook before each layer computes the router's logits a second time. The layer itself still uses its fastest kernel,
    which may not keep logits.

    Args:
        model: a model with `MolaLinear` modules; modules with one expert have no router and are left out.

    Yields:
        A list that grows with every call of a module.

    Raises:
        MolaError: a forward pass uses `adapter_names`.
    """
    recorded: list[ModuleGates] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, MolaLinear):
                hooks.enter_context(module.register_forward_pre_hook(_gate_hook(name, recorded)))
        yield recorded


def _gate_hook(name: str, recorded: list[ModuleGates]) -> Callable[[MolaLinear, tuple[torch.Tensor, ...]], None]:
    def record(layer: MolaLinear, inputs: tuple[torch.Tensor, ...]) -> None:
        if layer.disable_adapters or layer.merged:
            return
        if layer.mixed_batch is not None:
            raise MolaError("Gates are recorded for one adapter at a time: leave out `adapter_names`.")
        for adapter in layer.active_adapters:
            if adapter in layer.mola_router:
                with torch.no_grad():
                    logits = layer.router_logits(adapter, inputs[0])
                    gates, _ = route_dense(layer.settings[adapter].router, logits, layer.top_k[adapter], 1)
                    entropies = router_entropies(logits, dim=1)
                recorded.append(ModuleGates(name, layer.layer_index, gates.cpu(), entropies.cpu()))

    return record


@torch.no_grad()
def gates_of_tokens(model: Any, token_ids: list[int]) -> list[ModuleGates]:
    """Gates of every module for one text, from one forward pass of a model in eval mode.

    For a text that the model has generated, these equal, up to rounding, the gates used while generating it.
    """
    with recorded_gates(model) as recorded:
        model(input_ids=torch.tensor([token_ids], device=next(model.parameters()).device))
    return recorded


def router_entropies(logits: torch.Tensor, dim: int) -> torch.Tensor:
    """Entropy of the softmax along `dim`, divided by its maximum `log E`; the result lacks the dimension `dim`."""
    log_probabilities = torch.log_softmax(logits, dim)
    return -(log_probabilities.exp() * log_probabilities).sum(dim) / math.log(logits.shape[dim])


def effective_experts(gates: torch.Tensor, dim: int) -> torch.Tensor:
    r"""Effective number of experts along `dim`: `1 / sum_e g_e^2`, from 1 to `top_k`.

    1: one expert has the whole gate. `top_k`: all chosen experts have the same gate. The result lacks the dimension
    `dim`. This is the inverse of Simpson's index, also called participation ratio or Hill number of order 2.
    """
    return gates.square().sum(dim).reciprocal()


# ---------------------------------------------------------------------- sums over the tokens of a training


class RecordedRouter(NamedTuple):
    """One router that is recorded."""

    module: str  # name of its module, followed by the adapter's name in brackets if that adapter is not active
    layer_index: int | None  # its decoder layer, None outside the layers
    num_experts: int  # number of experts it chooses from


class _RouterCall(NamedTuple):
    """Output of a router in one call of its layer."""

    row: int  # row of the router in the sums
    function: str  # name of the function in `ROUTERS` that turns logits into gates
    layer_index: int | None
    output: RouterOutput


class RouterRecorder:
    """Sums over the tokens of training forward passes, for every router of a model.

    Forward passes in training mode with gradients count, without their padding (`attention_mask`). Evaluation,
    generation and passes without the adapter do not count.

    Layers pass on the logits and choices that they compute with. At the end of a forward pass, those of all modules
    with equal shapes are stacked and reduced together. This needs a few operators for the whole model, and the host
    never waits for the device. Gradient checkpointing computes a layer again in the backward pass, when the
    forward pass is over, so no token counts twice.

    Attributes:
        routers: the recorded routers, in the order of the rows of `sums`.
        collecting: whether the current forward pass counts.
    """

    def __init__(self, model: nn.Module) -> None:
        """Record a model until `close` is called. Modules with one expert have no router."""
        self.routers: list[RecordedRouter] = []
        self.collecting = False
        self._calls: list[_RouterCall] = []  # calls of the current forward pass
        self._layers: list[MolaLinear] = []
        self._row_indices: dict[tuple[Any, ...], torch.Tensor] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, MolaLinear) and len(layer.mola_router):
                self._observe_layer(name, layer)
        self._width = max((router.num_experts for router in self.routers), default=0)
        self._sums: dict[torch.device, torch.Tensor] = {}
        self._handles: list[Any] = []
        if self._layers:
            losses = self._layers[0].router_losses
            root = model if losses is None else losses.model  # the model inside any wrappers
            self._stacks = LayerStacks.of(root)
            for layer in self._layers:
                self._sums_on(next(iter(layer.mola_router.values())).device)
            self._handles = [
                root.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                root.register_forward_hook(self._after_forward, with_kwargs=True),
            ]

    def _observe_layer(self, name: str, layer: MolaLinear) -> None:
        rows = {}
        for adapter in layer.mola_router:
            rows[adapter] = len(self.routers), layer.settings[adapter].router
            label = name if adapter in layer.active_adapters[:1] else f"{name} ({adapter})"
            self.routers.append(RecordedRouter(label, layer.layer_index, layer.num_experts[adapter]))
        layer.observer = _LayerObserver(self, layer.layer_index, rows)
        self._layers.append(layer)

    def close(self) -> None:
        """Remove all hooks and observers from the model."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            layer.observer = None
        self._handles, self._layers, self._calls = [], [], []

    # ------------------------------------------------------------------ a forward pass

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.collecting = module.training and torch.is_grad_enabled()
        self._calls = []

    @torch.no_grad()
    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not self.collecting:
            return
        self.collecting = False
        masks = _TokenMasks(call_arguments(module, args, kwargs), self._stacks)
        groups: dict[tuple[Any, ...], list[list[_RouterCall]]] = defaultdict(list)
        for call in self._calls:
            logits, expert_indices = call.output
            side = masks.side(call.layer_index, logits.shape[0])
            # The number of tokens is not part of the key, because a compiler would make a graph for each number.
            alike = groups[logits.device, call.function, logits.shape[1], expert_indices.shape[1], side]
            members = next((group for group in alike if len(group[0].output.logits) == len(logits)), None)
            if members is None:
                alike.append([call])
            else:
                members.append(call)
        for (device, function, *_, side), alike in groups.items():
            for members in alike:
                self._add(device, function, members, None if side is None else masks.by_side[side])
        self._calls = []

    def _add(self, device: torch.device, function: str, calls: list[_RouterCall], mask: torch.Tensor | None) -> None:
        """Add calls with equal shapes to the sums."""
        logits = torch.stack([call.output.logits.t() for call in calls])  # (M, E, N)
        expert_indices = torch.stack([call.output.expert_indices.t() for call in calls])  # (M, K, N)
        sums = sums_over_tokens(function, logits, expert_indices, mask, self._width)
        self._sums_on(device).index_add_(0, self._rows_on(device, calls), sums)

    def _sums_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._sums:
            shape = len(self.routers), 2 * self._width + SCALAR_SUMS
            self._sums[device] = torch.zeros(shape, dtype=_sum_dtype(device), device=device)
            # Otherwise a batch whose number of samples equals the number of rows would get a graph of its own.
            torch._dynamo.mark_static(self._sums[device])
        return self._sums[device]

    def _rows_on(self, device: torch.device, calls: list[_RouterCall]) -> torch.Tensor:
        """The row of each call, as a tensor; cached, since a copy to a GPU makes the host wait."""
        rows = tuple(call.row for call in calls)
        if torch.compiler.is_compiling():
            return torch.tensor(rows, device=device)
        if (device, rows) not in self._row_indices:
            self._row_indices[device, rows] = torch.tensor(rows, device=device)
        return self._row_indices[device, rows]

    # ------------------------------------------------------------------ sums

    def sums(self) -> torch.Tensor:
        """All sums since the last `reset`.

        Returns:
            float64 on the CPU `(routers, 2 * largest E + SCALAR_SUMS)`: how often each expert was chosen and each
            expert's gates, both padded with zeros to the largest number of experts, then the sums of
            `sums_over_tokens` that are not per expert.
        """
        total = torch.zeros(len(self.routers), 2 * self._width + SCALAR_SUMS, dtype=torch.float64, device="cpu")
        for sums in self._sums.values():
            total += sums.cpu().double()
        return total

    def reset(self, sums: torch.Tensor | None = None) -> None:
        """Start again from zero, or from given sums."""
        # In place: a compiled forward pass refers to these tensors.
        for own in self._sums.values():
            own.zero_()
        if sums is not None:
            next(iter(self._sums.values())).copy_(sums)


@dataclass
class _LayerObserver:
    """The observer of one layer, which hands router outputs to the recorder."""

    recorder: RouterRecorder
    layer_index: int | None
    rows: dict[str, tuple[int, str]]  # by adapter: its row in the sums, and its function

    @property
    def collecting(self) -> bool:
        return self.recorder.collecting

    def observe(self, adapter_name: str, output: RouterOutput) -> None:
        row = self.rows.get(adapter_name)
        if row is not None:  # an adapter that was added after the recorder has no row
            self.recorder._calls.append(_RouterCall(*row, self.layer_index, output))


class _TokenMasks:
    """Which tokens of a forward pass count: all but padding.

    `by_side` has booleans `(N,)` for each attention mask of the inputs: key "" for `attention_mask`, key "decoder" for
    `decoder_attention_mask`.
    """

    def __init__(self, inputs: dict[str, Any], stacks: LayerStacks) -> None:
        self._stacks = stacks
        given = {"": inputs.get("attention_mask"), "decoder": inputs.get("decoder_attention_mask")}
        self.by_side = {
            side: mask.reshape(-1).ne(0) for side, mask in given.items() if torch.is_tensor(mask) and mask.dim() == 2
        }
        tokens = [inputs[key] for key in ("decoder_input_ids", "labels") if torch.is_tensor(inputs.get(key))]
        self._decoder_tokens = tokens[0].numel() if tokens else None

    def side(self, layer_index: int | None, num_tokens: int) -> str | None:
        """Which mask in `by_side` applies to a module's tokens, by its key; None if all tokens count.

        All tokens also count if their number differs from the mask's, such as in an expert of a MoE base.
        """
        side = ""
        if self._stacks.num_encoder_layers and not self._stacks.is_encoder(layer_index):
            # Cross attention reads the encoder's tokens; all other modules read the decoder's.
            side = "decoder" if num_tokens == self._decoder_tokens else ""
        return side if side in self.by_side and self.by_side[side].numel() == num_tokens else None


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def sums_over_tokens(
    function: str, logits: torch.Tensor, expert_indices: torch.Tensor, mask: torch.Tensor | None, width: int
) -> torch.Tensor:
    """Sums over the counted tokens of `M` routers.

    Args:
        function: name of the function in `mola.tuner.routing.ROUTERS` that turns logits into gates.
        logits: float32 `(M, E, N)`.
        expert_indices: chosen experts, `(M, K, N)`.
        mask: booleans `(N,)`, True for counted tokens; None counts all.
        width: number of columns for the choices, and for the gates, at least E.

    Returns:
        float64 (float32 on MPS) `(M, 2 width + SCALAR_SUMS)`: choices and gates by expert, entropies, margins,
        effective experts, tokens whose largest gate is above `FIRST_GATE`, tokens.
    """
    dtype = _sum_dtype(logits.device)
    gates = _chosen_gates(function, logits, expert_indices)  # (M, K, N)
    counted = torch.ones_like(gates)
    if mask is not None:
        counted = counted * mask.to(logits.device)
    margins = gates[:, 0] * counted[:, 0]
    if gates.shape[1] > 1:
        largest = gates if gates.shape[1] == 2 else gates.topk(2, dim=1).values
        margins = (largest[:, 0] - largest[:, 1]).abs() * counted[:, 0]
    empty = torch.zeros_like(logits)
    by_expert = [empty.scatter(1, expert_indices, each).sum(2, dtype=dtype) for each in (counted, gates * counted)]
    padded = [nn.functional.pad(each, (0, width - each.shape[1])) for each in by_expert]
    by_token = [
        router_entropies(logits, 1) * counted[:, 0],
        margins,
        effective_experts(gates, 1) * counted[:, 0],
        (gates.amax(1) > FIRST_GATE) * counted[:, 0],
        counted[:, 0],
    ]
    return torch.cat([*padded, torch.stack([each.sum(1, dtype=dtype) for each in by_token], 1)], 1)


def _chosen_gates(function: str, logits: torch.Tensor, expert_indices: torch.Tensor) -> torch.Tensor:
    """Gates of the chosen experts, `(M, K, N)`."""
    if function == DEFAULT_ROUTER:
        return torch.softmax(logits.gather(1, expert_indices), dim=1)
    by_token = logits.transpose(0, 1).flatten(1)  # (E, M N)
    gates, _ = route_dense(function, by_token, expert_indices.shape[1], 0)
    return gates.unflatten(1, (len(logits), -1)).transpose(0, 1).gather(1, expert_indices)
