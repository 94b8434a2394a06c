"""What axolotl's YAML says of a mixture, without axolotl."""

import json

import pytest

from mola import MolaConfig, MolaError
from mola.integrations.axolotl_fields import check_inference, check_merge, given_settings, new_config
from mola.integrations.mixture_settings import continued_config
from tests.conftest import save_adapter

YAML = {"adapter": "mola", "base_model": "my-model", "output_dir": "runs/out", "learning_rate": 1e-4}


def test_fields_of_axolotl_and_of_the_block_make_the_configuration():
    block = {"num_experts": "2468", "top_k": 1, "router_aux_loss_coef": "1e-3", "router_jitter_noise": 0.1}
    fields = {"lora_r": 4, "lora_alpha": 32, "lora_dropout": "5e-2", "lora_target_modules": ["q_proj"]}
    stacked = {"lora_target_parameters": ["mlp.experts.down_proj"]}
    assert given_settings({**YAML, **stacked})["target_parameters"] == ["mlp.experts.down_proj"]
    config = new_config(given_settings({**YAML, **fields, "mola": block}))
    names = ["r", "lora_alpha", "lora_dropout", "num_experts", "top_k", "router_aux_loss_coef", "router_jitter_noise"]
    assert [getattr(config, name) for name in names] == [4, 32, 0.05, "2468", 1, 1e-3, 0.1]
    assert config.target_modules == {"q_proj"}
    assert config.task_type == "CAUSAL_LM"


def test_without_a_block_the_defaults_hold():
    assert new_config(given_settings(YAML)).to_dict() == MolaConfig(task_type="CAUSAL_LM").to_dict()


def test_all_linears():
    assert given_settings({**YAML, "lora_target_linear": True})["target_modules"] == "all-linear"
    with pytest.raises(MolaError, match="leave one of the two out"):
        given_settings({**YAML, "lora_target_linear": True, "lora_target_modules": ["q_proj"]})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_use_dora", True),
        ("peft", {"loftq_config": {"loftq_bits": 4}}),
        ("lora_qkv_kernel", True),
        ("lora_exclude_modules", ["lm_head"]),
        ("loraplus_lr_ratio", 16.0),
        ("relora", True),
        ("mola_num_experts", 4),
        ("qlora_sharded_model_loading", True),
        ("load_in_4bit", True),
        ("fsdp_config", {"fsdp_version": 2}),
        ("tensor_parallel_size", 2),
        ("context_parallel", {"size": 2}),
        ("sequence_parallel_degree", 2),
        ("rl", "dpo"),
    ],
)
def test_unsupported_fields_are_an_error(field, value):
    with pytest.raises(MolaError, match=f"`{field}` must be"):
        given_settings({**YAML, field: value})


def test_fields_that_are_switched_off_are_accepted():
    given_settings({**YAML, "peft_use_dora": False, "lora_mlp_kernel": None, "tensor_parallel_size": 1, "rl": None})
    given_settings({**YAML, "context_parallel": {"size": 1}, "sequence_parallel_degree": None})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"num_expert": 4}, r"got \['num_expert'\]"),
        ({"lora_alpha": 4}, r"got \['lora_alpha'\]"),
        ("2468", r"got \['2468'\]"),
        ({"num_experts": 2468}, "`num_experts`"),
        ({"router": "best"}, "`router` must be one of"),
        ({"router_aux_loss_coef": True}, "`router_aux_loss_coef` must be a number"),
    ],
)
def test_a_wrong_block_is_refused(block, message):
    with pytest.raises(MolaError, match=message):
        given_settings({**YAML, "mola": block})


@pytest.fixture
def saved(tiny_model_dir, tmp_path):
    return save_adapter(tiny_model_dir, tmp_path / "saved", MolaConfig(num_experts="2468", r=4, task_type="CAUSAL_LM"))


def test_merging_is_refused_by_the_yaml_and_by_the_folder(saved, tmp_path):
    check_merge({**YAML, "merge_lora": False})
    check_merge({"adapter": "lora", "merge_lora": True, "output_dir": str(tmp_path)})
    for cfg in (YAML, {"adapter": "lora", "lora_model_dir": str(saved)}, {"output_dir": str(saved)}):
        with pytest.raises(MolaError, match="cannot be merged.*`mola convert ADAPTER --to lora --r .*`mola merge "):
            check_merge({**cfg, "merge_lora": True})


def test_inference_needs_the_adapter(saved):
    check_inference(YAML)
    check_inference({**YAML, "inference": True, "lora_model_dir": str(saved)})
    with pytest.raises(MolaError, match="`lora_model_dir`.*--lora-model-dir FOLDER.*'runs/out'"):
        check_inference({**YAML, "inference": True})


def test_a_saved_mixture_keeps_its_structure_and_takes_training_settings(saved, tiny_model):
    block = {"num_experts": "2,4,6,8", "router_aux_loss_coef": 0.01}
    given = given_settings({**YAML, "lora_r": 4, "lora_dropout": 0.1, "lora_target_linear": True, "mola": block})
    config = continued_config(tiny_model, str(saved), given)
    assert (config.num_experts, config.lora_dropout, config.router_aux_loss_coef) == ([2, 4, 6, 8], 0.1, 0.01)
    for change in ({"lora_r": 8}, {"lora_target_modules": ["q_proj"]}, {"mola": {"num_experts": "8642"}}):
        with pytest.raises(MolaError, match="leave it out"):
            continued_config(tiny_model, str(saved), given_settings({**YAML, **change}))


def test_another_kind_of_adapter_is_not_continued(saved, tiny_model):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    with pytest.raises(MolaError, match="is of type"):
        continued_config(tiny_model, str(saved), {})
