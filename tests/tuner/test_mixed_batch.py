"""Rows of one batch with different adapters: each as with its adapter alone."""

import itertools
import random
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    GenerationConfig,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mola import MolaConfig, MolaError, MolaLinear
from mola.insight.recorder import recorded_gates
from mola.tuner.kernels.cpu import decode as cpu_decode

from ..versions import needs
from .kernels.native import needs_numba
from .models import random_config, tiny_llama, token_batch

BASE = "__base__"
# Mixtures of other shapes in every layer; some have one expert, some leave modules alone.
ADAPTERS = {
    "growing": {"num_experts": [1, 2, 3, 4], "top_k": [1, 1, 2, 3], "r": [2, 3, 4, 5], "lora_alpha": 3},
    "narrow": {"num_experts": 2, "top_k": 1, "r": 8, "target_modules": ["q_proj", "down_proj"]},
    "single": {"num_experts": 1, "top_k": 1, "r": 3, "lora_alpha": 2},
    "wide": {"num_experts": 6, "top_k": 2, "r": 2, "use_rslora": True, "lora_alpha": 2, "lora_dropout": 0.5},
}
NAMES = [BASE, *ADAPTERS]


def several(adapters=ADAPTERS, dtype=torch.float32, **options):
    """A tiny model with adapters, in eval mode; the first one is active."""
    base = tiny_llama().to(dtype)
    model = None
    for name, settings in adapters.items():
        config = random_config(**{**settings, **options})
        if model is None:
            model = get_peft_model(base, config, adapter_name=name, autocast_adapter_dtype=dtype != torch.float64)
        else:
            model.add_adapter(name, config)
    return model.to(dtype) if dtype == torch.float64 else model.eval()


@pytest.fixture(scope="module")
def model():
    return several()


@torch.no_grad()
def alone(model, name, call):
    """What `call(model)` gives with one adapter."""
    active = model.active_adapter
    if name != BASE:
        model.set_adapter(name)
    with model.disable_adapter() if name == BASE else nullcontext():
        found = call(model)
    model.set_adapter(active)
    return found


@torch.no_grad()
def largest_difference(model, inputs, names):
    """Between logits of a mixed batch and those of each adapter alone on its rows, as a share of the largest."""
    mixed = model(**inputs, adapter_names=names).logits
    differences = []
    for name in set(names):
        rows = [row for row, own in enumerate(names) if own == name]
        expected = alone(model, name, lambda model, rows=rows: model(**{k: v[rows] for k, v in inputs.items()}).logits)
        counted = inputs["attention_mask"][rows].bool()
        differences.append(((mixed[rows] - expected)[counted].abs().max() / expected[counted].abs().max()).item())
    return torch.tensor(differences).max().item()  # which passes on what is no number


def draw(seed, rows):
    return random.Random(seed).choices(NAMES, k=rows)


def prompts(rows, length=6, padding=2, seed=1):
    """Left-padded prompts."""
    batch = token_batch(rows, length, seed=seed)
    mask = batch["attention_mask"]
    mask[::2, :padding] = 0
    return {"input_ids": batch["input_ids"].masked_fill(mask == 0, 0), "attention_mask": mask}


def assert_untouched(model):
    modules = list(model.modules())
    assert all(module.mixed_batch is None for module in modules if isinstance(module, MolaLinear))
    assert not any(module._forward_pre_hooks for module in modules if hasattr(module, "_mixed_batch_forward"))


# ---------------------------------------------------------------------- the same as alone


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_as_with_their_adapter_alone(model, seed):
    rows = 3 + 2 * seed
    names = draw(seed, rows)
    assert largest_difference(model, token_batch(rows, padding=2, seed=seed), names) < 1e-5
    assert model.active_adapter == "growing"
    assert_untouched(model)


