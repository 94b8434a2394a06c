"""What the plug-ins share, without a trainer."""

import warnings
from dataclasses import dataclass, field, fields

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mola import MolaConfig, MolaError
from mola.integrations.mixture_settings import (
    FIELDS,
    check_unused_fields,
    check_version,
    continue_mixture,
    continued_config,
    read_settings,
    require_router_losses,
)
from tests.integrations.host_runs import first_adapter


def test_settings_lose_their_prefix_and_texts_of_numbers_become_numbers():
    given = {"mola_num_experts": "2468", "mola_top_k": "[1, 2]", "mola_router_z_loss_coef": "1e-3", "max_pixels": 5}
    given["mola_router"] = None
    assert read_settings(given) == {"num_experts": "2468", "top_k": [1, 2], "router_z_loss_coef": 1e-3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mola_num_expert": 2}, "There is no ['mola_num_expert']. The settings of a mixture are ['mola_num_experts'"),
        ({"MOLA_TOP_K": 2}, "There is no ['MOLA_TOP_K']"),
        ({"top_k": 2}, "There is no ['top_k']"),
        ({"mola_num_experts": 2468}, "`num_experts` as one integer"),
        ({"mola_router_z_loss_coef": "much"}, "`router_z_loss_coef` must be a number at least 0, got 'much'"),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(MolaError) as error:
        read_settings(given)
    assert message in str(error.value)


@dataclass
class Group:
    rank: int = 8
    use_dora: bool = False
    names: list = field(default_factory=lambda: ["all"])


def test_changed_fields_of_a_trainer_are_refused_unless_honoured():
    check_unused_fields("a trainer", Group(rank=4), Group, ("rank",))
    with pytest.raises(MolaError, match=r"ignores `use_dora` \(True\), `names` \(\['q'\]\) of a trainer"):
        check_unused_fields("a trainer", Group(use_dora=True, names=["q"]), Group, ("rank",))


def test_other_versions_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version("a trainer", "4.6.0", "4.6")
    with pytest.warns(UserWarning, match=r"tried with a trainer 4\.6, this is 4\.60\.0"):
        check_version("a trainer", "4.60.0", "4.6")


def test_mixture_is_continued_with_other_router_losses(tiny_model_dir, tiny_model, tmp_path):
    folder = first_adapter(tiny_model_dir, tmp_path)
    settings = {"num_experts": [2, 4, 6, 8], "top_k": "2", "router_aux_loss_coef": 0.5}
    model = continue_mixture(tiny_model, str(folder), settings)
    config = model.peft_config["default"]
    assert (config.num_experts, config.router_aux_loss_coef) == ([2, 4, 6, 8], 0.5)
    assert any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(("name", "value"), [("num_experts", "8642"), ("top_k", 1), ("router", "other")])
def test_another_structure_is_not_continued(name, value, tiny_model_dir, tiny_model, tmp_path):
    folder = first_adapter(tiny_model_dir, tmp_path)
    with pytest.raises(MolaError, match=f"`mola_{name}` is .* in .*, not .*: leave it out"):
        continue_mixture(tiny_model, str(folder), {name: value})


def test_names_in_another_order_are_the_same(tiny_model_dir, tiny_model, tmp_path):
    """A configuration sorts some of its lists; a YAML has them as they were written."""
    settings = {"modules_to_save": ["norm", "lm_head"], "layers_to_transform": [3, 1], "target_modules": ["q_proj"]}
    model = get_peft_model(tiny_model, MolaConfig(num_experts=2, task_type="CAUSAL_LM", **settings))
    model.save_pretrained(tmp_path)
    again = {**settings, "modules_to_save": ["lm_head", "norm"], "layers_to_transform": [1, 3]}
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert continued_config(base, str(tmp_path), again).modules_to_save
    with pytest.raises(MolaError, match=r"`modules_to_save` is .* not \['norm'\]"):
        continued_config(base, str(tmp_path), {"modules_to_save": ["norm"]})
    weights = tmp_path / "adapter_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(weights).items()}, weights)
    with pytest.raises(MolaError, match="is not the file that was saved"):
        continued_config(base, str(tmp_path), again)


def test_lora_is_not_continued(tiny_model, tmp_path):
    get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(MolaError, match="is of type .*LORA, not a mixture"):
        continue_mixture(tiny_model, str(tmp_path), {})


def test_loss_from_logits_is_refused_in_training_only(tiny_model_dir, tiny_model, tmp_path):
    ids = torch.tensor([[1, 2, 3]])
    folder = str(first_adapter(tiny_model_dir, tmp_path, router_aux_loss_coef=0.1))
    model = continue_mixture(tiny_model, folder, {})
    model.train()
    assert model(input_ids=ids, labels=ids).loss > 0
    model.eval()
    model(input_ids=ids)
    model.train()
    with pytest.warns(UserWarning, match="no loss"), pytest.raises(MolaError, match="computes this loss from logits"):
        model(input_ids=ids)


def test_without_router_losses_any_loss_is_accepted(tiny_model_dir, tiny_model, tmp_path):
    model = require_router_losses(continue_mixture(tiny_model, str(first_adapter(tiny_model_dir, tmp_path)), {}))
    model.train()
    assert model(input_ids=torch.tensor([[1, 2, 3]])).loss is None


def test_fields_are_those_of_the_configuration_that_trainers_do_not_have():
    of_lora = {each.name for each in fields(LoraConfig)} | {"num_experts_pattern"}  # which no host has a flag for
    own = set(MolaConfig.__annotations__) - {"base_model_type", "weights_sha256"}
    assert own - of_lora == set(FIELDS)
