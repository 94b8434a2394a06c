"""Names, depth, and sizes of the linears to adapt, on small models of several architectures."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    WavLMConfig,
    WavLMModel,
)
from transformers.pytorch_utils import Conv1D

from mola.architecture.layer_names import count_layers, layer_index
from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.linears import is_adaptable, is_read_without_call
from mola.architecture.targets import (
    LLAMA_LINEARS,
    check_target_modules,
    default_target_modules,
    linear_shapes,
    resolve_target_modules,
)
from mola.errors import MolaError


def tiny_llama():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def tiny_gpt2():
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def names_of(model):
    return [name for name, _ in model.named_modules()]


# --- position and depth ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", 3),
        ("model.layers.12.mlp.experts.5.up_proj", 12),
        ("h.0", 0),
        ("base_model.model.transformer.h.10.attn.c_attn", 10),
        ("lm_head", None),
        ("model.layer3.fc1", None),
        ("", None),
    ],
)
def test_layer_index(name, expected):
    assert layer_index(name) == expected


@pytest.mark.parametrize(
    ("config", "names", "expected"),
    [
        ({"num_hidden_layers": 5}, ["layers.0"], 5),
        ({"n_layer": 6}, [], 6),
        ({"num_layers": 7}, [], 7),
        ({"text_config": {"num_hidden_layers": 8}}, [], 8),
        ({"num_hidden_layers": None, "text_config": {"n_layer": 9}}, [], 9),
        ({"text_config": None}, ["a.layers.0.b", "a.layers.10.b", "head"], 11),
        ({}, ["embed", "head"], None),
        ({}, [], None),
    ],
)
def test_count_layers(config, names, expected):
    assert count_layers(config, names) == expected


def test_count_layers_of_transformers_configs():
    assert count_layers(tiny_llama().config.to_dict(), []) == 3
    assert count_layers(tiny_gpt2().config.to_dict(), []) == 2


# --- defaults ----------------------------------------------------------------------------------


def test_defaults_are_the_seven_llama_linears():
    assert default_target_modules(names_of(tiny_llama()), "llama") == list(LLAMA_LINEARS)


def test_defaults_are_those_of_the_seven_that_exist():
    names = ["layers.0.v_proj", "layers.0.q_proj", "layers.0.fc1", "layers.0.not_k_proj"]
    assert default_target_modules(names, "anything") == ["q_proj", "v_proj"]


def test_defaults_come_from_peft_for_other_architectures():
    assert default_target_modules(names_of(tiny_gpt2()), "gpt2") == ["c_attn"]


@pytest.mark.parametrize("model_type", ["mystery", None, "gpt2"])
def test_no_default_names_the_modules_of_the_model(model_type):
    names = ["", "blocks", "blocks.0", "blocks.0.mixer_in", "blocks.0.norm1", "blocks.0.mixer_out"]
    with pytest.raises(MolaError, match=rf"{model_type!r}\. .* has: mixer_in, mixer_out\."):
        default_target_modules(names, model_type)


# --- what can be adapted -----------------------------------------------------------------------


class OwnLinear(nn.Linear):
    pass


class PackedLinear(nn.Module):
    """As quantised linears do: sizes as attributes, the weight in another form."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 6, 10
        self.register_buffer("packed", torch.zeros(30, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(2, 3), True),
        (OwnLinear(2, 3), True),
        (Conv1D(3, 2), True),
        (PackedLinear(), True),
        (nn.Embedding(2, 3), False),
        (nn.Conv1d(2, 3, 1), False),
        (nn.Conv2d(2, 3, 1), False),
        (nn.Conv3d(2, 3, 1), False),
        (nn.LayerNorm(3), False),
        (nn.Sequential(nn.Linear(2, 3)), False),
        (nn.Bilinear(2, 3, 4), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_adaptable(module, expected):
    assert is_adaptable(module) is expected


def test_wrapped_modules_count_by_their_base_layer():
    model = nn.ModuleDict({"linear": nn.Linear(4, 5), "table": nn.Embedding(4, 5)})
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["linear", "table"])).base_model.model
    assert is_adaptable(wrapped["linear"])
    assert not is_adaptable(wrapped["table"])


