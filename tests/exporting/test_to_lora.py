"""`mola convert --to lora`, through the command: what is written, how near it is, what is refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from mola import MolaConfig
from mola.evaluation.evaluate import EvaluateOptions, evaluate
from mola.exporting.calibration import read_general_text
from mola.exporting.convert import ConvertOptions, convert
from mola.exporting.lora_files import read_lora
from mola.exporting.mixtures import as_loras, mola_layers, replaced_by_loras
from mola.models.loading import load_model
from mola.models.meta import model_on_meta
from mola.models.tokenizer import load_tokenizer
from tests.exporting.conftest import base, load, logits, report_of, saved
from tests.versions import needs

WITHOUT_MOLA = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, lora, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora).eval()
ids = torch.arange(3, 27).view(2, 12)
with torch.no_grad():
    before = model(input_ids=ids).logits
    merged = model.merge_and_unload()(input_ids=ids).logits
assert "mola" not in sys.modules
torch.testing.assert_close(merged, before, atol=1e-5, rtol=1e-5)
torch.save(before, out)
"""


def test_fitted_lora_is_measured_and_near(tiny_model_dir, mixture, questions, tmp_path, run):
    data = ["--data", questions / "train.json", "--task", "sample", "--test", questions / "test.json"]
    flags = ["--to", "lora", "--r", 4, "--base_model", tiny_model_dir]
    printed = run(
        "convert", mixture, *flags, *data, "--device", "cpu", "--dtype", "float32", "--output", tmp_path / "fit"
    )
    run("convert", mixture, *flags, "--output", tmp_path / "mean")
    for text in ("explained, q_proj", "KL(mixture || LoRA)", "accuracy of mixture", "lora minus mixture"):
        assert text in printed
    report = report_of(tmp_path / "fit")
    assert report["rows"] == {"answer": {"fitted": 36, "held_out": 4}, "test answer": {"fitted": 0, "held_out": 12}}
    assert (report["method"], report_of(tmp_path / "mean")["method"]) == ("regression", "mean")
    assert report["accuracy"]["mixture"]["total"] == report["accuracy"]["lora"]["total"] == 12
    assert len(report["differences"]["lora"]["questions_95"]) == 2
    assert all(0 < report["divergence"][kind] < 1 for kind in ("answer", "test answer"))
    # The same rows by hand, with the mean instead of the fit.
    model = load_model(str(tiny_model_dir), str(mixture), "float32", "cpu")
    measured = convert(
        ConvertOptions(
            [str(mixture)],
            str(tmp_path / "mean2"),
            None,
            "lora",
            str(tiny_model_dir),
            rank=4,
            method="mean",
            data=str(questions / "train.json"),
            task="sample",
            dtype="float32",
            device="cpu",
        )
    )
    assert report["divergence"]["answer"] < measured.divergence["answer"]
    assert all(report["explained_by_kind"][kind] > value for kind, value in measured.by_kind().items())
    assert logits(load(tiny_model_dir, tmp_path / "fit")).shape == logits(model).shape


def test_measured_rows_that_are_also_fitted_are_noted(tiny_model_dir, mixture, questions, tmp_path, run):
    rows = json.loads((questions / "train.json").read_text(encoding="utf-8"))
    twice, mixed = tmp_path / "twice.json", tmp_path / "mixed.json"
    # One row of ten is held out: the last, rows[8].
    twice.write_text(json.dumps([{**rows[0], "id": "again"}, *rows[:9]]), encoding="utf-8")
    mixed.write_text(json.dumps([rows[0], rows[8], rows[20]]), encoding="utf-8")
    flags = ["--to", "lora", "--r", 4, "--base_model", tiny_model_dir, "--device", "cpu", "--dtype", "float32"]
    data = ["--data", twice, "--task", "sample", "--test", mixed, "--scoring", "likelihood"]
    printed = run("convert", mixture, *flags, *data, "--output", tmp_path / "fit")
    note = "1 of the 3 held-out rows of test answer have the same text as a fitted row"
    assert report_of(tmp_path / "fit")["notes"] == [note]
    assert f"note: {note}" in printed
    run("convert", mixture, *flags, *data, "--method", "mean", "--output", tmp_path / "mean")
    assert report_of(tmp_path / "mean")["notes"] == []


