"""The layers of models that have more than one stack of them."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Phi4MultimodalConfig

from mola.architecture.layer_names import module_kinds
from mola.architecture.layer_stacks import LayerStacks
from mola.architecture.targets import linear_shapes, resolve_target_modules

SIDES = {"encoder": 2, "decoder": 3}


@pytest.mark.parametrize("exclude", [None, ["lm_head", "q.proj"], ("lm_head",), r".*\.lm_head"])
def test_towers_are_excluded_too(exclude):
    pattern = LayerStacks(2, language_model="model.language_model").also_excluding_towers(exclude)
    left_out = {
        "model.vision.layers.0.q_proj": True,
        "model.language_model_2.layers.0.q_proj": True,
        "model.language_model.layers.0.q_proj": False,
        "model.language_model.lm_head": exclude is not None,
        "model.language_model.q.proj": isinstance(exclude, list),
        "model.language_model.qxproj": False,  # a point in a name is a point
        "model.language_model.my_lm_head": False,
    }
    assert {name: re.fullmatch(pattern, name) is not None for name in left_out} == left_out


def test_without_towers_exclusions_stay_as_they_are():
    assert LayerStacks(2).also_excluding_towers(["lm_head"]) == ["lm_head"]


class WithTower(nn.Module):
    """A language model beside a tower, as Transformers builds them."""

    def __init__(self):
        super().__init__()
        self.config = {"text_config": {"num_hidden_layers": 2}}
        self.tower = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])})
        self.text = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])})

    def get_decoder(self):
        return self.text


def test_layers_of_the_language_model_only_are_counted():
    stacks = LayerStacks.of(WithTower())
    assert stacks == LayerStacks(2, language_model="text")
    assert [stacks.index(name) for name in ("text.layers.1", "tower.layers.1", "textual.layers.1")] == [1, None, None]


class HoldsTower(nn.Module):
    """A language model that holds its tower, as Phi-4-multimodal: its configuration has no part of its own."""

    def __init__(self):
        super().__init__()
        self.config = {"num_hidden_layers": 2, "vision_config": {"num_hidden_layers": 3}}
        layers, encoder = (nn.ModuleList([nn.Linear(2, 2) for _ in range(number)]) for number in (2, 3))
        self.model = nn.ModuleDict({"embed": nn.ModuleDict({"layers": encoder}), "layers": layers})


def test_a_tower_within_the_language_model_is_left_out():
    stacks = LayerStacks.of(HoldsTower())
    assert stacks == LayerStacks(2, language_model="model.layers")
    assert [stacks.index(name) for name in ("model.layers.1", "model.embed.layers.1")] == [1, None]


def test_phi_4_multimodal():
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = {**size, "num_hidden_layers": 4, "image_size": 28, "patch_size": 14, "crop_size": 28}
    audio = {**size, "num_blocks": 2, "ext_pw_out_channel": 32, "nemo_conv_channels": 32, "input_size": 16}
    tokens = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = Phi4MultimodalConfig(
        **size, **tokens, num_hidden_layers=3, num_key_value_heads=2, vision_config=vision, audio_config=audio
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stacks = LayerStacks.of(model)
    targets, excluded = resolve_target_modules(model, stacks, None)
    assert targets == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    shapes = linear_shapes(model, targets, excluded)
    assert [each.layer_index for each in shapes] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(each.name.startswith("model.layers.") for each in shapes)


def test_a_model_that_is_its_own_decoder_has_no_towers():
    model = WithTower()
    model.get_decoder = lambda: model
    assert LayerStacks.of(model) == LayerStacks(2)
    model.config = {"num_hidden_layers": 2}
    model.get_decoder = lambda: model.text
    assert LayerStacks.of(model).language_model is None


def linears(number):
    return nn.ModuleList([nn.Linear(2, 2) for _ in range(number)])


def test_layers_that_run_several_times_have_one_number_each():
    """A configuration may count their runs."""
    model = nn.ModuleDict({"layers": linears(4), "head": nn.Linear(2, 2)})
    model.config = {"num_hidden_layers": 12}
    stacks = LayerStacks.of(model)
    assert stacks.num_layers == 4
    assert [stacks.index(name) for name in ("layers.3", "head")] == [3, None]


class Block(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_lists_inside_of_layers_are_no_layers():
    """Experts of a base model, in layers that are in no list; or heads beside such layers."""
    blocks = nn.Sequential(*(Block(q=nn.Linear(2, 2), experts=linears(3)) for _ in range(6)))
    stacks = LayerStacks.of(nn.ModuleDict({"blocks": blocks}))
    assert stacks.num_layers == 6
    assert [stacks.index(name) for name in ("blocks.4.q", "blocks.0.experts.1")] == [4, 0]
    beside = nn.ModuleDict({"blocks": nn.Sequential(*(nn.Linear(2, 2) for _ in range(6))), "heads": linears(3)})
    assert LayerStacks.of(beside).num_layers == 6


def test_lists_of_linears_are_no_layers_beside_layers():
    """As the prenets of SpeechT5, and the heads of MusicGen."""
    layers = {side: nn.ModuleList([Block(q=nn.Linear(2, 2)) for _ in range(n)]) for side, n in SIDES.items()}
    parts = {side: nn.ModuleDict({"wrapped": nn.ModuleDict({"layers": found})}) for side, found in layers.items()}
    parts["decoder"]["prenet"] = linears(2)
    model = nn.ModuleDict(parts)
    model.config = {"is_encoder_decoder": True}
    stacks = LayerStacks.of(model)
    assert (stacks.num_layers, stacks.num_encoder_layers) == (5, 2)
    assert stacks.index("decoder.wrapped.layers.0.q") == 2


@pytest.mark.parametrize("tower", ["vision_model.encoder", "encoder.vision_tower.encoder"])
def test_a_tower_is_no_encoder_of_an_encoder_decoder(tower):
    """As in BLIP-2 with T5, and in T5Gemma 2."""
    places = {f"{tower}.layers": 9, "language_model.encoder.layers": 2, "language_model.decoder.layers": 3}
    if tower.startswith("encoder"):
        places = {f"model.{tower}.layers": 9, "model.encoder.layers": 2, "model.decoder.layers": 3}
    model = nn.Module()
    model.config = {"is_encoder_decoder": True}
    for place, number in places.items():
        part = model
        *parents, last = place.split(".")
        for name in parents:
            if name not in part._modules:
                part.add_module(name, nn.Module())
            part = part._modules[name]
        part.add_module(last, linears(number))
    stacks = LayerStacks.of(model)
    beside, encoder, decoder = places
    assert (stacks.num_layers, stacks.num_encoder_layers) == (5, 2)
    assert stacks.parts == (encoder, decoder)
    assert [stacks.index(f"{place}.1") for place in places] == [None, 1, 3]
    pattern = stacks.also_excluding_towers(None)
    assert re.fullmatch(pattern, f"{beside}.1")
    assert not re.fullmatch(pattern, f"{decoder}.1")


class Around(nn.Module):
    """A model around one with towers, as ColPali's: only that one's configuration names the text."""

    def __init__(self):
        super().__init__()
        self.config = {"inner_config": {"text_config": {"num_hidden_layers": 2}}}
        self.inner, self.speaker = WithTower(), linears(5)


def test_a_language_model_two_levels_below():
    stacks = LayerStacks.of(Around())
    assert stacks == LayerStacks(2, language_model="inner.text")
    names = ("inner.text.layers.1", "inner.tower.layers.1", "speaker.1")
    assert [stacks.index(name) for name in names] == [1, None, None]


def test_decoder_layers_come_after_those_of_the_encoder():
    layers = {
        side: nn.ModuleDict({"block": nn.ModuleList([nn.Linear(2, 2) for _ in range(count)])})
        for side, count in SIDES.items()
    }
    model = nn.ModuleDict(layers)
    model.config = {"is_encoder_decoder": True}
    stacks = LayerStacks.of(model)
    assert (stacks.num_layers, stacks.num_encoder_layers) == (5, 2)
    names = ("encoder.block.1", "decoder.block.0", "decoder.block.2", "shared")
    assert [stacks.index(name) for name in names] == [1, 2, 4, None]
    assert [stacks.is_encoder(index) for index in (0, 1, 2, 4, None)] == [True, True, False, False, False]


def test_kinds_are_last_parts_of_names_where_these_are_unique():
    attention = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert set(module_kinds([*attention, "model.layers.0.mlp.up_proj"]).values()) == {"q_proj", "up_proj"}
    experts = [f"model.layers.{layer}.experts.{expert}.up" for layer in (0, 1) for expert in (0, 1)]
    assert module_kinds(experts)[experts[1]] == "experts.1.up"
    assert module_kinds(["lm_head"]) == {"lm_head": "lm_head"}


def test_kinds_are_longer_where_two_modules_of_a_layer_end_alike():
    kinds = ["attn.c_attn", "attn.c_proj", "mlp.c_proj"]
    names = [f"transformer.h.{layer}.{kind}" for layer in (0, 1) for kind in kinds]
    assert list(module_kinds(names).values()) == kinds * 2
