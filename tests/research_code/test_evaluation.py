"""`evaluation_scienceqa.py`: the command people have, its result file, adapters of both kinds."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from research_code.adapters import adapter_flags, usable_adapter
from research_code.evaluation import ResearchEvaluateOptions
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mola import MolaConfig
from mola.cli import main as mola_main
from mola.evaluation import evaluate
from tests.conftest import save_adapter
from tests.grids import slow
from tests.research_code.scripts import SEVEN, character_tokenizer, error_line, run_script, write_json

GOLDEN = Path(__file__).parents[1] / "golden"
SCRIPT = "evaluation_scienceqa.py"


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """The script's default paths are relative to the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def saved_adapter(tiny_model_dir, tmp_path_factory):
    """A random mixture on the tiny model."""
    config = MolaConfig(num_experts=[2, 2, 3, 3], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    return save_adapter(tiny_model_dir, tmp_path_factory.mktemp("adapter") / "scienceqa_mola", config)


@pytest.fixture
def adapter(tmp_path, saved_adapter):
    return shutil.copytree(saved_adapter, tmp_path / "scienceqa_mola")


@pytest.fixture
def command(tmp_path, tiny_model_dir, adapter, monkeypatch):
    """Runs the script on five rows; flags given replace or extend it."""
    write_json(tmp_path / "scienceqa" / "scienceq_test.json", 5)

    def run(**flags):
        settings = {"base_model": tiny_model_dir, "max_new_tokens": 4, "dtype": "float32", **flags}
        words = [f"--{name}={value}" for name, value in settings.items() if value is not None]
        return run_script(SCRIPT, monkeypatch, *words)

    return run


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_every_flag_reaches_the_evaluation(command, monkeypatch):
    """The default of each is another value."""
    asked = {"batch_size": 3, "max_new_tokens": 5, "limit": 2, "device": "cpu", "template": "meta", "overwrite": True}
    asked |= {"dtype": "bfloat16", "trust_remote_code": True}
    seen = []

    def look(options):
        seen.append(options)
        Path(options.output).parent.mkdir(exist_ok=True)
        Path(options.output).write_text('{"accuracy": 1, "correct": 0, "total": 0, "samples": []}')
        return 0

    monkeypatch.setattr("research_code.evaluation.evaluate_main", look)
    assert command(**asked) == 0
    defaults = {each.name: each.default for each in dataclasses.fields(ResearchEvaluateOptions)}
    for name, value in asked.items():
        assert getattr(seen[0], name) == value != defaults[name], name


def test_command_of_the_paper(tmp_path, tiny_model_dir, adapter, monkeypatch):
    write_json(tmp_path / "scienceqa" / "scienceq_test.json", 3)
    words = ["--test_dataset", "./scienceqa/scienceq_test.json", "--base_model", tiny_model_dir]
    words += ["--mola_weights", "./scienceqa_mola", "--batch_size", 8, "--lora_target_modules", SEVEN]
    words += ["--number_experts", "2,2,3,3", "--top_k", "2,2,2,2", "--save_path", "./results/mola_test_sciqa.json"]
    assert run_script(SCRIPT, monkeypatch, *words) == 0
    result = read("results/mola_test_sciqa.json")
    assert list(result)[:5] == ["acc", "correct", "len", "results", "outputs"]
    assert (result["len"], len(result["results"]), len(result["outputs"])) == (3, 3, 3)
    assert result["settings"]["max_new_tokens"] == 128


def test_result_file_has_both_forms(command, tmp_path, monkeypatch):
    """One answer right, one wrong, three without any: what the model wrote is replaced, the counting is real."""
    outputs = ["Answer: The answer is A.", "The answer is A", "Apple", "", "The answer is Z."]
    monkeypatch.setattr("mola.generation.predicting.generate_batch", lambda *rest, **more: outputs)
    assert command() == 0
    result = read("results/mola_test_sciqa_seed_10.json")
    assert result["acc"] == 20.0
    assert result["accuracy"] == 0.2
    assert (result["correct"], result["len"], result["unanswered"]) == (1, 5, 3)
    assert sorted(result["results"]) == [[], [], [], ["A"], ["A"]]
    assert sorted(result["outputs"]) == sorted(outputs)
    assert result["outputs"] == [sample["output"] for sample in result["samples"]]
    assert not list(Path("results").glob("*.partial*"))


def test_outputs_have_no_special_tokens_and_no_prompt(command):
    assert command() == 0
    result = read("results/mola_test_sciqa_seed_10.json")
    assert not [text for text in result["outputs"] if "<s>" in text or "</s>" in text or "### Response" in text]


@pytest.mark.parametrize(("given", "existing"), [("scienceq_", "scienceqa_"), *slow(("scienceqa_", "scienceq_"))])
def test_both_spellings_of_the_data_file(given, existing, command, tmp_path):
    """The file that the flag names is read if it exists."""
    write_json(tmp_path / "data" / f"{existing}test.json", 2)
    flags = {"test_dataset": f"data/{given}test.json", "save_path": "r.json", "max_new_tokens": 1}
    assert command(**flags) == 0
    assert read("r.json")["len"] == 2
    write_json(tmp_path / "data" / f"{given}test.json", 3)
    assert command(**flags, overwrite=True) == 0
    assert read("r.json")["len"] == 3


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"test_dataset": "nowhere/scienceq_test.json"}, ["nowhere/scienceq_test.json"]),
        ({"mola_weights": "nowhere"}, ["nowhere"]),
        ({"lora_target_modules": "(q_proj,v_proj)"}, ["`lora_target_modules`", "q_proj,v_proj"]),
        ({"number_experts": "2,2,2,2"}, ["`number_experts`", "2,2,2,2", "2,2,3,3"]),
        ({"top_k": "1"}, ["`top_k`", "1,1,1,1", "2,2,2,2"]),
        ({"lora_target_modules": "q_proj"}, ["`lora_target_modules`", "q_proj"]),
        ({"number_experts": "2,2"}, ["`number_experts`", "2", "4"]),
        ({"number_experts": "[2,2,x,3]"}, ["`number_experts`", "x"]),
        ({"batch_size": 0}, ["`batch_size`", "0"]),
        ({"save_path": "."}, ["folder"]),
        ({"numbr_experts": "2"}, ["--numbr_experts", "--number_experts"]),
    ],
)
def test_wrong_flags_end_in_one_line(flags, parts, command, capsys):
    assert command(**flags) == 2
    line = error_line(SCRIPT, capsys)
    assert [part for part in parts if part not in line] == []