def test_a_model_that_passes_some_layers_all_tokens_in_one_dimension():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 4}
    base = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=24))
    targets = ["q_proj", "up_proj", "shared_expert_gate"]
    model = get_peft_model(base, random_config(num_experts=2, target_modules=targets), adapter_name="first")
    model.add_adapter("second", random_config(num_experts=3, r=2, target_modules=targets))
    assert any("shared_expert." in name for name, each in model.named_modules() if isinstance(each, MolaLinear))
    model.eval()
    names = ["second", BASE, "first", "second"]
    assert largest_difference(model, token_batch(4), names) < 1e-5
    one_token = {name: value[:, :1] for name, value in token_batch(4).items()}
    assert largest_difference(model, one_token, names) < 1e-5
    with pytest.raises(MolaError, match="should be the same as the number of inputs"):
        model(**token_batch(3), adapter_names=names)


def test_in_float64_all_digits_are_the_same():
    model = several(dtype=torch.float64).eval()
    assert largest_difference(model, token_batch(9, padding=2), draw(0, 9)) < 1e-14


@pytest.mark.parametrize("backend", ["reference", "dense", "decode"])
def test_with_every_kind_of_backend(model, force, backend):
    force(backend)
    with torch.no_grad():
        assert largest_difference(model, token_batch(5), NAMES) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("way", [pytest.param("native", marks=needs_numba), "torch"])
def test_few_tokens(way, length, dtype, monkeypatch):
    model = several(dtype=dtype)
    if way == "torch":
        monkeypatch.setattr(cpu_decode, "_kernel", lambda *dtypes: None)
    inputs = token_batch(7, length)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for seed in range(2):
        assert largest_difference(model, inputs, draw(seed, 7)) < tolerance


@needs_numba
def test_few_tokens_under_another_default_dtype(model):
    # Others may load a model meanwhile, for which Transformers changes the default of all threads.
    names = ["wide", "narrow", BASE, "narrow", "wide"]  # none with one expert: these would take another way
    inputs = {name: values[:, :4] for name, values in token_batch(5).items()}
    with torch.no_grad():
        expected = model(**inputs, adapter_names=names).logits
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = model(**inputs, adapter_names=names).logits
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected)


@needs_numba
def test_few_tokens_are_one_native_call(model, monkeypatch):
    expected = model(**token_batch(5), adapter_names=NAMES).logits
    monkeypatch.setattr(MolaLinear, "add_expert_output", None)
    with torch.no_grad():
        found = model(**{name: values[:, :4] for name, values in token_batch(5).items()}, adapter_names=NAMES).logits
    torch.testing.assert_close(found, expected[:, :4], atol=1e-5, rtol=1e-5)


def test_adapters_differ_in_this_model(model):
    inputs = token_batch(2)
    found = [alone(model, name, lambda model: model(**inputs).logits) for name in NAMES]
    assert all((one - other).abs().max() > 1e-2 for one, other in itertools.combinations(found, 2))


def test_gradients_of_the_input_are_those_of_each_row(model):
    embedded = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    names = ["wide", BASE, "narrow"]

    def gradient(rows, **options):
        inputs = embedded[rows].clone().requires_grad_()
        model(inputs_embeds=inputs, **options).logits.square().sum().backward()
        return inputs.grad

    mixed = gradient([0, 1, 2], adapter_names=names)
    for row, name in enumerate(names):
        if name != BASE:
            model.set_adapter(name)
        with model.disable_adapter() if name == BASE else nullcontext():
            expected = gradient([row])
        torch.testing.assert_close(mixed[row : row + 1], expected, atol=1e-4, rtol=1e-4)
    model.set_adapter("growing")
    model.zero_grad()


# ---------------------------------------------------------------------- text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=6, eos_token_id=None, pad_token_id=0)},
    ],
)
def test_generated_text_is_that_of_each_adapter(model, options):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    if "generation_config" in options:
        settings = options
    inputs, names = prompts(7), draw(2, 7)
    returned = options.get("num_return_sequences", 1)
    mixed = model.generate(**inputs, adapter_names=names, **settings).unflatten(0, (7, returned))
    differ = False
    for name in set(names):
        rows = [row for row, own in enumerate(names) if own == name]
        expected = alone(model, name, lambda model: model.generate(**inputs, **settings))
        expected = expected.unflatten(0, (7, returned))
        assert torch.equal(mixed[rows], expected[rows])
        differ = differ or not torch.equal(mixed, expected)
    assert differ
    assert_untouched(model)


