"""A layer's gradients where PyTorch is told to do something of its own around it."""

import functools
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mola.tuner import MolaLinear
from mola.tuner.kernels import dispatch
from mola.tuner.kernels.autograd import compute
from mola.tuner.layer import ExpertSettings

MM, ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
SHAPES = {"usual": (64, 4), "no vectors": (60, 4), "many experts": (60, 32)}  # features, experts: different backends


@pytest.fixture
def used(monkeypatch):
    """Names of the backends that have computed a layer."""
    names = []
    monkeypatch.setattr(dispatch, "compute", lambda *arguments: names.append(arguments[0].name) or compute(*arguments))
    return names


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def layer(request):
    features, num_experts = request.param
    torch.manual_seed(0)
    settings = ExpertSettings(num_experts, 4, 2, 8.0, init_lora_weights=False)
    return MolaLinear(nn.Linear(features, 96).requires_grad_(False), "default", settings).train()


def gradients(layer, call, around_backward=nullcontext):
    """Output and gradients of input and experts, where `call` computes the layer."""
    x = torch.randn(3, 40, layer.in_features, generator=torch.Generator().manual_seed(1)).requires_grad_()
    output = call(x)
    loss = (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum()
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    with around_backward():
        return [output, *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("kept", [[MM], [MM, ADDMM]], ids=["mm", "mm, addmm"])
def test_selective_checkpointing_gives_the_same_gradients(layer, kept, used):
    """It keeps products, and gives them back as they are: a backend that adds to one would do so twice."""
    expected = gradients(layer, layer)
    assert "reference" not in used
    used.clear()
    context = functools.partial(create_selective_checkpoint_contexts, kept)
    found = gradients(layer, lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=context))
    assert used == ["reference"] * 2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_backward_pass_under_autocast_is_in_the_formats_of_the_forward_pass(layer):
    found = gradients(layer, layer, lambda: torch.autocast("cpu", torch.bfloat16))
    torch.testing.assert_close(found, gradients(layer, layer), atol=1e-4, rtol=1e-4)