def test_free_text_needs_no_task(tiny_model_dir, mixture, tmp_path, run, refusal):
    words = ["Iron.", "Salt water", "Ice", "Wool and a fern"]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"instruction": "Name one.", "output": word}) + "\n" for word in words))
    flags = ["--to", "lora", "--r", 4, "--base_model", tiny_model_dir, "--device", "cpu", "--dtype", "float32"]
    flags += ["--data", data, "--test", data, "--output", tmp_path / "lora"]
    assert "is for questions with answers" in refusal("convert", mixture, *flags, "--scoring", "generate")
    run("convert", mixture, *flags)
    report = report_of(tmp_path / "lora")
    assert report["rows"] == {"answer": {"fitted": 3, "held_out": 1}, "test answer": {"fitted": 0, "held_out": 4}}
    assert set(report["loss"]["test answer"]) == {"base", "mixture", "lora"}
    assert report["accuracy"] == {}


@pytest.mark.slow
def test_data_are_read_in_the_prompts_of_the_training(tiny_model_dir, mixture, questions, tmp_path, run):
    flags = ["--to", "lora", "--r", 4, "--base_model", tiny_model_dir, "--device", "cpu", "--dtype", "float32"]
    data = ["--data", questions / "train.json", "--task", "sample", "--method", "mean"]
    measured = {}
    for trained, asked in ((None, None), (None, "alpaca"), ("alpaca", None), ("alpaca", "alpaca_short")):
        if trained:
            (mixture / "run.json").write_text(json.dumps({"template": trained}), encoding="utf-8")
        template = ["--template", asked] if asked else []
        folder = tmp_path / f"{trained}-{asked}"
        run("convert", mixture, *flags, *data, *template, "--output", folder)
        measured[trained, asked] = report_of(folder)["divergence"]
    assert measured["alpaca", None] == measured[None, "alpaca"] != measured[None, None]
    assert measured["alpaca", "alpaca_short"] == measured[None, None]  # the task's own


@pytest.mark.slow
def test_a_larger_answer_weight_brings_the_fit_nearer_on_answers(tiny_model_dir, mixture, questions, tmp_path, run):
    flags = ["--to", "lora", "--r", 4, "--base_model", tiny_model_dir, "--device", "cpu", "--dtype", "float32"]
    data = ["--data", questions / "train.json", "--task", "sample", "--limit", 20]
    weights = {"default": (), **{name: ("--answer_weight", name) for name in ("1", "10", "100")}}
    for name, weight in weights.items():
        run("convert", mixture, *flags, *data, *weight, "--output", tmp_path / name)
    fitted = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in weights}
    assert fitted["default"].keys() == fitted["1"].keys() == fitted["100"].keys()
    assert all(torch.equal(tensor, fitted["10"][key]) for key, tensor in fitted["default"].items())
    of_several_experts = [key for key in fitted["1"] if ".layers.0." not in key and "lora_" in key]
    assert len(of_several_experts) == 3 * 7 * 2
    for key in of_several_experts:
        assert not torch.allclose(fitted["1"][key], fitted["100"][key], rtol=1e-3), key
    near = {name: report_of(tmp_path / name)["divergence"]["answer"] for name in weights}
    assert near["100"] < 0.95 * near["1"]
    assert near["default"] < 0.95 * near["1"]


@pytest.mark.slow
def test_the_fit_reads_the_chosen_split(tiny_model_dir, mixture, questions, tmp_path, run):
    flags = ["--to", "lora", "--r", 4, "--base_model", tiny_model_dir, "--device", "cpu", "--dtype", "float32"]
    places = {
        "split": ("dataset.hf", "--split", "validation"),
        "file": ("validation.json",),
        "default": ("dataset.hf",),
    }
    for name, (data, *split) in places.items():
        words = ["--data", questions / data, "--task", "sample", *split, "--output", tmp_path / name]
        run("convert", mixture, *flags, *words)
    reports = {name: report_of(tmp_path / name) for name in places}
    assert reports["split"]["rows"] == reports["file"]["rows"] == {"answer": {"fitted": 1, "held_out": 1}}
    assert reports["default"]["rows"] == {"answer": {"fitted": 36, "held_out": 4}}
    for measured in ("divergence", "loss", "explained"):
        assert reports["split"][measured] == reports["file"][measured]
    assert reports["split"]["divergence"] != reports["default"]["divergence"]