def test_sampling_several_sequences_of_one_row(model):
    settings = {"max_new_tokens": 3, "do_sample": True, "num_return_sequences": 3, "pad_token_id": 0}
    assert len(model.generate(**prompts(2), adapter_names=["wide", BASE], **settings)) == 6


def test_beams_of_a_models_own_configuration():
    model = several({"wide": ADAPTERS["wide"]})
    model.generation_config.num_beams = 3
    settings = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
    mixed = model.generate(**prompts(2), adapter_names=["wide", BASE], **settings)
    assert torch.equal(mixed[:1], model.generate(**prompts(2), **settings)[:1])
    asked = {"generation_config": GenerationConfig(**settings)}  # which leaves beams to the model, or has one
    mixed = model.generate(**prompts(2), adapter_names=["wide", BASE], **asked)
    assert torch.equal(mixed[:1], model.generate(**prompts(2), **asked)[:1])


def test_encoder_and_decoder_with_beams():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    settings = {"init_lora_weights": False, "task_type": "SEQ_2_SEQ_LM", "r": 8, "lora_alpha": 128}
    model = get_peft_model(base, MolaConfig(num_experts=[2, 3, 4, 1], top_k=1, **settings), adapter_name="one")
    model.add_adapter("two", MolaConfig(num_experts=2, top_k=2, **settings))
    model.eval()
    inputs, names = prompts(6), ["two", BASE, "one"] * 2
    options = {"num_beams": 3, "max_new_tokens": 5}
    mixed = model.generate(**inputs, adapter_names=names, **options)
    for row, name in enumerate(names):
        assert torch.equal(mixed[row], alone(model, name, lambda model: model.generate(**inputs, **options))[row])


# ---------------------------------------------------------------------- what else an adapter trains


