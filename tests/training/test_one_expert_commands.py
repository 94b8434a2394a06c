"""Every command takes a run with one expert everywhere, which is a plain LoRA; what is about routers says so."""

import json

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mola import load_model
from mola.checkpoints.skills_folder import read_skills
from mola.cli import main
from mola.data.prepare import PrepareOptions, prepare
from mola.serving.serve import ServeOptions, running_server


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions") / "data"
    prepare(PrepareOptions("sample", str(folder), train_size=20, validation_size=2, test_size=6))
    return folder


SETTINGS = [
    "--task=sample",
    "--num_experts=1",
    "--max_steps=2",
    "--dtype=float32",
    "--warmup_steps=0",
    "--batch_size=4",
]


@pytest.fixture(scope="module")
def run_folder(tiny_model_dir, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    words = ["--base_model", tiny_model_dir, "--data", data / "train.json", "--output", folder, "--learning_rate=0.03"]
    assert main(["train", *map(str, words), *SETTINGS]) == 0
    return folder


@pytest.fixture
def run(capsys):
    """Run `mola` with words; exit code and what it printed."""

    def call(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 27).view(2, 12)).logits


def test_measuring_and_answering(run, run_folder, data, tmp_path):
    test = ["--data", data / "test.json", "--task", "sample", "--dtype", "float32"]
    code, _ = run("evaluate", run_folder, *test, "--scoring", "likelihood", "--output", tmp_path / "after.json")
    assert code == 0
    assert json.loads((tmp_path / "after.json").read_text())["total"] == 6
    assert run("generate", run_folder, "--instruction", "Hi", "--max_new_tokens", 2)[0] == 0
    code, said = run("inspect", run_folder, *test)
    assert code == 2
    assert "no module of" in said
    assert "has a router, so there is nothing to inspect" in said


def test_pages_and_findings_leave_routers_out(run, run_folder, tmp_path):
    assert run("report", run_folder, "--output", tmp_path / "report.html")[0] == 0
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "A LORA adapter" in page
    assert "not a mixture of experts" in page
    assert "Routers over training" not in page
    assert "<dt>experts</dt>" not in page
    code, said = run("doctor", run_folder)
    assert code == 0
    assert "router" not in said
    card = (run_folder / "README.md").read_text("utf-8")
    assert "import mola" not in card
    assert "mixture" not in card


def test_merged_and_converted(run, run_folder, tiny_model_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, run_folder))  # PEFT alone
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(load_model(None, run_folder, "float32", "cpu")), expected)
    assert run("merge", run_folder, "--output", tmp_path / "merged")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    code, said = run("convert", run_folder, "--to", "lora", "--output", tmp_path / "lora")
    assert code == 2
    assert "is of type LORA. Pass one that `mola train` wrote with several experts" in said
    output = tmp_path / "mixture"
    assert run("convert", run_folder, "--from", "lora", "--num_experts", 2, "--output", output)[0] == 0
    assert json.loads((output / "adapter_config.json").read_text())["num_experts"] == 2


def test_it_becomes_a_skill_as_it_is(run, run_folder, data, tmp_path):
    folder = tmp_path / "skills"
    assert run("skills", "add", folder, f"one={run_folder}", "--data", data / "train.json")[0] == 0
    assert read_skills(folder).names == ["one"]
    assert run("skills", "test", folder, "--data", f"one={data / 'test.json'}")[0] == 0


def test_it_is_served(run_folder):
    pytest.importorskip("fastapi", reason="needs the extra `serve`")
    with running_server(ServeOptions(adapter=[f"one={run_folder}"], device="cpu", dtype="float32", port=0)) as url:
        body = {"model": "one", "prompt": "Hi", "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["usage"]["completion_tokens"] >= 1


def test_a_sequence_trains_one_lora_further(run, data, tiny_model_dir, tmp_path):
    folder = tmp_path / "sequence"
    stages = {"plain": {}, "faster": {"learning_rate": 0.01, "lora_dropout": 0.1}}
    words = ["--base_model", tiny_model_dir, "--data", data / "dataset.hf", "--stages", json.dumps(stages)]
    assert run("continual", *words, *SETTINGS, "--eval_strategy=no", "--output", folder)[0] == 0
    for name, dropout in (("01-plain", 0.05), ("02-faster", 0.1)):
        settings = json.loads((folder / name / "adapter_config.json").read_text())
        assert (settings["peft_type"], settings["lora_dropout"]) == ("LORA", dropout)


def test_a_quantised_base(run, run_folder, tiny_model_dir, data, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'mola-peft[quant]'")
    words = ["--base_model", tiny_model_dir, "--data", data / "train.json", "--output", tmp_path / "run"]
    assert run("train", *words, *SETTINGS, "--load_in_4bit")[0] == 0
    code, _ = run("generate", tmp_path / "run", "--instruction", "Hi", "--max_new_tokens", 2, "--load_in_4bit")
    assert code == 0