OF_ONE_LETTER = """
name: letter
version: 1
template: alpaca_short
columns: [question, answer]
answer: {column: answer, words: {0: "m", 1: "W"}}
instruction: "{question}\n"
input: ""
output: "{answer}"
answer_pattern: '(m|W)'
metric: accuracy
"""


def test_accuracies_by_generation_equal_those_of_mola_evaluate(tiny_model_dir, mixture, questions, tmp_path, run):
    """Of a task whose answers an untrained model gives now and then: one of two letters, whichever comes first."""
    (tmp_path / "letter.yaml").write_text(OF_ONE_LETTER, encoding="utf-8")
    rows = [{**row, "answer": "mW"[i % 2]} for i, row in enumerate(json.loads((questions / "test.json").read_text()))]
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    source = {"task": str(tmp_path / "letter.yaml"), "test": str(tmp_path / "test.json")}
    asked = [*(word for name, value in source.items() for word in (f"--{name}", value)), "--scoring", "generate"]
    same = ["--device", "cpu", "--dtype", "float32", "--output", tmp_path / "lora"]
    run("convert", mixture, "--to", "lora", "--r", 4, "--base_model", tiny_model_dir, *asked, *same)
    report = report_of(tmp_path / "lora")
    assert report["settings"]["scoring"] == "generate"
    for name, adapter in (("lora", tmp_path / "lora"), ("mixture", mixture)):
        words = {"task": source["task"], "data": source["test"], "adapter": str(adapter)}
        alone = evaluate(
            EvaluateOptions(str(tiny_model_dir), **words, scoring="generate", device="cpu", dtype="float32")
        )
        found = report["accuracy"][name]
        assert (found["accuracy"], found["correct"], found["total"]) == (alone.accuracy, alone.correct, 12)
    assert 0 < report["accuracy"]["lora"]["correct"] < 12


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # of PEFT, when it saves
def test_the_head_is_fitted_to_every_token(tiny_model_dir, questions, tmp_path, run):
    config = MolaConfig(num_experts=2, r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    folder = saved(tiny_model_dir, tmp_path / "mixture", config)
    (tmp_path / "text.txt").write_text("Some words that nobody asked about. " * 30)
    flags = ["--to", "lora", "--r", 4, "--base_model", tiny_model_dir, "--device", "cpu", "--dtype", "float32"]
    data = ["--data", questions / "train.json", "--task", "sample", "--text", tmp_path / "text.txt"]
    run("convert", folder, *flags, *data, "--output", tmp_path / "fit")
    explained = report_of(tmp_path / "fit")["explained"]
    assert explained["base_model.model.lm_head"] > 0.9  # of rank 4 at most, as the LoRA is: what is left is the gates'


def test_a_short_test_text_and_a_whole_test_are_measured(tiny_model_dir, mixture, questions, tmp_path, run, caplog):
    caplog.set_level("INFO")
    (tmp_path / "text.txt").write_text("One piece of text.")
    flags = ["--to", "lora", "--r", 4, "--base_model", tiny_model_dir, "--device", "cpu", "--dtype", "float32"]
    data = ["--data", questions / "train.json", "--task", "sample", "--test", questions / "test.json", "--limit", 5]
    run("convert", mixture, *flags, *data, "--test_text", tmp_path / "text.txt", "--output", tmp_path / "fit")
    rows = {kind: sum(counts.values()) for kind, counts in report_of(tmp_path / "fit")["rows"].items()}
    assert rows == {"answer": 5, "test answer": 12, "other text": 1}
    assert "Only the first 5 samples of" in caplog.text
    assert "train.json: 5 samples of the task sample" in caplog.text


def test_every_piece_of_a_text_begins_with_the_begin_token(tiny_model_dir, tmp_path):
    (tmp_path / "text.txt").write_text("word " * 400)
    options = ConvertOptions(["unused"], "unused", None, "lora", str(tiny_model_dir), text=str(tmp_path / "text.txt"))
    found = read_general_text(options, "text")
    begin = load_tokenizer(tiny_model_dir).bos_token_id
    pieces = [row.ids for row in (*found.fitted, *found.held_out)]
    assert len(pieces) > 2
    assert {piece[0] for piece in pieces} == {begin}
    assert not any(begin in piece[1:] for piece in pieces)


@pytest.mark.slow
def test_the_exported_folder_loads_without_mola(tiny_model_dir, mixture, tmp_path, run):
    run("convert", mixture, "--to", "lora", "--r", 4, "--output", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    # Only layer 0, which had one expert of a larger rank, has a rank of its own.
    assert list(config["rank_pattern"].values()) == [6] * 7
    assert config["rank_pattern"] == config["alpha_pattern"]
    command = [sys.executable, "-c", WITHOUT_MOLA, tiny_model_dir, tmp_path / "lora", tmp_path / "logits.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(load(tiny_model_dir, tmp_path / "lora")))
    # What was trained in full is the same.
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (mixture, tmp_path / "lora")]
    assert torch.equal(*(each["base_model.model.lm_head.weight"] for each in tensors))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_one_expert_is_exported_exactly(tiny_model_dir, tmp_path, run, use_rslora):
    config = MolaConfig(
        num_experts=1, r=3, top_k=1, lora_alpha=5, use_rslora=use_rslora, init_lora_weights=False,
        rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 7.0}, task_type="CAUSAL_LM",
    )  # fmt: skip
    mixture = saved(tiny_model_dir, tmp_path / "one", config)
    run("convert", mixture, "--to", "lora", "--r", 3, "--base_model", tiny_model_dir, "--output", tmp_path / "lora")
    torch.testing.assert_close(
        logits(load(tiny_model_dir, tmp_path / "lora")), logits(load(tiny_model_dir, mixture)), atol=1e-5, rtol=1e-5
    )
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["rank_pattern"] == {}


def test_one_expert_everywhere_needs_no_rank(tiny_model_dir, tmp_path, run):
    config = MolaConfig(
        num_experts=1, r=[3, 4, 4, 6], top_k=1, lora_alpha=5, init_lora_weights=False, task_type="CAUSAL_LM",
        target_modules=["q_proj"],
    )  # fmt: skip
    one = saved(tiny_model_dir, tmp_path / "one", config)
    run("convert", one, "--to", "lora", "--output", tmp_path / "lora")
    found, expected = logits(load(tiny_model_dir, tmp_path / "lora")), logits(load(tiny_model_dir, one))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    # The commonest rank, to which lower ones are filled up; higher ones are kept.
    assert (settings["r"], settings["rank_pattern"]) == (4, {"model.layers.3.self_attn.q_proj": 6})
    assert report_of(tmp_path / "lora")["rank"] == 4


def test_equal_experts_are_exported_exactly(tiny_model_dir, tmp_path, run, questions):
    """Whatever the gates are, they add up to 1: mean and regression must find the one update there is."""
    config = MolaConfig(num_experts=3, r=2, top_k=2, init_lora_weights=False, task_type="CAUSAL_LM")
    folder = saved(tiny_model_dir, tmp_path / "equal", config)
    model = load(tiny_model_dir, folder)
    for layer in mola_layers(model).values():
        for part in (layer.mola_A["default"], layer.mola_B["default"]):
            part.data[:] = part.data[:1].clone()
    model.save_pretrained(folder)
    flags = ["--to", "lora", "--r", 2, "--base_model", tiny_model_dir, "--output"]
    run("convert", folder, *flags, tmp_path / "mean")
    torch.testing.assert_close(logits(load(tiny_model_dir, tmp_path / "mean")), logits(model), atol=1e-4, rtol=1e-4)
    run("convert", folder, *flags, tmp_path / "fit", "--data", questions / "train.json", "--task", "sample",
        "--dtype", "float32", "--device", "cpu")  # fmt: skip
    report = report_of(tmp_path / "fit")
    assert all(share > 0.999 for share in report["explained_by_kind"].values())
    assert report["divergence"]["answer"] < 1e-4


def test_the_measured_lora_is_the_written_one(tiny_model_dir, mixture, questions, tmp_path, run):
    """The LoRA that is measured in the mixture's place is the one that PEFT loads from the folder."""
    flags = ["--to", "lora", "--r", 4, "--base_model", tiny_model_dir, "--output", tmp_path / "lora"]
    run("convert", mixture, *flags)
    model = load(tiny_model_dir, mixture)
    before, layers = logits(model), mola_layers(model)
    path = tmp_path / "lora" / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "modules_to_save": None}))
    (weights,) = (tmp_path / "lora").glob("*.safetensors")
    tensors = load_file(weights)
    head = tensors.pop("base_model.model.lm_head.weight")
    save_file(tensors, weights)
    read = read_lora(tmp_path / "lora", model_on_meta(str(tiny_model_dir)))
    save_file({**tensors, "base_model.model.lm_head.weight": head}, weights)
    path.write_text(json.dumps(settings))
    updates = {f"base_model.model.{name}": (each.B, each.A) for name, each in read.items()}
    with replaced_by_loras(layers, as_loras(layers, updates)):
        inside = logits(model)
    torch.testing.assert_close(inside, logits(load(tiny_model_dir, tmp_path / "lora")), atol=1e-5, rtol=1e-5)
    assert torch.equal(before, logits(model))  # everything is back
    assert not torch.allclose(inside, before, atol=1e-2)