# --- checks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        {"q_proj", "down_proj"},
        ["self_attn.q_proj", "model.layers.0.mlp.up_proj"],
        ["lm_head"],
        r".*\.(q|v)_proj",
        "all-linear",
    ],
)
def test_good_targets_pass(targets):
    check_target_modules(tiny_llama(), targets)


def test_missing_names_are_listed_with_close_spellings():
    message = (
        r"these do not: ' v_proj' \(did you mean 'v_proj'\?\), 'zzz'\. Linears of this model: q_proj, k_proj, v_proj"
    )
    with pytest.raises(MolaError, match=message):
        check_target_modules(tiny_llama(), ["q_proj", " v_proj", "zzz"])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "got an empty list"),
        (["embed_tokens"], "matches 'model.embed_tokens' .Embedding"),
        (["q_proj", "input_layernorm"], "LlamaRMSNorm"),
        (r".*\.x_proj", "matches nothing"),
        (r".*\.0\..*", "matches 'model.layers.0.self_attn' .LlamaAttention"),
        ("q_proj", "For module names pass a list"),
        ("(q_proj", "must be a regular expression"),
    ],
)
def test_wrong_targets(targets, message):
    with pytest.raises(MolaError, match=message) as caught:
        check_target_modules(tiny_llama(), targets)
    assert "`target_modules`" in str(caught.value)


def test_excluded_modules_need_not_be_linears():
    targets, everything = ["mlp", "q_proj"], ["mlp", "q_proj"]
    check_target_modules(tiny_llama(), targets, exclude_modules=["mlp"])
    message = r"`exclude_modules` must leave something to adapt: \['mlp', 'q_proj'\] excludes everything that "
    with pytest.raises(MolaError, match=message + r"`target_modules` \['mlp', 'q_proj'\] matches"):
        check_target_modules(tiny_llama(), targets, exclude_modules=everything)
    with pytest.raises(MolaError, match=r"'\.\*q_proj' excludes everything that `target_modules` '\.\*q_proj' matches"):
        check_target_modules(tiny_llama(), r".*q_proj", exclude_modules=r".*q_proj")
    with pytest.raises(MolaError, match="`exclude_modules` as one string must be a regular expression"):
        check_target_modules(tiny_llama(), targets, exclude_modules="(")


def test_experts_of_the_base_in_one_parameter():
    model = nn.ModuleDict({"experts": nn.ParameterDict({"up": torch.zeros(5, 3, 2), "flat": torch.zeros(5, 3)})})
    model["gate"] = nn.Linear(2, 5)
    with pytest.raises(MolaError, match=r"'experts\.up' holds the weights of all 5 experts"):
        check_target_modules(model, ["up", "gate"])
    with pytest.raises(MolaError, match="these do not: 'flat'"):
        check_target_modules(model, ["flat", "gate"])


def test_model_without_linears():
    with pytest.raises(MolaError, match="'all-linear' finds no linear in this Embedding"):
        check_target_modules(nn.Embedding(2, 3), "all-linear")


def test_model_adapted_by_lora_is_seen_as_the_original():
    plain = tiny_llama()
    expected = linear_shapes(plain, "all-linear")
    wrapped = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"])).base_model.model
    assert linear_shapes(wrapped, "all-linear") == expected
    with pytest.raises(MolaError, match="these do not: 'lora_A'"):
        check_target_modules(wrapped, ["lora_A"])


# --- sizes -------------------------------------------------------------------------------------


def test_shapes_of_llama_in_order():
    shapes = linear_shapes(tiny_llama(), ["v_proj", "down_proj"])
    assert [(shape.name, shape.layer_index) for shape in shapes][:3] == [
        ("model.layers.0.self_attn.v_proj", 0),
        ("model.layers.0.mlp.down_proj", 0),
        ("model.layers.1.self_attn.v_proj", 1),
    ]
    assert [(shape.in_features, shape.out_features) for shape in shapes] == [(16, 8), (24, 16)] * 3


def test_shapes_of_conv1d_are_not_swapped():
    shapes = linear_shapes(tiny_gpt2(), ["c_attn", "mlp.c_proj"])
    assert [(shape.in_features, shape.out_features) for shape in shapes] == [(16, 48), (64, 16)] * 2


