"""The command that looks at kept adapters: on a tiny mixture and a tiny LoRA, and its parts."""

import json

import pytest
import torch
from benchmarks.effective_experts import gates_over_training, main, measure
from peft import get_peft_model

from mola import MolaConfig, TrainOptions, train
from mola.data.prepare import PrepareOptions, prepare
from mola.data.tokenized import IGNORED
from tests.conftest import save_adapter


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory):
    """A folder with data, and runs of a mixture and of a LoRA."""
    folder = tmp_path_factory.mktemp("runs")
    prepare(PrepareOptions("sample", str(folder / "data"), train_size=8, validation_size=4, test_size=5))
    for name, settings in {
        "mixture": {"num_experts": "1234", "r": "2"},
        "lora": {"num_experts": "1", "r": "5"},
    }.items():
        options = TrainOptions(
            **settings,
            base_model=str(tiny_model_dir),
            task="sample",
            data=str(folder / "data" / "dataset.hf"),
            output_dir=str(folder / name),
            max_steps=2,
            logging_steps=1,
            per_device_train_batch_size=2,
            do_eval=False,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            learning_rate=1e-2,
            use_cpu=True,
            disable_tqdm=True,
        )
        train(options)
    return folder


def words(runs, output, *adapters):
    return [*adapters, "--data", str(runs / "data" / "test.json"), "--device", "cpu", "--output", str(output)]


def test_a_mixture_beside_a_lora(runs, tmp_path, capsys):
    output = tmp_path / "seen.json"
    arguments = words(runs, output, str(runs / "mixture"), f"plain={runs / 'lora'}")
    assert main([*arguments, "--batch_size", "2", "--limit", "3"]) == 0
    assert capsys.readouterr().out == f"Written to {output}.\n"
    record = json.loads(output.read_text())
    assert str(runs) not in output.read_text()
    assert record["samples"] == 3
    mixture, lora = record["adapters"]
    assert [mixture["name"], lora["name"]] == ["mixture", "plain"]
    assert len(mixture["linears"]) == len(lora["linears"]) == 28
    assert {row["tokens"] for row in mixture["linears"]} == {record["tokens"]}
    for row in lora["linears"]:
        assert row["effective_experts"] == {"mean": 1, "p10": 1, "p50": 1, "p90": 1}
        assert row["first_gate_above"] == 1
        assert 1 <= row["effective_rank"]["mean"] <= 5
        assert row["gradient"]["shares"] == [1]
        assert row["training_gates"] is None
    for row in mixture["linears"]:
        assert row["num_experts"] == row["layer_index"] + 1
        assert len(row["gradient"]["A"]) == row["num_experts"]
        assert sum(row["gradient"]["shares"]) == pytest.approx(1)
        assert 1 <= row["gradient"]["effective_experts"] <= row["num_experts"] + 1e-6
        if row["num_experts"] == 1:
            assert row["training_gates"] is None
        else:
            assert sum(row["training_gates"]) == pytest.approx(1, abs=1e-4)
            assert 1 <= row["effective_experts"]["mean"] <= 2
    assert main(arguments) == 2
    assert "`output` must be a new file" in capsys.readouterr().err


def test_gradients_are_those_of_a_training_batch(tiny_model):
    model = get_peft_model(tiny_model, MolaConfig(num_experts=3, r=2, init_lora_weights=False)).eval()
    samples = []
    for answer in (1, 4, 2):  # numbers of answer tokens
        ids = torch.randint(2, 250, (9,)).tolist()
        samples.append({"input_ids": ids, "labels": [IGNORED] * (9 - answer) + ids[9 - answer :]})
    measured = measure(model, samples, 2, "any")
    parameters = dict(model.named_parameters())
    sums, losses = {}, []
    for batch in (samples[:2], samples[2:]):
        ids, labels = (torch.tensor([each[key] for each in batch]) for key in ("input_ids", "labels"))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        for row in measured["linears"]:
            for key in "AB":
                parameter = parameters[f"{row['module']}.mola_{key}.default"]
                norms = parameter.grad.flatten(1).norm(dim=1)
                sums[row["module"], key] = sums.get((row["module"], key), 0) + norms / 2
                parameter.grad = None
    assert measured["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    for row in measured["linears"]:
        for key in "AB":
            assert row["gradient"][key] == pytest.approx(sums[row["module"], key].tolist(), rel=1e-3, abs=1e-8)


def test_a_new_adapter_has_a_rank_of_zero_and_gradients_of_b_alone(tiny_model):
    model = get_peft_model(tiny_model, MolaConfig(num_experts=2, r=2)).eval()
    ids = torch.randint(2, 250, (6,)).tolist()
    [row, *_] = measure(model, [{"input_ids": ids, "labels": ids}], 1, "new")["linears"]
    assert row["effective_rank"]["p90"] == row["relative_norm"]["p90"] == row["mean_update_rank"] == 0
    assert row["gradient"]["A"] == [0, 0]
    assert max(row["gradient"]["B"]) > 0


def test_training_gates_are_weighted_by_tokens():
    def line(tokens, *gates):
        return {"modules": [{"module": "q_proj", "num_tokens": tokens, "mean_gates": list(gates)}]}

    lines = [line(10, 1.0, 0.0), line(30, 0.5, 0.5), line(7, None, None)]
    assert gates_over_training(lines) == {"q_proj": pytest.approx([0.625, 0.375])}


def test_wrong_input_is_an_error_of_one_line(runs, tiny_model_dir, tmp_path, capsys):
    output = tmp_path / "seen.json"
    mixture = str(runs / "mixture")
    assert main(words(runs, output, mixture, mixture)) == 2
    assert "two adapters named 'mixture'" in capsys.readouterr().err
    other = save_adapter(tiny_model_dir, tmp_path / "other", MolaConfig(num_experts=2, r=2))
    (other / "run.json").write_text(json.dumps({"template": "plain", "settings": {"task": "sample"}}))
    assert main(words(runs, output, mixture, str(other))) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "must name adapters that read the same tokens" in error
    assert not output.exists()