def test_some_linears_and_text(tiny_model_dir, tmp_path, run):
    config = MolaConfig(
        num_experts=2, r=2, init_lora_weights=False, target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 3],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    folder = saved(tiny_model_dir, tmp_path / "some", config)
    (tmp_path / "text.txt").write_text("Rivers carry sand to the sea, and the sea carries it along the coast. " * 30)
    flags = ["--to", "lora", "--r", 2, "--base_model", tiny_model_dir, "--text", tmp_path / "text.txt"]
    printed = run("convert", folder, *flags, "--output", tmp_path / "lora")
    assert "KL(mixture || LoRA) per text token" in printed
    model = load(tiny_model_dir, tmp_path / "lora")
    adapted = {name for name, module in model.named_modules() if name.endswith("proj") and hasattr(module, "lora_A")}
    assert sorted(int(name.split(".layers.")[1][0]) for name in adapted) == [1, 1, 3, 3]
    assert report_of(tmp_path / "lora")["rows"]["text"]["held_out"] >= 1


def test_usage_weights_come_from_the_training(tiny_model_dir, mixture, tmp_path, run, refusal):
    flags = ["--to", "lora", "--r", 2, "--base_model", tiny_model_dir, "--method", "usage", "--output"]
    assert "routing.jsonl, which training writes" in refusal("convert", mixture, *flags, tmp_path / "no")
    layers = mola_layers(load(tiny_model_dir, mixture))
    rows = [
        {
            "module": name,
            "layer_index": layer.layer_index,
            "mean_gates": [1.0] + [0.0] * (layer.num_experts["default"] - 1),
        }
        for name, layer in layers.items()
        if layer.num_experts["default"] > 1
    ]
    (mixture / "routing.jsonl").write_text(json.dumps({"modules": rows}))
    run("convert", mixture, *flags, tmp_path / "lora")
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (mixture, tmp_path / "lora")]
    name = "base_model.model.model.layers.2.mlp.up_proj"
    first = 2.0 * tensors[0][f"{name}.mola_B"][0].t() @ tensors[0][f"{name}.mola_A"][0]  # alpha 4, r 2
    torch.testing.assert_close(
        tensors[1][f"{name}.lora_B.weight"] @ tensors[1][f"{name}.lora_A.weight"], first, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--r", "0"], "`r` must be from 1 to 6"),
        (
            ["--r", "7"],
            "`r` must be from 1 to 6, the highest rank that an update of this adapter can have: got 7",
        ),
        ([], "`r` must be given with --to lora for several experts"),
        (["--r", "2", "--method", "regression"], "`method` regression needs `data` or `text`"),
        (["--r", "2", "--method", "svd"], "`method` must be one of regression, mean, usage: got 'svd'"),
        (["--r", "2", "--task", "sample"], "`task` has no effect without `data` or `test`: got 'sample'"),
        (["--r", "2", "--text", "none.txt"], "`text` cannot be read"),
        (["--r", "2", "--text", "x", "--fit_passes", "0"], "`fit_passes` must be at least 1: got 0"),
        (["--r", "2", "--text", "x", "--answer_weight", "0"], "`answer_weight` must be above 0, got 0.0"),
        (["--r", "2", "--fit_passes", "3"], "`fit_passes` has no effect without `data` or `text`: got 3"),
        (["--r", "2", "--text", "x", "--limit", "-1"], "`limit` must be at least 1: got -1"),
        (["--r", "2", "--text", "x", "--seed", "3"], "`seed` is only for --from lora, got 3"),
        (["--r", "2", "--limit", "7"], "`limit` has no effect without `data` or `text` or `test_text`: got 7"),
        (
            ["--r", "2", "--text", "x", "--method", "mean", "--answer_weight", "2"],
            "`answer_weight` is not used by `method` mean: got 2.0",
        ),
    ],
)
def test_wrong_options(mixture, no_weights_dir, tmp_path, refusal, flags, message):
    words = ["--to", "lora", "--base_model", no_weights_dir, "--output", tmp_path / "out", *flags]
    assert message in refusal("convert", mixture, *words)
    assert not (tmp_path / "out").exists()


