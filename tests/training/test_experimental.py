"""Experimental settings through the commands: trained, trained further, inspected, exported, evaluated."""

import json

import pytest

from mola.cli import main
from tests.training.runs import NO_EVALUATION, losses, read_record

SETTINGS = [{"router": "top_k_constant"}, {"router": "sparsegen", "sparsegen_lambda": -0.5}, {"shared_a": True}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_commands(settings, flags, tmp_path, tiny_model_dir, rows_file, capsys):
    run, again = tmp_path / "run", tmp_path / "again"
    options = {"experimental": json.dumps(settings), "num_experts": "4,", "r": 2, "lora_dropout": 0}
    assert main(flags(**options, num_train_epochs=4, **NO_EVALUATION)) == 0
    found = losses(run)
    assert found[max(found)] < 0.95 * found[1]
    record = read_record(run)
    assert record["trainable_parameters"] == record["allocation"]["trainable_parameters"]
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    assert {name: config[name] for name in settings} == settings
    assert main(flags(again, adapter=run, max_steps=1, warmup_steps=0, **NO_EVALUATION)) == 0
    assert losses(again)[1] < found[1]
    common = ["--base_model", str(tiny_model_dir), "--device", "cpu"]
    data = ["--data", str(rows_file)]
    commands = [
        ["report", str(run), "--output", str(tmp_path / "report.html")],
        ["inspect", "--adapter", str(run), *data, *common, "--limit", "2", "--leave_one_out", "layers"],
        ["generate", "--adapter", str(run), *common, "--prompt", "Count", "--max_new_tokens", "2"],
        ["convert", str(run), "--to", "lora", "--r", "8", *common[:2], "--output", str(tmp_path / "lora")],
    ]
    for words in commands:
        assert main(words) == 0, capsys.readouterr().err


def test_commands_that_change_experts_name_a_shared_A(flags, tmp_path, capsys):
    assert main(flags(experimental='{"shared_a": true}', max_steps=1, warmup_steps=0, **NO_EVALUATION)) == 0
    run = str(tmp_path / "run")
    for words, message in (
        (["reallocate", run, "--num_experts", "3,"], "share one (`shared_a`)"),
        (["convert", run, "--to", "published"], "`shared_a` cannot be expressed in the research code's format"),
    ):
        assert main([*words, "--output", str(tmp_path / "new")]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "soft"}, "`router` must be one of ['top_k_softmax', 'top_k_constant'"),
        ({"router": "sparsegen", "sparsegen_lambda": 1}, "`sparsegen_lambda` must be a number below 1, got 1"),
        ({"sparsegen_lambda": 0.5}, "`sparsegen_lambda` is only used with `router` 'sparsegen': got 0.5 with"),
        ({"r": 3}, "`experimental` may have the keys router, sparsegen_lambda, shared_a: got r."),
        ({"shared_a": 1}, "`shared_a` must be one of [False, True], got 1"),
    ],
    ids=str,
)
def test_wrong_values_are_one_line(settings, message, flags, error_line):
    assert message in error_line(flags(experimental=json.dumps(settings)))
