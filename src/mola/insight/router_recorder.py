"""What routers do in the training forward passes of a model, summed up where it happens.

Layers hand over the logits and choices that they compute with. At the end of a forward pass those of all modules with
equal shapes are stacked and reduced together: a few operators for the whole model, and no wait for the device. A layer
that is computed again in the backward pass (gradient checkpointing) is not seen twice, for by then the pass has ended.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import nn

from mola.architecture.layer_stacks import LayerStacks
from mola.insight.recording import router_entropies
from mola.insight.usage import FURTHER, ModuleUsage, usage_of_sums
from mola.tuner.layer import MolaLinear
from mola.tuner.router_losses import call_arguments
from mola.tuner.router_statistics import RouterOutput
from mola.tuner.routing import DEFAULT_ROUTER, route_all


class Watched(NamedTuple):
    """One router that is watched."""

    module: str  # name of its module; with the adapter's name in brackets where it is not the active one
    layer_index: int | None  # its decoder layer, None outside the layers
    num_experts: int  # how many it chooses from


class _Seen(NamedTuple):
    row: int
    router: str
    layer_index: int | None
    output: RouterOutput


class RouterWatch:
    """Sums over the tokens of training forward passes, for every router of a model.

    Counted are forward passes in training mode with gradients on, without padding (`attention_mask`). Not counted:
    evaluation, generation, and passes without the adapter.

    Attributes:
        routers: what is watched, in the order of the rows of `sums`.
        collecting: whether the current forward pass counts.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watch a model until `close` is called; modules with one expert have no router and are left out."""
        self.routers: list[Watched] = []
        self.collecting = False
        self._seen: list[_Seen] = []
        self._layers: list[MolaLinear] = []
        self._indices: dict[tuple[Any, ...], torch.Tensor] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, MolaLinear) and len(layer.mola_router):
                self._watch(name, layer)
        self._width = max((router.num_experts for router in self.routers), default=0)
        self._sums: dict[torch.device, torch.Tensor] = {}
        self._handles: list[Any] = []
        if self._layers:
            losses = self._layers[0].router_losses
            self._root = model if losses is None else losses.model  # the model proper, inside of what wraps it
            self._stacks = LayerStacks.of(self._root)
            for layer in self._layers:
                self._sums_on(next(iter(layer.mola_router.values())).device)
            self._handles = [
                self._root.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                self._root.register_forward_hook(self._after_forward, with_kwargs=True),
            ]

    def _watch(self, name: str, layer: MolaLinear) -> None:
        rows = {}
        for adapter in layer.mola_router:
            rows[adapter] = len(self.routers), layer.settings[adapter].router
            label = name if adapter in layer.active_adapters[:1] else f"{name} ({adapter})"
            self.routers.append(Watched(label, layer.layer_index, layer.num_experts[adapter]))
        layer.observer = _Place(self, layer.layer_index, rows)
        self._layers.append(layer)

    def close(self) -> None:
        """Leave nothing on the model."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            layer.observer = None
        self._handles, self._layers, self._seen = [], [], []

    # ------------------------------------------------------------------ a forward pass

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.collecting = module.training and torch.is_grad_enabled()
        self._seen = []

    @torch.no_grad()
    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not self.collecting:
            return
        self.collecting = False
        masks = _TokenMasks(call_arguments(module, args, kwargs), self._stacks)
        groups: dict[tuple[Any, ...], list[list[_Seen]]] = defaultdict(list)
        for seen in self._seen:
            logits, expert_indices = seen.output
            side = masks.side(seen.layer_index, logits.shape[0])
            # The number of tokens is compared, not part of the key: a compiler would make a graph for each.
            alike = groups[logits.device, seen.router, logits.shape[1], expert_indices.shape[1], side]
            members = next((group for group in alike if len(group[0].output.logits) == len(logits)), None)
            if members is None:
                alike.append([seen])
            else:
                members.append(seen)
        for (device, router, *_, side), alike in groups.items():
            for members in alike:
                self._add(device, router, members, None if side is None else masks.by_side[side])
        self._seen = []

    def _add(self, device: torch.device, router: str, members: list[_Seen], mask: torch.Tensor | None) -> None:
        """Add what routers with equal shapes gave."""
        outputs = [seen.output for seen in members]
        logits = torch.stack([output.logits.t() for output in outputs])  # (M, E, N)
        expert_indices = torch.stack([output.expert_indices.t() for output in outputs])  # (M, K, N)
        sums = sums_over_tokens(router, logits, expert_indices, mask, self._width)
        self._sums_on(device).index_add_(0, self._rows_on(device, members), sums)

    def _sums_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._sums:
            shape = len(self.routers), 2 * self._width + FURTHER
            self._sums[device] = torch.zeros(shape, dtype=_sum_dtype(device), device=device)
            torch._dynamo.mark_static(self._sums[device])  # or a batch of as many samples would have its own graph
        return self._sums[device]

    def _rows_on(self, device: torch.device, members: list[_Seen]) -> torch.Tensor:
        """Row of each member; kept, for a copy to a GPU makes the host wait."""
        rows = tuple(seen.row for seen in members)
        if torch.compiler.is_compiling():
            return torch.tensor(rows, device=device)
        if (device, rows) not in self._indices:
            self._indices[device, rows] = torch.tensor(rows, device=device)
        return self._indices[device, rows]

    # ------------------------------------------------------------------ sums

    def sums(self) -> torch.Tensor:
        """All sums, float64 on the CPU: a row per router with how often each expert was chosen (padded to the largest
        number of experts), each expert's gates (padded as well), entropy, margin and tokens."""
        total = torch.zeros(len(self.routers), 2 * self._width + FURTHER, dtype=torch.float64, device="cpu")
        for sums in self._sums.values():
            total += sums.cpu().double()
        return total

    def reset(self, sums: torch.Tensor | None = None) -> None:
        """Begin anew, from zero or from given sums."""
        # In place: a compiled forward pass holds on to these tensors.
        for mine in self._sums.values():
            mine.zero_()
        if sums is not None:
            next(iter(self._sums.values())).copy_(sums)

    def usage(self, sums: torch.Tensor) -> list[ModuleUsage]:
        """The use of experts behind `sums`; routers that saw no token are left out."""
        rows = zip(self.routers, sums, strict=True)
        return [usage_of_sums(r.module, r.layer_index, row, r.num_experts) for r, row in rows if row[-1] > 0]