def test_unusable_test_questions_are_refused_before_the_model_loads(
    mixture, no_weights_dir, questions, tmp_path, refusal
):
    rows = json.loads((questions / "test.json").read_text())
    words = ["--to", "lora", "--base_model", no_weights_dir, "--output", tmp_path / "out", "--r", 2]
    words += ["--scoring", "generate"]
    for change, message in (
        ({"instruction": "long " * 1200}, "must fit into the model's 1024 positions"),
        ({"answer": "none"}, "`answer` of sample"),
    ):
        (tmp_path / "test.json").write_text(json.dumps([rows[0] | change]))
        assert message in refusal("convert", mixture, *words, "--task", "sample", "--test", tmp_path / "test.json")
    words += ["--task", "sample", "--test", questions / "test.json", "--scoring", "guess"]
    assert "`scoring` must be one of" in refusal("convert", mixture, *words)


def test_wrong_sources(mixture, lora, no_weights_dir, tmp_path, refusal):
    flags = ["--to", "lora", "--r", "2", "--base_model", no_weights_dir, "--output", tmp_path / "out"]
    assert "must be a mixture of LoRA experts (MOLA)" in refusal("convert", lora("a"), *flags)
    assert "`source` must be one adapter for --to lora" in refusal("convert", mixture, lora("b"), *flags)
    path = mixture / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bias": "all"}))
    assert "`bias` of the adapter must be 'none'" in refusal("convert", mixture, *flags)


