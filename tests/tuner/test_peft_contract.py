"""What PEFT's own tests ask of every method; `make test-peft` runs those themselves."""

import copy
import io
import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification

from mola import MolaConfig, MolaError, MolaLinear

from ..versions import needs
from .models import clone, random_config, tiny_llama, token_batch


class TwoLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(6, 5)
        self.lin1 = nn.Linear(5, 3)

    def forward(self, x):
        return self.lin1(torch.relu(self.lin0(x)))


def config(num_experts=1, **options):
    defaults = {"num_experts": num_experts, "top_k": 1, "r": 2, "init_lora_weights": False}
    return MolaConfig(**{**defaults, "target_modules": ["lin0", "lin1"], **options})


def adapted(**options):
    torch.manual_seed(0)
    return get_peft_model(TwoLinears(), config(**options)).eval()


def layers(model):
    return [module for module in model.modules() if isinstance(module, MolaLinear)]


# ---------------------------------------------------------------------- merging


def test_switched_off_adapters_leave_no_trace_of_a_merged_one():
    model, x = adapted(), torch.randn(4, 6)
    with model.disable_adapter():
        plain = model(x)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain)


def test_a_mixture_is_refused_by_the_layer_too():
    layer = layers(adapted(num_experts=3, top_k=2))[0]
    with pytest.raises(MolaError, match="cannot be merged: this module has 3 experts"):
        layer.merge()
    with pytest.raises(MolaError, match="3 experts"):
        layer.get_delta_weight("default")
    assert not layer.supports_lora_conversion()
    assert layers(adapted())[0].supports_lora_conversion()