class _Place:
    """What a layer knows of the watch."""

    def __init__(self, watch: RouterWatch, layer_index: int | None, rows: dict[str, tuple[int, str]]) -> None:
        self.watch = watch
        self.layer_index = layer_index
        self.rows = rows

    @property
    def collecting(self) -> bool:
        return self.watch.collecting

    def see(self, adapter_name: str, output: RouterOutput) -> None:
        row = self.rows.get(adapter_name)
        if row is not None:  # else an adapter that came later
            self.watch._seen.append(_Seen(*row, self.layer_index, output))


class _TokenMasks:
    """Which tokens of a forward pass count: all but padding.

    `by_side` has booleans `(N,)` of the attention mask and of the decoder's in an encoder-decoder, where given.
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
        """Which mask is that of a module's tokens; None where all count, also in a module that sees another number of
        tokens than the mask has, such as an expert of a MoE base."""
        side = ""
        if self._stacks.num_encoder_layers and not self._stacks.is_encoder(layer_index):
            # Cross attention reads the encoder's tokens, all else the decoder's.
            side = "decoder" if num_tokens == self._decoder_tokens else ""
        return side if side in self.by_side and self.by_side[side].numel() == num_tokens else None


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which MPS does not have


def _gates(router: str, logits: torch.Tensor, expert_indices: torch.Tensor) -> torch.Tensor:
    """Of the chosen experts, `(M, K, N)`."""
    if router == DEFAULT_ROUTER:
        return torch.softmax(logits.gather(1, expert_indices), dim=1)
    by_token = logits.transpose(0, 1).flatten(1)  # (E, M N)
    gates, _ = route_all(router, by_token, expert_indices.shape[1], 0)
    return gates.unflatten(1, (len(logits), -1)).transpose(0, 1).gather(1, expert_indices)


def sums_over_tokens(
    router: str, logits: torch.Tensor, expert_indices: torch.Tensor, mask: torch.Tensor | None, width: int
) -> torch.Tensor:
    """Sums over the counted tokens of `M` routers.

    Args:
        router: name of the function that gives gates, in `mola.tuner.routing.ROUTERS`.
        logits: float32 `(M, E, N)`.
        expert_indices: chosen experts, `(M, K, N)`.
        mask: booleans `(N,)`; None counts all.
        width: columns of the two parts that have one for every expert, at least E.

    Returns:
        float64 (float32 on MPS) `(M, 2 width + 3)`: choices and gates by expert, entropy, margin, tokens.
    """
    dtype = _sum_dtype(logits.device)
    gates = _gates(router, logits, expert_indices)  # (M, K, N)
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
    by_token = [router_entropies(logits, 1) * counted[:, 0], margins, counted[:, 0]]
    return torch.cat([*padded, torch.stack([each.sum(1, dtype=dtype) for each in by_token], 1)], 1)