def test_layers_are_fitted_in_parts(mixture, tiny_model_dir, questions, tmp_path, run, refusal):
    """With `--fit_passes` or too little memory, later parts are fitted to the inputs of the converted ones."""
    flags = ["--to", "lora", "--r", 2, "--base_model", tiny_model_dir, "--data", questions / "train.json"]
    flags += ["--task", "sample", "--limit", 20, "--dtype", "float32", "--device", "cpu", "--output"]
    message = refusal("convert", mixture, *flags, tmp_path / "no", "--memory_gb", 1e-6)
    assert "`memory_gb` must be at least" in message
    for name, more in {"once": (), "memory": ("--memory_gb", 2e-4), "parts": ("--fit_passes", 3)}.items():
        run("convert", mixture, *flags, tmp_path / name, *more)
    found = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("once", "parts", "memory")}

    def update(name, layer, kind):
        prefix = f"base_model.model.model.layers.{layer}.{kind}.lora_"
        return found[name][f"{prefix}B.weight"] @ found[name][f"{prefix}A.weight"]

    for name in ("parts", "memory"):
        torch.testing.assert_close(update(name, 1, "self_attn.q_proj"), update("once", 1, "self_attn.q_proj"))
        assert not torch.allclose(update(name, 3, "mlp.down_proj"), update("once", 3, "mlp.down_proj"))
        near = [report_of(tmp_path / each)["divergence"]["answer"] for each in (name, "once")]
        assert near[0] < 1.5 * near[1]


