"""The folder that a run leaves behind, what was trained and drawn, and that it repeats."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

from mola import MolaLinear, TrainOptions, train
from mola.checkpoints.recorded_base import base_model_of
from mola.cli import main
from mola.evaluation.evaluate import EvaluateOptions
from mola.models.devices import resolve_device, resolve_dtype
from mola.training.model import build_model
from mola.training.run_folder import locked
from tests.grids import slow
from tests.training.runs import NO_EVALUATION, WEIGHTS, assert_same_weights, built, losses, read_metrics, read_record


@pytest.mark.parametrize("dtype", ["float32", *slow("bfloat16")])
def test_run_folder_is_complete_and_loads_everywhere(flags, tmp_path, tiny_model_dir, dtype):
    assert main(flags(dtype=dtype, num_experts="1224", r="2", top_k="2")) == 0
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", WEIGHTS, "run.json", "metrics.jsonl"} <= names
    assert not [name for name in names if name.startswith(".")]
    record = read_record(folder)
    assert record["status"] == "finished"
    assert record["settings"]["learning_rate"] == 1e-2
    assert record["adapter_settings"]["num_experts"] == "1224"
    assert {"mola", "torch", "transformers", "peft", "python"} <= record["versions"].keys()
    assert len(record["data_fingerprints"]["train"]) == 64
    assert record["template"] == "meta"
    assert record["metrics"]["train_loss"] > 0
    assert sorted(losses(folder)) == list(range(1, record["steps"] + 1))
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["num_experts"] == [1, 2, 2, 4]
    weights = load_file(folder / WEIGHTS)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert all(weight.abs().sum() > 0 for name, weight in weights.items() if "mola_B" in name)

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = torch.arange(20).reshape(1, -1)
    with torch.no_grad():
        before = base(ids).logits
        one = PeftModel.from_pretrained(base, folder).eval()(ids).logits
        two = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    assert torch.equal(one, two)
    assert (one - before).abs().max() > 1e-2


def test_use_of_experts_is_recorded_unless_it_is_switched_off(flags, tmp_path, tiny_model_dir):
    options = {"num_experts": "1224", "logging_steps": 2, "max_steps": 4, **NO_EVALUATION}
    assert main(flags(tmp_path / "on", **options)) == 0
    lines = [json.loads(line) for line in (tmp_path / "on" / "routing.jsonl").read_text("utf-8").splitlines()]
    entries = [entry for entry in read_metrics(tmp_path / "on") if "loss" in entry]
    assert [line["step"] for line in lines] == [entry["step"] for entry in entries] == [2, 4]
    assert [len(line["modules"]) for line in lines] == [3 * 7] * 2
    assert all(0 < entry["experts/balance"] <= 1 for entry in entries)
    assert main(flags(tmp_path / "off", **options, expert_telemetry="false")) == 0
    assert main(flags(tmp_path / "lora", **{**options, "num_experts": "1", "max_steps": 2})) == 0
    for name in ("off", "lora"):
        assert not (tmp_path / name / "routing.jsonl").exists()
        assert not [key for entry in read_metrics(tmp_path / name) for key in entry if key.startswith("experts/")]
    assert_same_weights(tmp_path / "on", tmp_path / "off")


def test_base_keeps_its_dtype_and_its_values(flags, tiny_model_dir, monkeypatch):
    """The very model that was trained, looked at after training."""
    models = []
    monkeypatch.setattr(
        "mola.training.train.build_model", lambda *given: models.append(build_model(*given)) or models[0]
    )
    assert main(flags(dtype="bfloat16", max_steps=2, num_experts=2, **NO_EVALUATION)) == 0
    trained = dict(models[0].named_parameters())
    experts = {name for name in trained if ".mola_" in name}
    assert {trained[name].dtype for name in experts} == {torch.float32}
    assert {name for name in trained if trained[name].requires_grad} == experts
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    before = dict(base.named_parameters())
    after = {name.removeprefix("base_model.model.").replace(".base_layer", ""): trained[name] for name in trained}
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name].cpu(), tensor), name


def test_building_draws_the_experts_and_routers_alone(tiny_model_dir, tmp_path):
    """No random number is spent on weights that are then replaced: drawing the same by hand ends in the same state."""
    options = TrainOptions(
        base_model=str(tiny_model_dir), output_dir=str(tmp_path), dtype="float32", num_experts="2468", use_cpu=True
    )
    model = built(options)
    state = torch.get_rng_state()
    set_seed(options.seed)
    layers = [module for module in model.modules() if isinstance(module, MolaLinear)]
    assert len(layers) == 28
    for layer in layers:
        bound = layer.in_features**-0.5
        for drawn in (layer.mola_A["default"], layer.mola_router["default"]):
            assert torch.equal(drawn, torch.empty_like(drawn).uniform_(-bound, bound))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_and_evaluation_choose_the_same_dtype(tmp_path):
    assert TrainOptions.dtype == EvaluateOptions.dtype == "auto"
    options = TrainOptions(base_model="x", output_dir=str(tmp_path))
    chosen, _ = resolve_dtype("auto", resolve_device(None))
    assert options.base_dtype == str(chosen).removeprefix("torch.")


def test_same_seed_gives_the_same_weights_and_another_seed_does_not(flags, tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert main(flags(tmp_path / name, seed=seed, lora_dropout=0.1, num_train_epochs=1, **NO_EVALUATION)) == 0
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    first, other = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "c" / WEIGHTS)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_options_of_the_caller_stay_as_they_are(tiny_model_dir, rows_file, tmp_path):
    options = TrainOptions(
        base_model=str(tiny_model_dir),
        data=str(rows_file),
        output_dir=str(tmp_path / "run"),
        template="meta",
        dtype="float32",
        max_steps=2,
        disable_tqdm=True,
    )
    before = options.to_dict()
    result = train(options)
    assert options.to_dict() == before
    assert (result.status, result.steps, result.best_checkpoint) == ("finished", 2, None)
    assert result.trainable_parameters == sum(w.numel() for w in load_file(tmp_path / "run" / WEIGHTS).values())


def test_two_runs_cannot_share_a_folder(flags, tmp_path, error_line):
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder):
        assert "another one is at work in" in error_line(flags(max_steps=1, warmup_steps=0, **NO_EVALUATION))
        assert [*folder.iterdir()] == []
    assert main(flags(max_steps=1, warmup_steps=0, **NO_EVALUATION)) == 0
    with locked(folder):  # nothing stays behind
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_folder_of_the_base_model_is_recorded_by_its_absolute_path(flags, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_model_dir.parent)
    assert main(flags(base_model=tiny_model_dir.name, eval_strategy="no", max_steps=1)) == 0
    monkeypatch.chdir("/")
    assert base_model_of(None, [tmp_path / "run"]) == str(tiny_model_dir)
    checkpoint = next((tmp_path / "run").glob("checkpoint-*"))
    assert base_model_of(None, [checkpoint]) == str(tiny_model_dir)
