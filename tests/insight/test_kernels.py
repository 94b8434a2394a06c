"""Which kernel computes which layers: for real models, for shapes, and when one is forced."""

import pytest
import torch
from peft import get_peft_model

import mola
from mola import MolaError
from mola.insight.kernels import TOKENS, inputs_for_shapes, kernel_choices
from mola.tuner.kernels import dispatch
from mola.tuner.kernels.api import MixtureSettings
from tests.tuner.kernels.native import needs_numba
from tests.tuner.models import random_config, tiny_llama


@pytest.fixture
def model():
    return get_peft_model(tiny_llama(), random_config(num_experts="1248", lora_dropout=0.1))


def test_the_report_counts_every_module_in_both_modes(model):
    choices = mola.kernels_report(model)
    for mode in TOKENS:
        of_mode = [choice for choice in choices if choice.mode == mode]
        assert sum(choice.num_modules for choice in of_mode) == 28
        assert sorted({n for choice in of_mode for n in choice.num_experts}) == [1, 2, 4, 8]
        (lora,) = (choice for choice in of_mode if choice.backend == "lora")
        assert (lora.num_modules, lora.num_experts, lora.reasons) == (7, [1], {})


def test_the_reported_backends_are_those_that_compute(model, monkeypatch):
    select, used = dispatch.select, []
    monkeypatch.setattr(dispatch, "select", lambda inputs: used.append(select(inputs)) or used[-1])
    model.train()(input_ids=torch.randint(3, 60, (8, 64)))
    told = {choice.backend for choice in mola.kernels_report(model) if choice.mode == "training"}
    assert told == {backend.name for backend in used}


@needs_numba
def test_decoding_uses_its_own_kernels(model):
    choices = mola.kernels_report(model, modes=["decode"])
    assert {(choice.mode, choice.backend) for choice in choices} == {("decode", "lora"), ("decode", "cpu_decode")}


def test_the_report_gives_a_reason_for_each_unused_backend(model, monkeypatch):
    monkeypatch.setattr("mola.tuner.kernels.native.load", lambda name: None)
    training = [choice for choice in mola.kernels_report(model) if choice.mode == "training"]
    dense = [choice for choice in training if choice.backend == "dense"]
    assert {choice.backend for choice in training} == {"lora", "dense"}
    assert all(set(choice.reasons) == {"cpu_train", "grouped"} for choice in dense)
    assert any("not grouped: slower than dense for so few experts or tokens" in str(choice) for choice in dense)


def test_a_forced_kernel(model, force):
    force("reference")
    assert {choice.backend for choice in mola.kernels_report(model)} == {"lora", "reference"}
    force("decode")
    training = [choice for choice in mola.kernels_report(model) if choice.mode == "training"]
    (other,) = (choice for choice in training if choice.backend != "lora")
    assert (other.backend, other.num_experts) == ("none", [2, 4, 8])
    assert other.reasons == {"MOLA_KERNEL": "decode: only without gradients and without autocast"}
    force("tensor cores")
    with pytest.raises(MolaError, match="must be one of cpu_decode, lora, .*, got 'tensor cores'"):
        mola.kernels_report(model)


@pytest.mark.parametrize("modes", ["prefill", ["training", "prefill"], []])
def test_unknown_modes_are_refused(model, modes):
    assert mola.kernels_report(model, modes="training") == mola.kernels_report(model, modes=["training"])
    with pytest.raises(MolaError, match="`modes` must be one or several of training, decode"):
        mola.kernels_report(model, modes=modes)


def test_another_adapter_and_a_model_without_one(model):
    model.add_adapter("other", random_config(num_experts=3))
    choices = mola.kernels_report(model, "other")
    assert sum(choice.num_modules for choice in choices) == 2 * 28
    assert {tuple(choice.num_experts) for choice in choices} == {(3,)}
    with pytest.raises(MolaError, match="the adapter 'third'"):
        mola.kernels_report(model, "third")
    with pytest.raises(MolaError, match="an adapter of mola"):
        mola.kernels_report(tiny_llama())


def test_shapes_without_a_model():
    settings = MixtureSettings(2, 1.0, torch.float32, needs_router_output=False)
    calls = [("training", inputs_for_shapes("training", 64, 96, experts, 8, settings)) for experts in (1, 4, 4)]
    assert sum(choice.num_modules for choice in kernel_choices(calls)) == 3
    assert {choice.backend for choice in kernel_choices(calls)} > {"lora"}
