"""Calls the Triton kernels of `jit`: allocates their outputs and chooses their grids."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton

from mola.tuner.kernels.gpu import jit

IS_INTERPRETED = triton.knobs.runtime.interpret  # on the CPU, for tests
_COLUMNS = 1024  # columns of a program that packs
_QUARTER = 256  # elements of a quarter of a program that drops
_TILE = 1024  # numbers of a program's tile of experts (or ranks) and tokens
_MAX_DROPPED = 2**32  # Philox counts elements in 32 bits
_SEEDS, _STEPS = 2**40, 2**16  # a dropout mask is `step * _SEEDS + seed`, with the probability as a number of steps
_poison = [False]
_dropout_works: dict[torch.device, bool] = {}
logger = logging.getLogger(__name__)


class Gates(NamedTuple):
    """Like `mola.tuner.kernels.gates.Gates`, with the gated output of A, `(E*r, N)`."""

    logits: torch.Tensor
    weights: torch.Tensor
    expert_indices: torch.Tensor
    gated: torch.Tensor


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within this context, outputs hold NaN or -1 before a kernel writes them, which shows what it leaves out."""
    _poison[0] = True
    try:
        yield
    finally:
        _poison[0] = False


def part_scale(dtype: torch.dtype) -> float:
    """The factor by which each part of a router weight after the first is scaled up.

    `pack` splits a float32 weight into three 16-bit parts. In float16 the smaller parts would underflow without it.
    """
    return 2048.0 if dtype is torch.float16 else 1.0


def pack(experts_A: torch.Tensor, router: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A `(E, r, in)` and, below it, the float32 router `(E, in)` in three parts, as one matrix `(E*r + 3E, in)`.

    The matrix is in `dtype`, which is bfloat16 or float16.
    """
    num_experts, r, in_features = experts_A.shape
    packed = _empty(num_experts * (r + jit.PARTS), in_features, like=router, dtype=dtype)
    grid = num_experts * (r + 1), triton.cdiv(in_features, _COLUMNS)
    experts_A, router = experts_A.contiguous(), router.contiguous()
    with torch.cuda.device_of(packed):
        jit.pack[grid](
            experts_A, router, packed, in_features, num_rows=num_experts * r, num_experts=num_experts,
            STEP=part_scale(dtype), BLOCK=_COLUMNS,
        )  # fmt: skip
    return packed


def gates_forward(
    products: torch.Tensor, hidden: torch.Tensor, num_experts: int, top_k: int, scaling: float, dtype: torch.dtype
) -> Gates:
    """Choose experts, and multiply the output of A, `hidden: (E*r, N)`, by gates and scaling.

    `products: (3E, N)` are the products of the router's three parts with the input, in float32; `dtype` is the dtype of
    these parts and of the gated output.
    """
    size, num_tokens = hidden.shape
    logits, weights = (_empty(num_experts, num_tokens, like=products, dtype=torch.float32) for _ in range(2))
    indices = _empty(top_k, num_tokens, like=products, dtype=torch.int64)
    gated = _empty(size, num_tokens, like=products, dtype=dtype)
    block, grid = _tiles(num_experts, size // num_experts, num_tokens)
    with torch.cuda.device_of(gated):
        jit.gates_forward[grid](
            products, hidden, logits, weights, indices, gated, num_tokens, scaling,
            E=num_experts, R=size // num_experts, TOP_K=top_k, STEP=part_scale(dtype), **block,
        )  # fmt: skip
    return Gates(logits, weights, indices, gated)


def gates_backward(
    grad_gated: torch.Tensor,
    gated: torch.Tensor,
    weights: torch.Tensor,
    grad_logits: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Gradients of the output of A and, below them, of the router logits: `(E*r + E, N)` in the dtype of `gated`.

    Arguments as in `mola.tuner.kernels.gates.gates_backward`.
    """
    (size, num_tokens), num_experts = gated.shape, len(weights)
    both = _empty(size + num_experts, num_tokens, like=gated, dtype=gated.dtype)
    block, grid = _tiles(num_experts, size // num_experts, num_tokens)
    from_losses = weights if grad_logits is None else grad_logits.float().contiguous()
    grad_gated = grad_gated.contiguous()
    with torch.cuda.device_of(both):
        jit.gates_backward[grid](
            grad_gated, gated, weights, from_losses, both, num_tokens, scaling,
            E=num_experts, R=size // num_experts, HAS_GRAD_LOGITS=grad_logits is not None, **block,
        )  # fmt: skip
    return both


def sample_seed(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float] | None:
    """A dropout mask as a seed on the device, which includes `p`, and the probability of keeping an element.

    None for more elements than Philox can count, and on a device on which the kernel gives wrong results.
    """
    if x.numel() >= _MAX_DROPPED or not _is_dropout_right(x.device):
        return None
    steps = min(round(p * _STEPS), _STEPS - 1)
    seed = torch.empty(1, dtype=torch.int64, device=x.device).random_(steps * _SEEDS, (steps + 1) * _SEEDS)
    return seed, 1.0 - steps / _STEPS


def drop(rows: torch.Tensor, seed: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
    """`rows` with zeros for the elements that a seed of `sample_seed` drops.

    If there is a `total`, contiguous and in the shape of `rows`, the result is added to it in place.
    """
    rows = rows.contiguous()
    target = _empty(*rows.shape, like=rows, dtype=rows.dtype) if total is None else total
    grid = (triton.cdiv(rows.numel(), 4 * _QUARTER),)
    with torch.cuda.device_of(target):
        jit.drop[grid](
            rows, seed, target, rows.numel(), SEEDS=_SEEDS, STEPS=_STEPS, ADD=total is not None, BLOCK=_QUARTER
        )
    return target


def _is_dropout_right(device: torch.device) -> bool:
    """Whether `drop` gives correct results on a device: tested once, outside of CUDA graphs; until then False."""
    if device not in _dropout_works:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        reason = _why_dropout_is_wrong(device)
        if reason is not None:
            logger.warning("Dropout of Triton is not used on %s: %s.", device, reason)
        _dropout_works[device] = reason is None
    return _dropout_works[device]


def _why_dropout_is_wrong(device: torch.device) -> str | None:
    try:
        with torch.no_grad(), poisoned():
            ones, seed = torch.ones(8192, device=device), torch.tensor([_STEPS // 4 * _SEEDS + 1], device=device)
            kept, again = drop(ones, seed), drop(ones, seed)
            share = kept.mean().item()
            if not torch.equal(kept, again) or not ((kept == 0) | (kept == 1)).all():
                return "it drops different elements the second time, or changes what it keeps"
            return None if abs(share - 0.75) < 0.05 else f"it keeps {share:.0%} instead of 75 %"
    except Exception as error:  # any error of compiler or driver, as in `first_use`
        return f"{type(error).__name__}: {error}"


def _tiles(num_experts: int, r: int, num_tokens: int) -> tuple[dict[str, int], tuple[int]]:
    """Block sizes of a program over experts, ranks and tokens, and the grid of programs."""
    experts, ranks = triton.next_power_of_2(num_experts), triton.next_power_of_2(r)
    tokens = max(16, min(128, _TILE // max(experts, ranks)))
    return {"BLOCK_E": experts, "BLOCK_R": ranks, "BLOCK_N": tokens}, (triton.cdiv(num_tokens, tokens),)


def _empty(*shape: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A new tensor on the device of `like`, filled with NaN or -1 within `poisoned`."""
    tensor = torch.empty(shape, dtype=dtype, device=like.device)
    return tensor.fill_(float("nan") if dtype.is_floating_point else -1) if _poison[0] else tensor
