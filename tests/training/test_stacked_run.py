"""Commands on a mixture-of-experts base model whose own experts get LoRAs: `--target_parameters`."""

import json

import pytest
from safetensors.torch import load_file

from mola.cli import main
from tests.conftest import build_byte_tokenizer
from tests.training.runs import NO_EVALUATION, WEIGHTS, assert_same_weights, read_record
from tests.tuner.test_stacked import base

STACKS = "mlp.experts.gate_up_proj,mlp.experts.down_proj"
# 4 experts of 32 x 32 and 4 of 16 x 32 in each of 2 layers, rank 3.
VALUES = 2 * 3 * 4 * (64 + 48)
OF_ATTENTION = {"target_modules": "q_proj", "num_experts": "2", "r": "3", "lora_dropout": "0"}


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "base"
    tokenizer = build_byte_tokenizer()
    base(vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def totals(capsys, moe_dir, **options):
    arguments = [f"--{name}={value}" for name, value in {"base_model": moe_dir, **options}.items()]
    assert main(["plan", "--json=-", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["totals"]


def test_plan_counts_stacked_experts(moe_dir, capsys):
    numbers = {"target_modules": "q_proj", "num_experts": "2,", "r": "3"}
    without = totals(capsys, moe_dir, **numbers)
    found = totals(capsys, moe_dir, **numbers, target_parameters=STACKS)
    assert found["expert_parameters"] == without["expert_parameters"] + VALUES
    assert found["adapter_bytes"] == without["adapter_bytes"] + 4 * VALUES
    assert found["flops_per_token"] == without["flops_per_token"]


def test_stacked_experts_are_trained_and_trained_further(flags, moe_dir, tmp_path, capsys):
    common = {"base_model": moe_dir, "max_steps": 2, **NO_EVALUATION}
    assert main(flags(target_parameters=STACKS, **common, **OF_ATTENTION)) == 0
    record = read_record(tmp_path / "run")
    assert record["trainable_parameters"] == record["allocation"]["trainable_parameters"]
    assert record["adapter_settings"]["target_parameters"] == STACKS
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "`q_proj`, `mlp.experts.down_proj`, `mlp.experts.gate_up_proj`" in card
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")]) == 0
    tensors = load_file(tmp_path / "run" / WEIGHTS)
    of_stacks = [name for name in tensors if ".mlp.experts.mola_B_" in name]
    assert len(of_stacks) == 2 * 2
    assert [name for name in of_stacks if not tensors[name].any()] == []
    common |= {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-30}  # too little to change anything
    assert main(flags(tmp_path / "more", adapter=tmp_path / "run", **common)) == 0
    assert_same_weights(tmp_path / "more", tmp_path / "run")
    assert main(["merge", str(tmp_path / "run"), "--base_model", str(moe_dir), "--output", str(tmp_path / "m")]) == 2
    assert "cannot be merged" in capsys.readouterr().err


def test_dropout_and_a_wrong_name_are_refused(flags, moe_dir, error_line):
    dropped = flags(base_model=moe_dir, target_parameters=STACKS)
    assert "`lora_dropout` must be 0 with `target_parameters`" in error_line(dropped)
    wrong = flags(base_model=moe_dir, target_parameters="experts.w1", **OF_ATTENTION)
    assert "do not: 'experts.w1'. Stacked experts of this model: experts.gate_up_proj" in error_line(wrong)


def test_with_stacked_experts_one_expert_everywhere_is_no_lora(flags, moe_dir, tmp_path):
    common = {"base_model": moe_dir, "max_steps": 2, **NO_EVALUATION}
    assert main(flags(target_parameters=STACKS, **common, **{**OF_ATTENTION, "num_experts": "1"})) == 0
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["peft_type"] == "MOLA"
