"""One expert is LoRA: same weights, outputs and gradients as PEFT's own layer, bit for bit."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from mola import MolaConfig
from tests.versions import needs


class Block(nn.Module):
    def __init__(self, kind, bias, features=(24, 40)):
        super().__init__()
        inner, outer = features
        if kind == "conv1d":
            self.proj = Conv1D(outer, inner)
        else:
            self.proj = nn.Linear(inner, outer, bias=bias)

    def forward(self, x):
        return self.proj(x)


def pair(kind="linear", bias=True, r=4, alpha=16.0, dropout=0.0, dtype=torch.float32, bias_option="none"):
    torch.manual_seed(0)
    block = Block(kind, bias).to(dtype)
    common = {"r": r, "lora_dropout": dropout, "target_modules": ["proj"]}
    lora = get_peft_model(
        copy.deepcopy(block),
        LoraConfig(
            lora_alpha=alpha,
            fan_in_fan_out=kind == "conv1d",
            bias=bias_option.replace("mola", "lora"),
            **common,
        ),
    )
    mola = get_peft_model(
        copy.deepcopy(block),
        MolaConfig(num_experts=1, top_k=1, lora_alpha=alpha, bias=bias_option, **common),
    )
    with torch.no_grad():
        ours, theirs = mola.base_model.model.proj, lora.base_model.model.proj
        theirs.lora_B["default"].weight.normal_()
        ours.mola_A["default"][0].copy_(theirs.lora_A["default"].weight)
        ours.mola_B["default"][0].copy_(theirs.lora_B["default"].weight.t())
    return mola, lora


def run(model, x, seed=1):
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    output = model(x)
    output.float().square().sum().backward()
    return output.detach(), x.grad


GRID = [  # each two values once together
    ("linear", True, (1, 16.0), 0.0),
    ("linear", False, (4, 1.0), 0.3),
    ("conv1d", True, (4, 1.0), 0.0),
    ("conv1d", False, (1, 16.0), 0.3),
]


@pytest.mark.parametrize(("kind", "bias", "r_and_alpha", "dropout"), GRID)
@pytest.mark.parametrize("shape", [(3, 7, 24), (5, 24)])
def test_outputs_and_gradients_are_identical(kind, bias, r_and_alpha, dropout, shape):
    mola, lora = pair(kind, bias, *r_and_alpha, dropout)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(run(mola.train(), x), run(lora.train(), x), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = mola.base_model.model.proj, lora.base_model.model.proj
    assert torch.equal(ours.mola_A["default"].grad[0], theirs.lora_A["default"].weight.grad)
    assert torch.equal(ours.mola_B["default"].grad[0].t(), theirs.lora_B["default"].weight.grad)
    assert "default" not in ours.mola_router


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_of_the_base_are_identical(dtype):
    mola, lora = pair(dtype=dtype)
    x = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    for ours, theirs in zip(run(mola, x), run(lora, x), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@needs("peft", "0.21", "it does not save trained biases")
def test_trainable_bias_gets_the_same_gradient():
    mola, lora = pair(bias_option="mola_only")
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    run(mola, x), run(lora, x)
    grads = [model.base_model.model.proj.base_layer.bias.grad for model in (mola, lora)]
    assert grads[0] is not None
    assert torch.equal(*grads)


def test_initial_values_are_those_of_lora():
    """Same range and the same start: B zero, A uniform within 1 / sqrt(in)."""
    torch.manual_seed(0)
    mola = get_peft_model(Block("linear", True), MolaConfig(num_experts=3, top_k=2, r=64, target_modules=["proj"]))
    layer = mola.base_model.model.proj
    for expert in layer.mola_A["default"]:
        assert 0.95 * 24**-0.5 < expert.abs().max() <= 24**-0.5
    assert layer.mola_router["default"].abs().max() <= 24**-0.5
    assert not layer.mola_B["default"].any()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merging_equals_lora(kind):
    mola, lora = pair(kind)
    x = torch.randn(3, 24)
    before = mola(x)
    merged = mola.merge_and_unload()
    assert isinstance(merged.proj, nn.Linear | Conv1D)
    assert torch.equal(merged.proj.weight, lora.merge_and_unload().proj.weight)
    torch.testing.assert_close(merged(x), before)


def test_unmerging_restores_the_output():
    mola, _ = pair()
    x = torch.randn(3, 24)
    before = mola(x)
    mola.merge_adapter()
    torch.testing.assert_close(mola(x), before)
    mola.unmerge_adapter()
    torch.testing.assert_close(mola(x), before)
