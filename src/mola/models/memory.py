"""Memory that training and serving need, estimated from the configuration of a model.

What a decoder layer keeps for the backward pass is counted for layers like LLaMA's: two RMSNorms, attention by `sdpa`
and a gated MLP. Most current decoders are built like this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

_MIXED = 4  # bytes of trained parameters, their gradients, losses and the norms' inputs: float32
_OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0, "lion": 4}  # per trained parameter; Adam and unknown optimisers: 8


class AdaptedLinear(NamedTuple):
    """One linear with experts."""

    num_experts: int
    r: int
    in_features: int


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training needs at the peak of a step; `training_memory` has the formulas."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class ServingMemory:
    """Bytes that serving needs; `serving_memory` has the formulas."""

    weights: int
    adapter: int
    cache: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(asdict(self).values())


def training_memory(
    config: Any,
    linears: Iterable[AdaptedLinear],
    *,
    weight_bytes: int,
    trainable_parameters: int,
    itemsize: int,
    batch_size: int,
    length: int,
    logit_positions: int | None = None,
    checkpointing: bool = False,
    optimizer: str = "adamw",
) -> TrainingMemory:
    """Estimate the memory of a training step with `N = batch_size * length` tokens, in bytes.

    With `P` trainable parameters, a base in a format of `s = itemsize` bytes, `V` tokens in the vocabulary, hidden
    size `H`, intermediate size `I`, and `D` = attention heads x their size:

        adapter      4 P, and s P more if s < 4: the copies that are multiplied
        gradients    4 P
        optimizer    8 P for Adam; 2 P for optimisers in 8 bits, 0 for SGD and Adafactor
        activations  the sum over the decoder layers of
                         N (8 H + 2 s H)       inputs and outputs of both norms, the former in float32
                         N s (4 D)             queries, keys and values for each head, output of the attention
                         N s (4 I)             gate before and after its activation function, up, and their product
                         N s length            the mask
                     and the sum over the adapted linears with E experts of
                         N (s E r + 4 E)       outputs of A, and gates
                         N (s in + 4 in + s r) with one expert: the dropped input, the dropout mask, outputs of A
        logits       N V (s + 8)               logits, their logarithms of probabilities and gradients

    With `checkpointing` a layer keeps its input, `N s H`, and one layer at a time keeps all of the above.

    Not counted: temporary tensors of one operator, and what Python, torch and CUDA take themselves.

    Args:
        config: configuration of the base model.
        linears: the adapted linears of all layers.
        weight_bytes: bytes of the base model's weights.
        trainable_parameters: number of trainable parameters.
        itemsize: bytes of one number of the base model's activations.
        batch_size: samples in a batch.
        length: tokens of each sample.
        logit_positions: positions per sample whose logits are computed; None for all.
        checkpointing: whether activations are computed again in the backward pass.
        optimizer: name of the optimiser, as in `optim`.
    """
    text = config.get_text_config()
    tokens, hidden, layers = batch_size * length, _number(text, "hidden_size"), _number(text, "num_hidden_layers", 1)
    kept = 2 * hidden + 4 * _heads(text) + 4 * _intermediate_size(text) + length
    per_layer = tokens * (8 * hidden + itemsize * kept)
    activations = layers * per_layer + tokens * sum(_kept_by(linear, itemsize) for linear in linears)
    if checkpointing:
        activations = layers * tokens * itemsize * hidden + activations // layers
    positions = batch_size * (length if logit_positions is None else min(length, logit_positions))
    return TrainingMemory(
        weights=weight_bytes,
        adapter=trainable_parameters * (_MIXED + (itemsize if itemsize < _MIXED else 0)),
        gradients=trainable_parameters * _MIXED,
        optimizer=trainable_parameters * _optimizer_bytes(optimizer),
        activations=activations,
        logits=positions * _number(text, "vocab_size") * (itemsize + 2 * _MIXED),
    )


def serving_memory(
    config: Any, *, weight_bytes: int, trainable_parameters: int, itemsize: int, batch_size: int, length: int
) -> ServingMemory:
    """Estimate the memory of serving `batch_size` answers side by side, each of `length` tokens with its prompt.

        adapter  s P                                              routers stay in float32, which adds little
        cache    2 s * layers * key-value heads * their size   per token

    The arguments are those of `training_memory`. Temporary tensors are not counted. Layers with a sliding window are
    counted like layers that keep all tokens.
    """
    text = config.get_text_config()
    per_token = 2 * itemsize * _number(text, "num_hidden_layers", 1) * _heads(text, "num_key_value_heads")
    return ServingMemory(weight_bytes, itemsize * trainable_parameters, per_token * batch_size * length)


def _kept_by(linear: AdaptedLinear, itemsize: int) -> int:
    """Bytes per token that an adapted linear keeps for the backward pass, besides its input."""
    if linear.num_experts == 1:
        return itemsize * (linear.in_features + linear.r) + _MIXED * linear.in_features
    return itemsize * linear.num_experts * linear.r + _MIXED * linear.num_experts


def _number(text: Any, name: str, default: int = 0) -> int:
    """A size in a configuration: the largest if layers differ, the default if the architecture has no such size."""
    value = getattr(text, name, None) or default
    return max(each or 0 for each in value) if isinstance(value, (list, tuple)) else value


def _heads(text: Any, name: str = "num_attention_heads") -> int:
    """Width of all heads together."""
    count = _number(text, "num_attention_heads")
    size = _number(text, "head_dim", _number(text, "hidden_size") // max(count, 1))
    return _number(text, name, count) * size


def _intermediate_size(text: Any) -> int:
    """Width of the MLP; with experts of the base model's own, the sum over those that a token uses."""
    width = _number(text, "intermediate_size", 4 * _number(text, "hidden_size"))
    chosen = _number(text, "num_experts_per_tok")
    shared = _number(text, "shared_expert_intermediate_size")
    return chosen * _number(text, "moe_intermediate_size", width) + shared if chosen else width


def _optimizer_bytes(name: str) -> int:
    if "8bit" in name:
        return 2
    return next((size for start, size in _OPTIMIZER_BYTES.items() if name.startswith(start)), 8)
