"""`resume_from_checkpoint`: adapters of both kinds to start from, and checkpoints to go on with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from research_code.adapters import _is_same_conversion
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.grids import slow
from tests.research_code.scripts import character_tokenizer, error_line
from tests.research_code.training.runs import TRAIN, adapter_config, log_entries, loss_on, record

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.slow
def test_empty_path_means_new_experts(command, tmp_path):
    assert command(resume_from_checkpoint="") == 0
    assert record(tmp_path / "run")["settings"]["adapter"] is None


@pytest.mark.slow
def test_private_default_folder_is_not_loaded(finished, command, tmp_path):
    """The research code silently continued from a folder of this name, if there was one."""
    shutil.copytree(finished, tmp_path / "step2_biology256r_8mbs_no8bit_scale10")
    assert command(output_dir=tmp_path / "second") == 0
    assert record(tmp_path / "second")["settings"]["adapter"] is None


def test_new_run_from_the_experts_of_an_adapter(finished, command, tmp_path, tiny_model_dir):
    assert command(resume_from_checkpoint=finished, output_dir=tmp_path / "next", obalance=True, lora_dropout=0.1) == 0
    assert record(tmp_path / "next")["settings"]["adapter"] == str(finished)
    config = adapter_config(tmp_path / "next")
    assert (config["router_aux_loss_coef"], config["lora_dropout"]) == (1e-3, 0.1)
    assert (config["num_experts"], config["lora_alpha"]) == ([2, 2, 3, 3], 16)
    # It starts where the first ended: its first loss is lower than that of new experts.
    assert loss_on(tmp_path / "next", tiny_model_dir, tmp_path / "science_qa.hf") < loss_on(
        finished, tiny_model_dir, tmp_path / "science_qa.hf"
    )


def test_adapter_that_contradicts_a_list_is_refused(finished, command, tmp_path, capsys):
    capsys.readouterr()
    flags = {"number_experts": "2,2,2,2", "output_dir": tmp_path / "next", "resume_from_checkpoint": finished}
    assert command(**flags) == 2
    line = error_line(TRAIN, capsys)
    assert "2,2,2,2" in line
    assert "2,2,3,3" in line


@pytest.mark.parametrize("start", ["run/checkpoint-3-copy", *slow("run", "other/../run")])
def test_adapter_in_the_output_folder_is_refused_and_stays(start, finished, command, tmp_path, capsys):
    """Its experts would be removed, and there may be no other copy."""
    (tmp_path / "other").mkdir()
    shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))
    shutil.move(tmp_path / "copy", finished / "checkpoint-3-copy")
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert command(resume_from_checkpoint=start, overwrite_output_dir=True) == 2
    line = error_line(TRAIN, capsys)
    assert [
        part for part in ("`resume_from_checkpoint`", start, "`output_dir`", str(tmp_path)) if part not in line
    ] == []
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_adapter_of_the_research_code_in_the_output_folder_is_refused(command, tmp_path, golden_base, capsys):
    shutil.copytree(GOLDEN / "case_a", tmp_path / "run")
    flags = {"base_model": golden_base, "resume_from_checkpoint": tmp_path / "run", "top_k": 2, "number_experts": None}
    assert command(**flags, overwrite_output_dir=True) == 2
    assert "`resume_from_checkpoint` must be outside `output_dir`" in error_line(TRAIN, capsys)
    assert (tmp_path / "run" / "adapter_config.json").is_file()
    assert not (tmp_path / "run.mola").exists()


def test_an_adapter_of_another_method_is_refused(command, tmp_path, tiny_model, capsys):
    """The scripts set the weight of the balance loss, which only a mixture has."""
    get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    capsys.readouterr()
    lists = dict.fromkeys(("number_experts", "top_k", "lora_r", "lora_alpha", "lora_target_modules"))
    assert command(resume_from_checkpoint=tmp_path / "lora", **lists) == 2
    assert "is of type LORA. Use `mola train --adapter`" in error_line(TRAIN, capsys)


def test_run_goes_on_from_its_checkpoint_to_the_same_weights(command, tmp_path):
    whole = {"num_epochs": 2, "save_steps": 2, "learning_rate": 1e-2}
    assert command(**whole, output_dir=tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / "cut" / name)
    (tmp_path / "cut" / "adapter_model.safetensors").unlink()
    flags = {**whole, "output_dir": tmp_path / "cut", "resume_from_checkpoint": tmp_path / "cut" / "checkpoint-2"}
    assert command(**flags) == 0
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [entry["step"] for entry in log_entries(tmp_path / "cut") if "eval_loss" in entry][:3] == [2, 4, 6]


@pytest.mark.slow
def test_continued_run_goes_on_too(finished, command, tmp_path, capsys):
    """A run that started from an adapter is resumed with its checkpoint as the only thing to name."""
    flags = {"output_dir": tmp_path / "next", "num_epochs": 2, "save_steps": 2}
    assert command(resume_from_checkpoint=finished, **flags) == 0
    final = load_file(tmp_path / "next" / "adapter_model.safetensors")
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / "next" / name)
    capsys.readouterr()
    shutil.rmtree(finished)
    # Its lists are those of the adapter that it began with, which its checkpoint has.
    assert command(resume_from_checkpoint="last", **flags, number_experts="2,2,2,2") == 2
    line = error_line(TRAIN, capsys)
    assert [part for part in ("`number_experts`", "2,2,2,2", "2,2,3,3", "checkpoint-2") if part not in line] == []
    assert command(resume_from_checkpoint=tmp_path / "next" / "checkpoint-2", **flags, lora_r=4) == 2
    assert "`lora_r`" in error_line(TRAIN, capsys)
    assert command(resume_from_checkpoint="last", **flags) == 0
    again = load_file(tmp_path / "next" / "adapter_model.safetensors")
    assert all(torch.equal(final[name], again[name]) for name in final)


def test_whole_model_checkpoint_of_the_research_code_is_refused(command, tmp_path, capsys):
    folder = tmp_path / "checkpoint-200"
    folder.mkdir()
    for name in ("pytorch_model.bin", "trainer_state.json"):
        (folder / name).write_text("{}")
    assert command(resume_from_checkpoint=folder) == 2
    assert "whole model" in error_line(TRAIN, capsys)


@pytest.fixture
def golden_base(tmp_path):
    """The recorded base model with a tokenizer and room for prompts."""
    folder = tmp_path / "base_tiny"
    shutil.copytree(GOLDEN / "base_tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    character_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("top_k", "same"), [([2, 2, 2, 2], True), ([1, 2, 2, 2], True), ([1, 1, 2, 2], False), (None, False)]
)
def test_a_conversion_is_known_again_by_the_experts_that_are_used(top_k, same, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"num_experts": [1, 2, 4, 8]}')
    assert _is_same_conversion({"source": {}, "top_k": top_k}, {"source": {}, "top_k": [2] * 4}, tmp_path) == same
    assert not _is_same_conversion({"source": {"a": "b"}, "top_k": [2] * 4}, {"source": {}, "top_k": [2] * 4}, tmp_path)


def test_training_goes_on_from_an_adapter_of_the_research_code(command, tmp_path, golden_base, capsys):
    source = tmp_path / "scienceqa_mola"
    shutil.copytree(GOLDEN / "case_a", source)
    flags = {
        "base_model": golden_base,
        "resume_from_checkpoint": source,
        "number_experts": "2,3,4,5",
        "lora_r": "4,4,4,4",
        "learning_rate": 1e-20,
    }
    assert command(**flags) == 2  # a wrong top_k would run to the end
    line = error_line(TRAIN, capsys)
    assert [part for part in ("`top_k`", "scienceqa_mola", "--top_k", "2 was the default") if part not in line] == []
    assert not (tmp_path / "scienceqa_mola.mola").exists()
    assert command(**flags, top_k="2") == 0
    numbers = load_file(GOLDEN / "case_a" / "fixture.safetensors")
    base = AutoModelForCausalLM.from_pretrained(golden_base, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, tmp_path / "run").eval()
    with torch.no_grad():
        logits = model(input_ids=numbers["input_ids"], attention_mask=numbers["attention_mask"]).logits
    torch.testing.assert_close(logits, numbers["logits"], atol=2e-5, rtol=1e-4)
    # The converted folder belongs to this `top_k`; `test_evaluation` shows that an equal one uses it again.
    assert command(**flags, output_dir=tmp_path / "third", top_k="1") == 2
    assert "`top_k` 1. Remove that folder" in error_line(TRAIN, capsys)