def test_a_base_weight_that_is_no_plain_number_is_not_merged():
    layer = layers(adapted())[0]
    layer.base_layer.weight = nn.Parameter(torch.zeros(5, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(MolaError, match="needs a plain floating-point base weight.*without quantisation"):
        layer.merge()


def test_the_logits_of_one_expert_are_refused():
    with pytest.raises(MolaError, match="has no router in this module, which has only one"):
        layers(adapted())[0].router_logits("default", torch.zeros(1, 6))


def test_names_of_no_adapter_are_refused():
    model = adapted()
    for ask in (layers(model)[0].router_logits, layers(model)[0].route):
        with pytest.raises(MolaError, match="`adapter_name` must be one of default in this module: got 'other'"):
            ask("other", torch.zeros(1, 6))
    with pytest.raises(MolaError, match="`adapter_name` must be one of default: got 'other'"):
        model.get_balance_loss("other")


def test_a_broken_adapter_is_not_merged_safely():
    model = adapted()
    with torch.no_grad():
        model.base_model.model.lin0.mola_A["default"][0, 0] = torch.nan
    weight = model.base_model.model.lin0.base_layer.weight.clone()
    with pytest.raises(MolaError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(model.base_model.model.lin0.base_layer.weight, weight)


def test_the_adapters_that_are_merged_decide_whether_it_is_possible():
    """Not the active ones: a named mixture is refused before the first layer, named LoRA beside a mixture merges."""
    base = tiny_llama(num_layers=2)
    model = get_peft_model(clone(base), random_config(num_experts=1), adapter_name="lora")
    model.add_adapter("mixture", random_config(num_experts=[1, 2], top_k=1))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MolaError, match="'mixture' cannot be merged.*2 experts"):
            merge(adapter_names=["mixture"])
    assert not any(layer.merged for layer in layers(model))
    model.set_adapter("mixture")
    model.merge_adapter(adapter_names=["lora"])
    assert all(layer.merged_adapters == ["lora"] for layer in layers(model))


@pytest.mark.parametrize("name", ["save_pretrained_merged", "save_pretrained_gguf"])
def test_merged_files_of_other_programs_are_refused(name, tmp_path):
    """They hang on the base model, and PEFT passes calls on to it."""
    base = tiny_llama(num_layers=2)
    setattr(base, name, lambda folder: folder.mkdir())
    with pytest.raises(MolaError, match="cannot hold a mixture"):
        getattr(get_peft_model(base, random_config(num_experts=2)), name)(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_modules_without_the_adapter_are_passed_over_in_merging():
    model = get_peft_model(tiny_llama(num_layers=2), random_config(num_experts=1))
    model.add_adapter("narrow", random_config(num_experts=1, target_modules=["q_proj"]))
    model.merge_adapter(adapter_names=["narrow"])
    assert sum(layer.merged_adapters == ["narrow"] for layer in layers(model)) == 2


# ---------------------------------------------------------------------- what the model is


def test_a_model_without_layers_takes_one_number():
    assert layers(adapted(num_experts=[2]))[0].num_experts["default"] == 2
    with pytest.raises(MolaError, match="2 entries.*1 layer"):
        adapted(num_experts=[2, 2])


def test_the_kind_of_model_stays_where_the_model_does_not_say_it():
    assert adapted(base_model_type="llama").peft_config["default"].base_model_type == "llama"
    assert get_peft_model(tiny_llama(), random_config()).peft_config["default"].base_model_type == "llama"


# ---------------------------------------------------------------------- dtypes


def test_casting_of_the_input_can_be_switched_off():
    """For programs that keep weights in half precision and cast them in hooks, layer by layer."""
    model = adapted(num_experts=3, top_k=2, target_modules=["lin0"])
    layer, x = model.base_model.model.lin0, torch.randn(4, 6)
    expected = layer(x)
    stored = {name: p for name, p in layer.named_parameters() if "mola_A" in name or "mola_B" in name}
    with torch.no_grad():
        for parameter in stored.values():
            parameter.data = parameter.data.half().float()
        rounded = layer(x)
        for parameter in stored.values():
            parameter.data = parameter.data.half()
        assert not torch.equal(layer(x), rounded)  # the input is cast to half precision as well
        with disable_input_dtype_casting(model):
            for parameter in stored.values():
                parameter.data = parameter.data.float()
            assert torch.equal(layer(x), rounded)
    torch.testing.assert_close(rounded, expected, rtol=1e-2, atol=1e-2)
    assert layer.cast_input_dtype_enabled


# ---------------------------------------------------------------------- copies of an adapter


def test_the_reference_of_preference_trainers_starts_as_a_copy():
    """TRL adds "ref" with the very configuration object of the trained adapter."""
    model = adapted(num_experts=3, top_k=2)
    model.add_adapter("ref", model.peft_config["default"])
    model.add_adapter("fresh", config(num_experts=3, top_k=2))
    for layer in layers(model):
        for tensors in (layer.mola_A, layer.mola_B, layer.mola_router):
            assert torch.equal(tensors["ref"], tensors["default"])
            assert not torch.equal(tensors["fresh"], tensors["default"])


def test_the_reference_is_as_exact_as_the_adapter_on_a_base_in_half_precision():
    model = get_peft_model(TwoLinears().bfloat16(), config(num_experts=3, top_k=2))
    for layer in layers(model):
        for tensors in (layer.mola_A, layer.mola_B):
            tensors["default"].data += 1e-4 * torch.randn_like(tensors["default"])
    model.add_adapter("ref", model.peft_config["default"])
    for layer in layers(model):
        for tensors in (layer.mola_A, layer.mola_B, layer.mola_router):
            assert torch.equal(tensors["ref"], tensors["default"])
            assert not tensors["ref"].requires_grad


# ---------------------------------------------------------------------- heads of a task


@pytest.mark.parametrize(
    ("task_type", "model_class", "head"),
    [("TOKEN_CLS", BertForTokenClassification, "classifier"), ("QUESTION_ANS", BertForQuestionAnswering, "qa_outputs")],
)
def test_the_head_of_a_task_is_trained_and_saved(task_type, model_class, head, tmp_path):
    torch.manual_seed(0)
    bert = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=32, num_labels=2
    )
    base = model_class(bert)
    settings = MolaConfig(task_type=task_type, num_experts=[2, 3], r=2, init_lora_weights=False)
    model = get_peft_model(clone(base), settings).eval()
    model.add_adapter("second", MolaConfig(task_type=task_type, num_experts=2, r=2))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(f"{head}.modules_to_save.default" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"{head}.modules_to_save.default" in name:
                parameter.add_(1.0)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    loaded = PeftModel.from_pretrained(clone(base), tmp_path).eval()
    torch.testing.assert_close(loaded(**inputs)[0], model(**inputs)[0])
    assert head in loaded.peft_config["default"].modules_to_save


def test_mixtures_are_not_added_up():
    model = adapted(num_experts=3, top_k=2)
    model.add_adapter("second", config(num_experts=3, top_k=2))
    with pytest.raises(MolaError, match="cannot combine mixtures"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")


# ---------------------------------------------------------------------- copies, numbers, modules trained in full


def test_a_part_of_a_model_is_copied_without_the_rest_and_a_copied_model_has_its_losses():
    model = get_peft_model(tiny_llama(), random_config(router_aux_loss_coef=0.5)).train()
    part = model.base_model.model.model.layers[0]
    whole = sum(parameter.numel() for parameter in model.parameters())
    held = io.BytesIO()
    torch.save(part, held)
    assert len(held.getvalue()) < 4 * whole / 2, "one of three layers, and no embeddings"
    batch = token_batch()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(0)
        expected = model(**batch).loss
        torch.manual_seed(0)
        torch.testing.assert_close(other(**batch).loss, expected)
        torch.testing.assert_close(other.get_balance_loss(), model.get_balance_loss())


def test_a_copied_configuration_adapts_the_same_linears():
    config = MolaConfig(target_parameters=["mlp.experts.down_proj"])
    assert replace(config, r=16).target_modules is None
    assert MolaConfig(**{**config.to_dict(), "r": 16}).target_modules is None


def test_numbers_of_numpy_and_ranges_are_saved(tmp_path):
    config = MolaConfig(
        num_experts_pattern={"q_proj": np.int64(3)},
        alpha_pattern={"q_proj": np.float32(0.5)},
        layers_to_transform=range(2),
        target_modules=["q_proj"],
    )
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["num_experts_pattern"], saved["alpha_pattern"]) == ({"q_proj": 3}, {"q_proj": 0.5})
    assert saved["layers_to_transform"] == [0, 1]


def test_a_lone_name_of_a_module_to_save_is_one():
    assert MolaConfig(modules_to_save="lm_head").modules_to_save == ["lm_head"]
    with pytest.raises(MolaError, match="`modules_to_save` must be a list of names: got 3"):
        MolaConfig(modules_to_save=3)


def test_a_saved_module_of_another_adapter_is_not_adapted():
    model = get_peft_model(tiny_llama(), random_config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(MolaError, match="lm_head"):
        model.add_adapter("second", random_config(target_modules=["q_proj", "lm_head"]))
    fresh = get_peft_model(tiny_llama(), random_config(target_modules=["q_proj"], modules_to_save=["up_proj"]))
    fresh.add_adapter("second", random_config(target_modules="all-linear"))
    adapted = {name.rpartition(".")[2] for name, module in fresh.named_modules() if isinstance(module, MolaLinear)}
    assert "q_proj" in adapted
    assert not adapted & {"up_proj", "default", "original_module"}


def test_two_files_of_weights_are_refused(tmp_path):
    model = get_peft_model(tiny_llama(), random_config())
    model.save_pretrained(tmp_path)
    with pytest.raises(MolaError, match="must be a folder with one file of weights"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(MolaError, match="Remove the older one"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("config", [None, SimpleNamespace(hidden_size=4)])
def test_a_model_with_a_configuration_of_its_own(config):
    net = nn.Sequential(nn.Linear(4, 4))
    net.config = config
    model = get_peft_model(net, MolaConfig(num_experts=2, target_modules=["0"]))
    assert isinstance(model.base_model.model[0], MolaLinear)
    net = nn.Sequential(nn.Linear(4, 4))
    net.config = config
    one = get_peft_model(net, MolaConfig(num_experts=1, target_modules=["0"]))
    assert isinstance(one.merge_and_unload()[0], nn.Linear)


@needs("peft", "0.19", "older versions do not ask a whole model")
def test_a_mixture_of_any_name_is_no_lora():
    model = get_peft_model(tiny_llama(), random_config(num_experts=4), adapter_name="mix")
    assert not model.supports_lora_conversion()
    assert get_peft_model(tiny_llama(), random_config(num_experts=1), adapter_name="one").supports_lora_conversion()


# ---------------------------------------------------------------------- modules that are trained in full


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 5)
        self.router = nn.Linear(5, 6)

    def forward(self, x):
        return self.router(torch.relu(self.up(x)))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.last = nn.Linear(4, 6), Block(), Block(), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.third(self.second(self.first(x))))


def test_a_router_of_the_base_model_is_trained_in_full(tmp_path):
    """Not ours, whose names end alike."""
    settings = {"target_modules": ["first", "last"], "modules_to_save": ["router"], "r": 2}
    model = get_peft_model(Blocks(), MolaConfig(num_experts=2, **settings))
    saved = [name for name, _ in model.named_parameters() if "modules_to_save" in name]
    assert saved == [
        f"base_model.model.{place}.router.modules_to_save.default.{part}"
        for place in ("second", "third")
        for part in ("weight", "bias")
    ]
    model.save_pretrained(tmp_path)
    loaded, x = PeftModel.from_pretrained(Blocks(), tmp_path), torch.randn(3, 4)
    base = {name: each for name, each in model.state_dict().items() if "mola_" not in name and "to_save" not in name}
    loaded.load_state_dict(base, strict=False)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))


def test_modules_to_save_must_exist():
    with pytest.raises(MolaError, match="`modules_to_save` must all exist in the model, these do not: lats"):
        get_peft_model(Blocks(), MolaConfig(num_experts=2, r=2, target_modules=["first"], modules_to_save=["lats"]))


def test_linears_inside_a_saved_module_of_another_adapter_are_refused():
    first = MolaConfig(num_experts=2, r=2, target_modules=["first"], modules_to_save=["second"])
    model = get_peft_model(Blocks(), first)
    with pytest.raises(MolaError, match=r"`target_modules` matches 'second.*up', which lies in 'second'"):
        model.add_adapter("other", MolaConfig(num_experts=2, r=2, target_modules=["first", "up"]))


def test_an_adapter_that_peft_refuses_leaves_nothing_behind(tmp_path):
    torch.manual_seed(0)
    base = tiny_llama()
    model = get_peft_model(clone(base), random_config())
    with pytest.raises(ValueError, match="typo"):
        model.add_adapter("late", random_config(trainable_token_indices={"typo": [1]}))
    assert not [name for name, _ in model.named_parameters() if "late" in name]
    model.save_pretrained(tmp_path)
    batch = token_batch()
    again = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(again.eval()(**batch).logits, model.eval()(**batch).logits)


@needs("peft", "0.21", "before, nobody is asked what is saved")
def test_an_adapter_called_like_a_module_is_not_saved(tmp_path):
    torch.manual_seed(0)
    for name in ("one", "two"):
        adapted().save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(TwoLinears(), tmp_path / "one")
    model.load_adapter(tmp_path / "two", "lin0")
    with pytest.raises(MolaError, match="cannot be called 'lin0'"):
        model.save_pretrained(tmp_path / "again")


def test_unloading_restores_a_packed_linear_without_a_weight():
    """As those of GPTQ."""
    model = adapted()
    for layer in layers(model):
        del layer.base_layer.weight
    assert [type(each) for each in model.unload().children()] == [nn.Linear, nn.Linear]
