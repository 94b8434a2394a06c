"""`attn_implementation` of `mola train`: the model computes with it."""

import pytest

from mola.cli import main
from mola.training import model
from mola.training.options import TrainOptions
from tests.training.runs import NO_EVALUATION, losses, read_record


def test_training_uses_attn_implementation(flags, tmp_path, monkeypatch):
    built = []
    build = model.build_model
    monkeypatch.setattr("mola.training.train.build_model", lambda *given: built.append(build(*given)) or built[-1])
    for name in ("eager", "sdpa"):
        more = {"attn_implementation": name, "lora_dropout": 0, "num_train_epochs": 1}
        assert main(flags(tmp_path / name, **more, **NO_EVALUATION)) == 0
        assert built[-1].config._attn_implementation == name
        assert read_record(tmp_path / name)["settings"]["attn_implementation"] == name
    eager, sdpa = (list(losses(tmp_path / name).values()) for name in ("eager", "sdpa"))
    assert eager == pytest.approx(sdpa, rel=1e-3)


def test_default_attention_is_the_models(tiny_model_dir, tmp_path):
    options = TrainOptions(base_model=str(tiny_model_dir), output_dir=str(tmp_path), dtype="float32")
    assert model.build_model(options, model.base_config(options)).config._attn_implementation == "sdpa"