def test_shapes_of_packed_linears():
    model = nn.ModuleList([nn.ModuleDict({"fc": PackedLinear()})])
    (shape,) = linear_shapes(model, ["fc"])
    assert (shape.name, shape.layer_index, shape.in_features, shape.out_features) == ("0.fc", 0, 6, 10)


def test_all_linear_leaves_the_head_out():
    names = {shape.name.rpartition(".")[2] for shape in linear_shapes(tiny_llama(), "all-linear")}
    assert names == set(LLAMA_LINEARS)


def test_names_outside_the_layers_have_no_index():
    (shape,) = linear_shapes(tiny_llama(), ["lm_head"])
    assert shape.layer_index is None


@pytest.mark.parametrize("excluded", [["layers.1.self_attn.q_proj"], r".*\.1\..*"])
def test_excluded_modules_have_no_shape(excluded):
    shapes = linear_shapes(tiny_llama(), ["q_proj"], exclude_modules=excluded)
    assert [shape.layer_index for shape in shapes] == [0, 2]


def test_names_whose_modules_are_read_or_no_linears_are_no_default():
    """WavLM hands the weights of its attention to a function: experts there would do nothing."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = WavLMConfig(**sizes, conv_dim=(32,), conv_kernel=(10,), conv_stride=(5,), num_buckets=8)
    with torch.device("meta"):
        model = WavLMModel(config)
    with pytest.raises(MolaError, match="there is no default for model type 'wavlm'"):
        resolve_target_modules(model, LayerStacks.of(model), None)
    found = {each.name.rpartition(".")[2] for each in linear_shapes(model, "all-linear")}
    assert {"intermediate_dense", "output_dense"} <= found
    assert not found & {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_routers_that_give_several_tensors_are_no_linears():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Llama4TextConfig(**sizes, num_local_experts=2, vocab_size=64, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert "router" not in {each.name.rpartition(".")[2] for each in linear_shapes(model, "all-linear")}


def test_a_mixer_within_a_model_of_another_type_is_read_all_the_same():
    inner = nn.ModuleDict({"mixer": nn.ModuleDict({name: nn.Linear(2, 2) for name in ("in_proj", "out_proj")})})
    inner.config, outer = MambaConfig(), nn.ModuleDict({"inner": inner, "out_proj": nn.Linear(2, 2)})
    outer.config = SimpleNamespace(model_type="outer")
    assert is_read_without_call(outer, "inner.mixer.out_proj")
    assert not is_read_without_call(outer, "inner.mixer.in_proj")
    assert not is_read_without_call(outer, "out_proj")


def test_linears_that_a_mixer_reads_are_left_out():
    """Mamba computes `dt_proj.weight @ x`, and all three in one kernel on GPUs: experts there would do nothing."""
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert {each.name.rpartition(".")[2] for each in linear_shapes(model, "all-linear")} == {"in_proj"}
    for targets in (["in_proj", "dt_proj"], r".*\.(in|x)_proj"):
        with pytest.raises(MolaError, match="reads its weight in a kernel and does not call it"):
            linear_shapes(model, targets)
    assert len(linear_shapes(model, r".*\.(in|x)_proj", ["x_proj"])) == 2
    with pytest.raises(MolaError, match=r"this model has: conv1d, dt_proj, in_proj, lm_head, out_proj, x_proj"):
        default_target_modules([name for name, _ in model.named_modules()], "mamba")


@pytest.mark.parametrize(
    ("model_type", "name", "is_read"),
    [
        ("detr", "bbox_attention.k_proj", True),
        ("mobilebert", "cls.predictions.dense", True),
        ("detr", "model.encoder.layers.0.self_attn.k_proj", False),
        ("llama", "model.layers.0.mlp.out_proj", False),
    ],
)
def test_read_linears_are_found_by_model_type_and_name(model_type, name, is_read):
    model = module = nn.Module()
    model.config = SimpleNamespace(model_type=model_type)
    for part in name.split("."):
        module.add_module(part, nn.Module())
        module = getattr(module, part)
    assert is_read_without_call(model, name) is is_read
