"""`attn_implementation` of `mola train`: it is what computes, and what cannot is refused before weights load."""

import importlib.util

import pytest

from mola.cli import main
from mola.training import setup
from mola.training.options import TrainOptions
from tests.training.runs import NO_EVALUATION, losses, read_record

WITHOUT_FLASH = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")


def test_the_model_trains_with_the_attention_asked_for(flags, tmp_path, monkeypatch):
    built = []
    build = setup.build_model
    monkeypatch.setattr("mola.training.train.build_model", lambda *given: built.append(build(*given)) or built[-1])
    for name in ("eager", "sdpa"):
        more = {"attn_implementation": name, "lora_dropout": 0, "num_train_epochs": 1}
        assert main(flags(tmp_path / name, **more, **NO_EVALUATION)) == 0
        assert built[-1].config._attn_implementation == name
        assert read_record(tmp_path / name)["settings"]["attn_implementation"] == name
    eager, sdpa = (list(losses(tmp_path / name).values()) for name in ("eager", "sdpa"))
    assert eager == pytest.approx(sdpa, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "dtype", "cure"),
    [
        ("nonsense", "float32", "such as sdpa or eager"),
        ("flash_attention_2", "float32", "--dtype bfloat16"),
        pytest.param("flash_attention_2", "bfloat16", "installed", marks=WITHOUT_FLASH),
    ],
)
def test_attention_that_cannot_compute_here_is_refused(flags, error_line, monkeypatch, name, dtype, cure):
    monkeypatch.setattr(setup, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    line = error_line(flags(attn_implementation=name, dtype=dtype, use_cpu="true"))
    assert f"`attn_implementation` {name!r}" in line or f"{name!r} cannot be used" in line
    assert cure in line


def test_without_the_option_the_model_decides(tiny_model_dir, tmp_path):
    options = TrainOptions(base_model=str(tiny_model_dir), output_dir=str(tmp_path), dtype="float32")
    assert setup.build_model(options).config._attn_implementation == "sdpa"