def test_a_base_with_infinite_logits_gives_one_error_line(mixture, tiny_model_dir, tmp_path, refusal):
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    model = base(tiny_model_dir)
    model.model.norm.weight.data *= 1e38
    model.save_pretrained(other)
    (tmp_path / "text.txt").write_text("Some text to look at. " * 40)
    words = ["--to", "lora", "--r", 2, "--base_model", other, "--test_text", tmp_path / "text.txt"]
    message = refusal("convert", mixture, *words, "--output", tmp_path / "no")
    assert "must give finite logits to be compared" in message
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"trainable_token_indices": [3, 5]},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": r".*\.(1|3)\.mlp\.up_proj"},
    ],
)
def test_settings_that_a_lora_shares_are_kept(tiny_model_dir, tmp_path, run, settings):
    """With one expert the export is exact, so that anything lost would show."""
    config = MolaConfig(num_experts=1, top_k=1, r=2, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    folder = saved(tiny_model_dir, tmp_path / "one", config)
    if "trainable_token_indices" in settings:
        tensors = load_file(folder / "adapter_model.safetensors")
        for key in tensors:
            if "mola" not in key:
                tensors[key] = tensors[key] + 1
        model = load(tiny_model_dir, folder)
        set_peft_model_state_dict(model, tensors)
        model.save_pretrained(folder)
    run("convert", folder, "--to", "lora", "--r", 2, "--base_model", tiny_model_dir, "--output", tmp_path / "lora")
    expected = logits(load(tiny_model_dir, folder))
    torch.testing.assert_close(logits(load(tiny_model_dir, tmp_path / "lora")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_conv1d_of_gpt_2(tmp_path, run):
    torch.manual_seed(0)
    sizes = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(sizes).save_pretrained(tmp_path / "base")
    config = MolaConfig(num_experts=1, top_k=1, r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    folder = saved(tmp_path / "base", tmp_path / "one", config)
    words = ["--to", "lora", "--r", 2, "--base_model", tmp_path / "base"]
    run("convert", folder, *words, "--output", tmp_path / "lora")
    expected = logits(load(tmp_path / "base", folder))
    torch.testing.assert_close(logits(load(tmp_path / "base", tmp_path / "lora")), expected, atol=1e-4, rtol=1e-4)


@needs("peft", "0.21", "with older versions it was not tried")
def test_linears_that_peft_puts_elsewhere_are_refused_early(tmp_path, run, refusal):
    """Of DeepSeek's architectures PEFT takes `gate_proj` and the like for the stacked experts."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    rest = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(vocab_size=64, **sizes, **heads, **experts, **rest))
    model.save_pretrained(tmp_path / "base")
    linears = {"mlp": ["up_proj", "gate_proj", "down_proj"], "half": ["up_proj"], "attention": ["o_proj"]}
    for name, targets in linears.items():
        saved(tmp_path / "base", tmp_path / name, MolaConfig(num_experts=2, r=2, target_modules=targets))
    words = ["--to", "lora", "--r", 2, "--base_model", tmp_path / "base"]
    for name in ("mlp", "half"):
        message = refusal("convert", tmp_path / name, *words, "--output", tmp_path / "no")
        assert "linears that a LoRA of this architecture cannot have" in message
        assert not (tmp_path / "no").exists()
    run("convert", tmp_path / "attention", *words, "--output", tmp_path / "lora")
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
