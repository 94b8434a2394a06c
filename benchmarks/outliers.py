"""The suite `outliers`: whether the few very large channels of a real model's activations cost anything, or harm.

- How large: root mean square of the largest channel of a linear's input over that of its median channel.
- Numbers too small for the normal range, which processors compute slowly: in what the layers of a whole training step
  make in rank space, and in the gradients of A, B and router.
- Time of the layers with the largest channels, on what they read in the model and on Gaussian numbers of the same size.
- Training: the error that is left when fresh experts learn what others add, on both kinds of input.
"""

from __future__ import annotations

import copy
import logging
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.cases import make_case
from benchmarks.curve import LEARNING_RATE
from benchmarks.measure import Times, ratio, time_interleaved
from benchmarks.models import Case, load_base
from benchmarks.options import BenchmarkOptions
from benchmarks.providers import build, make_forward, trainable_parameters
from benchmarks.subnormal import Numbers, RankSpace
from benchmarks.text import has_text, text_batches
from mola.tuner.layer import MolaLinear

logger = logging.getLogger(__name__)

TIMED = 8  # linears with the largest channels
TRAINING_STEPS = 100

Row = dict[str, Any]
Pairs = list[tuple[torch.Tensor, torch.Tensor]]  # input of a linear and gradient of its output
Layers = dict[str, MolaLinear]


def outliers(options: BenchmarkOptions, model: str, folder: Path) -> Iterator[Row]:
    """One row for each dtype, on a batch of real text."""
    if not has_text("outliers", model):
        return
    for dtype in options.dtype:
        logger.info("outliers: %s, %s", model, dtype)
        case = make_case(options, model, folder, dtype, options.dropout[0])
        mola = build("mola", load_base(case), case)
        forward = make_forward(mola.model, text_batches(case, 1)[0], case)
        layers = {name: each for name, each in mola.model.named_modules() if isinstance(each, MolaLinear)}
        found = channel_ratios(layers, forward)
        largest = sorted(found, key=lambda name: found[name], reverse=True)
        chosen = {name: layers[name] for name in largest[:TIMED]}
        counted, real = count_small(mola.model, layers, chosen, forward)
        ordinary = [(_gaussian(x), _gaussian(gradient)) for x, gradient in real]
        timed = _time(list(chosen.values()), real, ordinary, case, options)
        left = {
            f"error_left_{kind}": error_left(chosen[largest[0]], pairs[0][0])
            for kind, pairs in (("real", real), ("gaussian", ordinary))
        }
        ratios = {
            "channel_ratio": found[largest[0]],
            "linear": largest[0].removeprefix("base_model.model."),
            "median_channel_ratio": statistics.median(found.values()),
        }
        yield case.row() | mola.row() | ratios | counted | timed | left | {"training_steps": TRAINING_STEPS}


@torch.no_grad()
def channel_ratios(layers: Layers, forward: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Of the input of every layer: the largest channel's root mean square over the median channel's."""
    ratios = {}

    def watch(name: str) -> Callable[..., None]:
        def before(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            size = inputs[0].float().flatten(0, -2).square().mean(0).sqrt()
            ratios[name] = (size.max() / size.median()).item()

        return before

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    forward()
    for handle in handles:
        handle.remove()
    return ratios


def count_small(
    model: nn.Module, layers: Layers, chosen: Layers, forward: Callable[[], torch.Tensor]
) -> tuple[Row, Pairs]:
    """One training step: counts over all layers, and what the chosen ones read and got back."""
    rank_space, gradients, pairs = RankSpace(), Numbers(), {}

    def keep(name: str) -> Callable[..., None]:
        def after(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.register_hook(lambda gradient: pairs.update({name: (inputs[0].detach(), gradient)}))

        return after

    handles = [layer.register_forward_hook(keep(name)) for name, layer in chosen.items()]
    for layer in layers.values():
        handles += [layer.register_forward_pre_hook(rank_space.before), layer.register_forward_hook(rank_space.after)]
    # What a native function writes is not seen; operators of torch compute the same numbers.
    with rank_space, mock.patch("mola.tuner.kernels.dispatch._choice", return_value="dense"):
        forward().backward()
    for handle in handles:
        handle.remove()
    finite = True
    for parameter in trainable_parameters(model):
        assert parameter.grad is not None  # mola's experts always have one, of zeros where no token chose them
        gradients.add(parameter.grad)
        finite &= bool(parameter.grad.isfinite().all())
    counted = rank_space.numbers.row("rank_space") | gradients.row("gradient") | {"finite_gradients": finite}
    return counted, [pairs[name] for name in chosen]


def _gaussian(tensor: torch.Tensor) -> torch.Tensor:
    """Normal numbers with the root mean square of another tensor's."""
    size = tensor.float().square().mean().sqrt()
    return (torch.randn_like(tensor, dtype=torch.float32) * size).to(tensor.dtype)


def _time(layers: list[MolaLinear], real: Pairs, ordinary: Pairs, case: Case, options: BenchmarkOptions) -> Row:
    """Seconds of two steps of the layers on either input; in every round the order is real, other, other, real."""
    actions = {"real": _make_step(layers, real, case), "gaussian": _make_step(layers, ordinary, case)}
    times = time_interleaved(actions, 2 * options.repeats, 2 * options.warmup, case.device)
    folded = {
        name: Times(_fold(each.cpu_seconds), _fold(each.wall_seconds), _fold(each.device_seconds))
        for name, each in times.items()
    }
    seconds = {f"{name}_{key}": value for name, each in folded.items() for key, value in each.row().items()}
    return seconds | {"real_over_gaussian": ratio(folded["real"], folded["gaussian"]), "timed_linears": len(layers)}


def _fold(samples: list[float]) -> list[float]:
    return [first + second for first, second in zip(samples[::2], samples[1::2], strict=True)]


def _make_step(layers: list[MolaLinear], pairs: Pairs, case: Case) -> Callable[[], None]:
    """Forward and backward pass of single layers."""
    inputs = [x.clone().requires_grad_() for x, _ in pairs]

    def step() -> None:
        for layer, x, (_, gradient) in zip(layers, inputs, pairs, strict=True):
            for tensor in (x, *layer.parameters()):
                tensor.grad = None
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=case.dtype == "bfloat16"):
                output = layer(x)
            output.backward(gradient)

    return step


def error_left(layer: MolaLinear, x: torch.Tensor) -> float:
    """Error after some steps over that at the start, when fresh experts learn what those of a layer add.

    Squared, and of each token relative to what is to be added to it, so that no token counts more than others.
    Float32, without dropout, the same input in every step.
    """
    teacher = copy.deepcopy(layer).float().eval()
    x = x.detach().float()
    with torch.no_grad():
        target = teacher(x)
        size = (target - teacher.base_layer(x)).square().sum(-1, keepdim=True)
    student = copy.deepcopy(teacher)
    torch.manual_seed(0)
    student.reset_parameters(student.active_adapters[0])
    optimizer = torch.optim.AdamW(trainable_parameters(student), lr=LEARNING_RATE)
    errors = []
    for _ in range(TRAINING_STEPS + 1):
        optimizer.zero_grad()
        error = ((student(x) - target).square() / size).mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    return errors[-1] / errors[0]
