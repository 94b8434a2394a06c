"""`mola train` with one expert everywhere: a plain LoRA that starts as a mixture with one expert does."""

import json
import shutil
from contextlib import contextmanager, nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

from mola import TrainOptions
from mola.cli import main
from mola.training.model import adapter_config
from tests.training.runs import NO_EVALUATION, WEIGHTS, assert_same_weights, built, losses, read_record

ONE = {"num_experts": "1", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}


def settings_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 27).view(2, 12)).logits


@pytest.fixture
def options(tiny_model_dir, tmp_path):
    def make(**given):
        given = {"num_experts": "1", "use_cpu": True, "dtype": "float32", **given}
        return TrainOptions(base_model=str(tiny_model_dir), output_dir=str(tmp_path), **given)

    return make


def test_the_run_is_a_lora_of_peft(flags, tmp_path, tiny_model_dir):
    assert main(flags(**ONE, r="4", lora_alpha=8)) == 0
    folder = tmp_path / "run"
    settings = settings_of(folder)
    assert {name: settings[name] for name in ("peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern")} == {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "rank_pattern": {},
    }  # fmt: skip
    linears = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert sorted(settings["target_modules"]) == linears
    names = load_file(folder / WEIGHTS)
    assert len(names) == 4 * 7 * 2
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    record = read_record(folder)
    assert record["adapter_settings"]["num_experts"] == "1"
    assert (record["allocation"]["num_layers"], record["allocation"]["router_parameters"]) == (4, 0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    before = logits(base)
    assert (logits(PeftModel.from_pretrained(base, folder)) - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("given", "is_lora"),
    [
        ({"num_experts": "1111"}, True),
        ({"num_experts": "1,1,1,1"}, True),
        ({"num_experts": "2", "num_experts_pattern": {".*": 1}, "top_k": "1"}, True),
        ({"num_experts": "1112"}, False),
        ({"num_experts_pattern": {"q_proj": 2}}, False),
    ],
)
def test_a_lora_is_what_has_no_router(options, given, is_lora):
    assert isinstance(built(options(**given)).peft_config["default"], LoraConfig) == is_lora


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("start", [None, "gaussian", "orthogonal", "principal", "false"])
def test_it_starts_and_computes_as_a_mixture_with_one_expert(options, tiny_model_dir, dtype, start):
    given = options(
        dtype=dtype, r="4,2,2,6", use_rslora=True, init_lora_weights=start, target_modules="q_proj,up_proj",
        rank_pattern={"up_proj": 8}, alpha_pattern={"layers.1.*": 5.0},
    )  # fmt: skip
    lora = built(given)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype)
    set_seed(given.seed)
    mixture = get_peft_model(base, adapter_config(given))
    ours, theirs = dict(lora.named_modules()), dict(mixture.named_modules())
    adapted = [name for name in theirs if name.endswith(("q_proj", "up_proj"))]
    assert len(adapted) == 8
    for name in adapted:
        assert ours[name].scaling == theirs[name].scaling
        assert torch.equal(ours[name].lora_A["default"].weight, theirs[name].mola_A["default"][0])
        assert torch.equal(ours[name].lora_B["default"].weight, theirs[name].mola_B["default"][0].t())


@contextmanager
def as_before():
    """In this block one expert everywhere is a mixture, as in earlier versions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mola.training.model.lora_like", lambda mixture, model: mixture)
        yield


def test_its_training_is_that_of_a_mixture_with_one_expert(flags, tmp_path):
    assert main(flags(**ONE, lora_dropout=0.2, loraplus_lr_ratio=4)) == 0
    with as_before():
        assert main(flags(tmp_path / "mixture", **ONE, lora_dropout=0.2, loraplus_lr_ratio=4)) == 0
    assert settings_of(tmp_path / "mixture")["peft_type"] == "MOLA"
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "mixture"), abs=1e-4)


@pytest.mark.parametrize(("name", "block"), [("LORA", nullcontext), ("MOLA", as_before)])
def test_a_stopped_run_continues_as_it_began(flags, tmp_path, name, block):
    with block():
        assert main(flags(**ONE)) == 0
    stopped = shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    shutil.rmtree(stopped / "checkpoint-4")
    assert main(flags(stopped, **ONE, resume_from_checkpoint="last")) == 0
    assert settings_of(stopped)["peft_type"] == settings_of(stopped / "checkpoint-4")["peft_type"] == name
    assert_same_weights(stopped, tmp_path / "run")


def test_it_is_trained_further_with_another_dropout(flags, tmp_path, error_line):
    assert main(flags(**ONE)) == 0
    more = {"adapter": tmp_path / "run", **NO_EVALUATION, "max_steps": 2}
    assert main(flags(tmp_path / "next", **more, lora_dropout=0.3, router_aux_loss_coef=0)) == 0
    assert settings_of(tmp_path / "next")["lora_dropout"] == 0.3
    line = error_line(flags(tmp_path / "other", **more, router_aux_loss_coef=0.1))
    assert "`router_aux_loss_coef` cannot be changed" in line
    assert "has no such setting" in line


def test_losses_of_routers_have_no_effect_and_a_warning_says_so(flags, tmp_path, caplog):
    assert main(flags(**ONE, router_aux_loss_coef=0.1, verbose="true")) == 0
    assert "`router_aux_loss_coef` (0.1) has no effect: with one expert everywhere there is no router" in caplog.text
    assert main(flags(tmp_path / "without", **ONE)) == 0
    assert_same_weights(tmp_path / "run", tmp_path / "without")