@pytest.mark.parametrize(
    "flags",
    [
        {"number_experts": "(2, 2, 3, 3)", "top_k": "[2,2,2,2]", "lora_target_modules": f"[{SEVEN}]"},
        {"number_experts": "[2,2,3,3]", "lora_target_modules": str(SEVEN.split(","))},
        {"lora_target_modules": "all-linear"},  # the adapter holds names
    ],
)
def test_equal_lists_in_different_forms(flags, adapter, tiny_model_dir):
    options = ResearchEvaluateOptions(**flags)
    assert usable_adapter(str(adapter), str(tiny_model_dir), adapter_flags(options)) == str(adapter)


def test_an_adapter_may_hold_whole_names(command):
    """An adapter that was made with "all-linear" is saved with the whole names of its linears."""
    path = Path("scienceqa_mola", "adapter_config.json")
    settings = json.loads(path.read_text())
    names = [
        f"model.layers.{layer}.{'self_attn' if name[:2] in ('q_', 'k_', 'v_', 'o_') else 'mlp'}.{name}"
        for layer in range(4)
        for name in SEVEN.split(",")
    ]
    path.write_text(json.dumps({**settings, "target_modules": names}))
    assert command(lora_target_modules=SEVEN) == 0


def test_lists_for_an_adapter_of_another_method_are_refused(command, tmp_path, tiny_model_dir, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    assert command(mola_weights="lora", top_k=2) == 2
    line = error_line(SCRIPT, capsys)
    assert [part for part in ("`top_k` describes a mixture", "LORA", "Leave the flag out") if part not in line] == []
    assert command(mola_weights="lora") == 0


def test_existing_result_is_kept(command, capsys):
    assert command() == 0
    before = read("results/mola_test_sciqa_seed_10.json")
    assert command() == 2
    assert "`overwrite`" in error_line(SCRIPT, capsys)
    assert read("results/mola_test_sciqa_seed_10.json") == before
    assert command(overwrite=True) == 0


def test_empty_test_file_is_an_error(command, tmp_path, capsys):
    (tmp_path / "empty.json").write_text("[]")
    assert command(test_dataset="empty.json") == 2
    assert "empty.json" in error_line(SCRIPT, capsys)


def test_flags_and_defaults():
    defaults = {field.name: field.default for field in dataclasses.fields(ResearchEvaluateOptions)}
    assert {
        "test_dataset": "./scienceqa/scienceq_test.json",
        "base_model": "NousResearch/Llama-2-7b-hf",
        "mola_weights": "./scienceqa_mola",
        "number_experts": None,  # the adapter's own
        "top_k": None,
        "lora_target_modules": None,
        "save_path": "./results/mola_test_sciqa_seed_10.json",
        "batch_size": 8,
    }.items() <= defaults.items()


# ---------------------------------------------------------------------- an adapter of the research code


@pytest.fixture
def golden(tmp_path):
    """The recorded base model with a tokenizer and room for prompts, the recorded adapter, and three questions."""
    shutil.copytree(GOLDEN / "base_tiny", tmp_path / "base_tiny")
    config = read(tmp_path / "base_tiny" / "config.json")
    (tmp_path / "base_tiny" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    character_tokenizer(tmp_path / "base_tiny")
    shutil.copytree(GOLDEN / "case_a", tmp_path / "case_a", ignore=shutil.ignore_patterns("fixture*"))
    write_json(tmp_path / "scienceq_test.json", 3)
    return load_file(GOLDEN / "case_a" / "fixture.safetensors")


def test_recorded_adapter_gives_the_recorded_logits_on_the_way_of_the_script(golden, monkeypatch):
    """The very model that the script evaluates: its logits are the recorded ones, its answers are that model's."""
    loaded = []
    load = evaluate.model_for
    monkeypatch.setattr(evaluate, "model_for", lambda *rest, **more: loaded.append(load(*rest, **more)) or loaded[0])
    words = ["--test_dataset", "scienceq_test.json", "--base_model", "base_tiny", "--mola_weights", "case_a"]
    words += ["--number_experts", "2,3,4,5", "--top_k", "2,2,2,2", "--lora_target_modules", SEVEN]
    words += ["--save_path", "result.json", "--dtype", "float32", "--max_new_tokens", 5]
    assert run_script(SCRIPT, monkeypatch, *words) == 0
    with torch.no_grad():
        batch = {name: golden[name] for name in ("input_ids", "attention_mask")}
        logits = loaded[0](**batch).logits
    torch.testing.assert_close(logits, golden["logits"], atol=2e-5, rtol=1e-4)
    # By hand: mola convert, then mola evaluate.
    convert = ["convert", "case_a", "--from", "published", "--base_model", "base_tiny", "--top_k", "2"]
    assert mola_main([*convert, "--output", "by_hand"]) == 0
    words = ["evaluate", "--base_model", "base_tiny", "--adapter", "by_hand", "--task", "scienceqa"]
    words += ["--data", "scienceq_test.json", "--output", "by_hand.json", "--dtype", "float32"]
    assert mola_main([*words, "--max_new_tokens", "5"]) == 0
    assert read("result.json")["outputs"] == [sample["output"] for sample in read("by_hand.json")["samples"]]


def test_adapter_of_the_research_code_is_converted_once(golden, monkeypatch, capsys):
    words = ["--test_dataset", "scienceq_test.json", "--base_model", "base_tiny", "--mola_weights", "case_a"]
    words += ["--dtype", "float32", "--max_new_tokens", 2]
    assert run_script(SCRIPT, monkeypatch, *words, "--save_path", "one.json") == 2
    line = error_line(SCRIPT, capsys)
    assert [part for part in ("`top_k`", "'case_a'", "--top_k", "2 was the default") if part not in line] == []
    assert run_script(SCRIPT, monkeypatch, *words, "--save_path", "one.json", "--top_k", "2") == 0
    stamp = Path("case_a.mola/adapter_model.safetensors").stat().st_mtime_ns
    assert run_script(SCRIPT, monkeypatch, *words, "--save_path", "two.json", "--top_k", "2,2,2,2") == 0
    assert Path("case_a.mola/adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert run_script(SCRIPT, monkeypatch, *words, "--save_path", "three.json", "--top_k", 1) == 2
    assert "case_a.mola" in error_line(SCRIPT, capsys)
    assert not Path("three.json").exists()


def test_adapter_made_with_lists_longer_than_the_model(golden, monkeypatch, capsys):
    """The research code cuts them, and its defaults have 32 numbers; it passes over names that nothing has."""
    path = Path("case_a/adapter_config.json")
    settings = read(path)
    path.write_text(
        json.dumps(settings | {"r": settings["r"] * 2, "target_modules": [*settings["target_modules"], " x"]})
    )
    words = ["--test_dataset", "scienceq_test.json", "--base_model", "base_tiny", "--mola_weights", "case_a"]
    words += ["--dtype", "float32", "--max_new_tokens", 2, "--save_path", "one.json"]
    assert run_script(SCRIPT, monkeypatch, *words, "--top_k", ",".join("2" * 8)) == 2
    assert "got 8 entries, the model has 4 layers" in error_line(SCRIPT, capsys)
    assert run_script(SCRIPT, monkeypatch, *words, "--top_k", "2,2,2,2") == 0
    assert read("case_a.mola/adapter_config.json")["r"] == settings["r"]