def filled(model, part):
    """Give what adapters train in full other values, each its own."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.data += torch.randn(parameter.shape, generator=generator)
    return model


adds_saved_modules = needs("peft", "0.19", "0.18 looks for tied modules in what other adapters saved, and fails")


@adds_saved_modules
@pytest.mark.parametrize("active", ["growing", "narrow"])
def test_modules_to_save_of_some_adapters(active):
    adapters = {
        "growing": ADAPTERS["growing"],
        "narrow": {**ADAPTERS["narrow"], "modules_to_save": ["lm_head"]},
        "wide": {**ADAPTERS["wide"], "modules_to_save": ["lm_head", "embed_tokens"]},
    }
    model = filled(several(adapters), "modules_to_save")
    model.set_adapter(active)
    names = ["wide", BASE, "narrow", "growing", "wide", "narrow"]
    assert largest_difference(model, token_batch(6), names) < 1e-5
    assert model.active_adapter == active
    assert_untouched(model)


@pytest.mark.filterwarnings("ignore:The model contains some adapter layers that are enabled")  # of PEFT 0.18
@pytest.mark.parametrize("active", ["growing", "narrow"])
def test_a_module_that_one_adapter_saves(active):
    """PEFT 0.18 switches what it saves off where another adapter is the active one."""
    adapters = {"growing": ADAPTERS["growing"], "narrow": {**ADAPTERS["narrow"], "modules_to_save": ["lm_head"]}}
    model = filled(several(adapters), "modules_to_save")
    model.set_adapter(active)
    assert largest_difference(model, token_batch(4), ["narrow", BASE, "growing", "narrow"]) < 1e-5
    assert model.active_adapter == active
    assert_untouched(model)


@adds_saved_modules
@pytest.mark.parametrize("active", ["growing", "wide"])
def test_trainable_tokens_of_some_adapters(active):
    adapters = {
        "growing": ADAPTERS["growing"],
        "narrow": {**ADAPTERS["narrow"], "trainable_token_indices": {"embed_tokens": [3, 4, 5, 6, 7, 8, 9]}},
        "wide": {**ADAPTERS["wide"], "trainable_token_indices": {"embed_tokens": [10, 11, 12]}},
    }
    model = filled(several(adapters), "trainable_tokens_delta")
    model.set_adapter(active)
    inputs = token_batch(6)
    inputs["input_ids"] %= 16
    assert largest_difference(model, inputs, ["wide", BASE, "narrow", "growing", "wide", "narrow"]) < 1e-5


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["wide", "wide"], "Length of `adapter_names` .* got 2 and 3 respectively"),
        ([], "Length of `adapter_names` .* got 0 and 3"),
        (["wide"] * 6, "Length of `adapter_names` .* got 6 and 3"),
        (["wide", "typo", "other"], "non-existing adapter.*: other, typo"),
        ("wide", "non-existing adapter.*: d, e, i, w"),
        (["wide", None, BASE], "non-existing adapter.*: None"),
    ],
)
def test_names_that_do_not_fit_the_batch(model, names, message):
    inputs = token_batch(3)
    with pytest.raises(MolaError, match=message):
        model(**inputs, adapter_names=names)
    assert_untouched(model)
    assert torch.isfinite(model(**inputs).logits).all()


def test_only_so_many_rows_as_beams():
    model = several({"wide": ADAPTERS["wide"]})
    with pytest.raises(MolaError, match="got 2 and 6"):
        model(**token_batch(6), adapter_names=["wide"] * 2)


def test_training_mode_is_refused(model):
    model.train()
    try:
        with pytest.raises(MolaError, match="training mode"):
            model(**token_batch(3), adapter_names=["wide"] * 3)
    finally:
        model.eval()
    assert_untouched(model)


def test_merged_adapters_are_refused():
    model = several({"single": ADAPTERS["single"], "wide": ADAPTERS["wide"]})
    model.merge_adapter(["single"])
    with pytest.raises(MolaError, match="unmerge_adapter"):
        model(**token_batch(3), adapter_names=["wide"] * 3)
    model.unmerge_adapter()
    assert largest_difference(model, token_batch(3), ["wide", "single", BASE]) < 1e-5


def test_switched_off_adapters_stay_off(model):
    inputs = token_batch(3)
    with model.disable_adapter():
        assert torch.equal(model(**inputs, adapter_names=["wide"] * 3).logits, model(**inputs).logits)


def test_an_error_in_a_layer_leaves_no_trace():
    model = filled(several({"wide": {**ADAPTERS["wide"], "modules_to_save": ["lm_head"]}}), "modules_to_save")

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = model.base_model.model.model.layers[2].register_forward_hook(fail)
    for call, options in ((model, {}), (model.generate, {"max_new_tokens": 2, "pad_token_id": 0})):
        with pytest.raises(RuntimeError, match="in the middle"):
            call(**prompts(2), adapter_names=["wide", BASE], **options)
    handle.remove()
    assert_untouched(model)


def test_gates_are_recorded_of_one_adapter_at_a_time(model):
    with recorded_gates(model), pytest.raises(MolaError, match="one adapter at a time"):
        model(**token_batch(2), adapter_names=["wide", BASE])
    assert_untouched(model)


def test_a_layer_that_passes_further_arguments_on():
    class Scaled(nn.Linear):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = Scaled(6, 5)

        def forward(self, x, scale=1.0):
            return self.lin(x, scale=scale)

    config = MolaConfig(target_modules=["lin"], num_experts=3, top_k=2, r=2, init_lora_weights=False)
    model = get_peft_model(Block(), config, adapter_name="one").eval()
    model.add_adapter("two", config)
    x = torch.randn(4, 6)
    mixed = model(x, scale=3.0, adapter_names=["two", "one", BASE, "one"])
    for row, name in enumerate(["two", "one", BASE, "one"]):
        torch.testing.assert_close(mixed[row], alone(model, name, lambda model: model(x, scale=3.0))[row])


@needs("peft", "0.21", "before, trained biases are refused")
def test_an_adapter_that_trains_biases_is_refused_beside_others():
    adapters = {"changes": {"num_experts": 2, "bias": "all"}, "plain": {"num_experts": 2}}
    model, batch = several(adapters), token_batch()
    ids = batch["input_ids"][:2]
    for names in (["changes", BASE], ["plain", "plain"]):
        with pytest.raises(MolaError, match="with others: its `bias` changes the base model"):
            model(input_ids=ids, adapter_names=names)
    together = model(input_ids=ids, adapter_names=["changes", "changes"]).logits
    torch.testing.assert_close(together, model(input_ids=ids).logits)
