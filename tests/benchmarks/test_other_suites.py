"""The suites `telemetry`, `logits`, `attention` and `redundancy`, from end to end."""

import json

import pytest
import torch
from benchmarks.command import main
from benchmarks.counting import count_operators
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks import questions
from mola import MolaConfig
from mola.insight.recorder import RouterRecorder


def run(output, *words):
    return main(["--output", str(output), *map(str, words)])


@pytest.mark.slow
def test_the_suite_telemetry(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    small = ("--batch_size", 2, "--seq_len", 12, "--num_experts", "1248", "--repeats", 2, "--dropout", 0)
    assert run(output, "--model", tiny_model_dir, "--suite", "telemetry", *small) == 0
    assert "telemetry: model" in capsys.readouterr().out
    rows = json.loads(output.read_text())["results"]["telemetry"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    for row in rows:
        assert row["routers"] == 3 * 7
        on, off = (row[f"{name}_seconds"]["samples"] for name in ("on", "off"))
        ratios = [one / other for one, other in zip(on, off, strict=True)]
        assert row["on_over_off"]["samples"] == pytest.approx(ratios)
        assert row["line_seconds"]["median"] > 0


@pytest.mark.slow
def test_the_suite_logits(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    small = ("--batch_size", 3, "--num_experts", "1248", "--repeats", 2, "--dropout", 0, "--dtype", "float32")
    assert run(output, "--model", tiny_model_dir, "--suite", "logits", *small) == 0
    assert "logits: model" in capsys.readouterr().out
    (row,) = json.loads(output.read_text())["results"]["logits"]
    assert 0 < row["needed_positions"] < row["positions"] / 2
    needed, every = (row[f"{name}_seconds"]["samples"] for name in ("needed", "all"))
    ratios = [one / other for one, other in zip(needed, every, strict=True)]
    assert row["needed_over_all"]["samples"] == pytest.approx(ratios)


def test_the_suite_attention(tiny_model_dir, tmp_path, capsys, monkeypatch):
    used, make_step = [], questions.make_step
    monkeypatch.setattr(
        questions, "make_step", lambda model, *rest: used.append(model.config) or make_step(model, *rest)
    )
    output = tmp_path / "results.json"
    small = ("--batch_size", 3, "--num_experts", "1248", "--repeats", 2, "--dropout", 0, "--dtype", "float32")
    assert run(output, "--model", tiny_model_dir, "--suite", "attention", *small) == 0
    assert "attention: model" in capsys.readouterr().out
    assert [config._attn_implementation for config in used] == ["sdpa", "eager"]  # each model has its own
    (row,) = json.loads(output.read_text())["results"]["attention"]
    eager, sdpa = (row[f"{name}_seconds"]["samples"] for name in ("eager", "sdpa"))
    ratios = [one / other for one, other in zip(eager, sdpa, strict=True)]
    assert row["eager_over_sdpa"]["samples"] == pytest.approx(ratios)


def test_watching_never_waits_for_the_device(tiny_model_dir):
    """And its operators are few: 21 routers of three sizes are reduced together."""
    config = MolaConfig(num_experts="1248", r=2, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), config).train()
    ids = torch.randint(2, 250, (2, 16))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    model(**batch).loss.backward()  # the first gradients may be stored by other operators than later ones are added
    off = count_operators(lambda: model(**batch).loss)
    recorder = RouterRecorder(model)
    on = count_operators(lambda: model(**batch).loss)
    recorder.close()
    assert on["host_syncs"] == off["host_syncs"]
    assert on["backward_operators"] == off["backward_operators"]
    # Per router its two tensors are turned there and back; per size of routers some forty.
    assert on["forward_operators"] - off["forward_operators"] < 21 * 8 + 3 * 40


@pytest.mark.slow
def test_the_suite_redundancy(tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "results.json"
    assert run(output, "--model", tiny_model_dir, "--suite", "redundancy") == 0
    assert "redundancy: num_experts 8" in capsys.readouterr().out
    rows = json.loads(output.read_text())["results"]["redundancy"]
    assert [row["features_out"] for row in rows] == [4096, 11008]
    for row in rows:
        assert row["largest_relative_difference"] < 1e-5
        assert row["direct_over_factors"] > 100
