"""`mola inspect`: what it reports is what the layers do and hold."""

import contextlib
import io
import json
import shutil
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from mola import MolaConfig, MolaError, MolaLinear, load_model, load_tokenizer
from mola.cli import main
from mola.data.prepare import PrepareOptions, prepare
from mola.data.tasks import load_task
from mola.data.templates import get_template
from mola.insight.inspection import measure_redundancy
from mola.insight.recorder import gates_of_tokens
from mola.models.prompts import trained_settings
from mola.reporting.inspect import InspectOptions, _task_of, inspect
from tests.conftest import save_adapter
from tests.reporting.pages import Page


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    prepare(PrepareOptions("sample", str(folder), train_size=2, validation_size=4, test_size=6))
    return folder / "test.json"


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory):
    config = MolaConfig(num_experts=[1, 2, 3, 4], top_k=[1, 2, 2, 2], r=2, init_lora_weights=False)
    return save_adapter(tiny_model_dir, tmp_path_factory.mktemp("adapter"), config)


def run(base, adapter, data, *more):
    words = ("--base_model", base, "--adapter", adapter, "--data", data, "--task", "sample", "--device", "cpu", *more)
    return main(["inspect", *map(str, words)])


@pytest.fixture(scope="module")
def inspected(tiny_model_dir, adapter, sample, tmp_path_factory):
    """One inspection with everything: its result, its page, and what it printed."""
    folder = tmp_path_factory.mktemp("inspected") / "new"
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    words = ("--limit", 6, "--examples", 2, "--leave_one_out", "layers", "--leave_one_out_limit", 2)
    words += ("--json", folder / "experts.json", "--html", folder / "experts.html")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert run(tiny_model_dir, adapter, sample, *words) == 0
    page = Page((folder / "experts.html").read_text(encoding="utf-8"))
    found = json.loads((folder / "experts.json").read_text())
    out.seek(0)
    err.seek(0)
    return SimpleNamespace(folder=folder, found=found, page=page, out=out.read(), err=err.read())


def test_use_and_agreement(inspected):
    found, usage = inspected.found, inspected.found["usage"]
    assert found["samples"] == found["settings"]["limit"] == 6
    assert "6 samples" in inspected.out
    assert "agreement" in inspected.out
    assert "…" not in inspected.out  # tables are whole, also in a pipe
    assert {"all", "prompt", "answer"} < set(usage)
    assert any(name.startswith("category=") for name in usage)
    for name in ("all", "prompt", "answer"):
        assert len(usage[name]) == len(found["redundancy"]) == 3 * 7
    for whole, prompt, answer in zip(usage["all"], usage["prompt"], usage["answer"], strict=True):
        assert whole["num_tokens"] == prompt["num_tokens"] + answer["num_tokens"]
        assert sum(whole["shares"]) == pytest.approx(2)
        assert 0 < whole["entropy"] < 1
    for kind in ("category=", "token="):
        parts = [rows[0]["num_tokens"] for name, rows in usage.items() if name.startswith(kind)]
        assert sum(parts) == usage["all"][0]["num_tokens"]
    assert {"token=word", "token=number", "token=punctuation", "token=space", "token=special"} <= set(usage)
    agreement = found["agreement"]
    assert agreement["modules"] == [row["module"] for row in usage["all"]]
    assert len(agreement["cramers_v"]) == len(agreement["cramers_v"][0]) == 3 * 7
    assert all(0 <= value <= 1 for row in agreement["cramers_v"] for value in row)


def test_examples_are_spread_over_the_samples(inspected, sample):
    rows, found = json.loads(sample.read_text()), inspected.found["examples"]
    assert [example["id"] for example in found] == [rows[0]["id"], rows[3]["id"]]
    for example, row in zip(found, (rows[0], rows[3]), strict=True):
        assert row["instruction"] in example["prompt"]
        assert example["answer"] == row["output"]
        assert example["groups"]["category"] == row["category"]
        assert len(example["experts"]) == 3 * 7
        for each in example["experts"]:
            assert len(each["mean_gates"]) == each["layer_index"] + 1
            assert sum(each["mean_gates"]) == pytest.approx(1, abs=1e-5)


def test_leave_one_out(inspected):
    found = inspected.found
    assert "9 experts and 2 samples take 20 forward passes" in inspected.err
    assert "loss" in inspected.out
    assert found["leave_one_out_baseline"]["samples"] == 2
    assert found["leave_one_out_baseline"]["loss"] > 0
    assert [(row["layer_index"], row["expert"]) for row in found["leave_one_out"]] == [
        (layer, expert) for layer in (1, 2, 3) for expert in range(layer + 1)
    ]
    assert {row["module"] for row in found["leave_one_out"]} == {None}
    assert any(row["loss_change"] != 0 for row in found["leave_one_out"])


def test_a_page_without_a_run(inspected, tiny_model_dir, adapter, sample):
    file, page = inspected.folder / "experts.html", inspected.page
    assert f"Open {file} in a browser" in inspected.out
    titles = ["Experts by layer", "Which experts work", "How alike experts are", "How routers agree"]
    assert [node.text for node in page.root.all("h2")] == [*titles, "What an expert is worth", "Samples"]
    assert len(page.section("samples").all("details")) == 2
    assert json.loads(sample.read_text())[0]["instruction"].splitlines()[0] in page.section("samples").text
    assert "mola train" not in page.root.text
    with pytest.raises(MolaError, match="`html` must be a new file"):
        inspect(InspectOptions(str(tiny_model_dir), adapter=str(adapter), data=str(sample), html=str(file)))


def test_text_without_a_prompt(tiny_model_dir, adapter, tmp_path):
    """Of a tokenizer that puts no token in front, as SmolLM2's: no token is the prompt's."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save_pretrained(base)
    data = tmp_path / "text.jsonl"
    data.write_text('{"id": "1", "instruction": null, "input": "", "output": "Some text to read."}\n')
    output = tmp_path / "seen.json"
    assert run(base, adapter, data, "--task", "openorca", "--json", output) == 0
    usage = json.loads(output.read_text())["usage"]
    assert "prompt" not in usage
    assert usage["answer"] == usage["all"]


def test_a_group_named_token_is_refused(no_weights_dir, adapter, sample, tmp_path, capsys):
    text = files("mola.data.tasks").joinpath("sample.yaml").read_text(encoding="utf-8")
    (tmp_path / "own.yaml").write_text(text.replace("groups: [category]", "groups: [token]"), encoding="utf-8")
    assert run(no_weights_dir, adapter, sample, "--task", tmp_path / "own.yaml") == 2
    assert "must not have `token`" in capsys.readouterr().err


def test_an_adapter_without_routers_is_refused_before_the_weights_are_read(
    tiny_model_dir, no_weights_dir, sample, tmp_path, capsys
):
    adapter = save_adapter(tiny_model_dir, tmp_path / "lora", LoraConfig(target_modules=["q_proj"]))
    assert run(no_weights_dir, adapter, sample) == 2
    assert "no module of" in capsys.readouterr().err


def test_router_outputs_that_are_not_finite_are_refused(tiny_model_dir, adapter, sample, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    model.model.layers[1].mlp.down_proj.weight.data *= 1e38
    model.save_pretrained(base)
    assert run(base, adapter, sample, "--dtype", "float32", "--json", tmp_path / "result") == 2
    assert "router decisions must be finite numbers" in capsys.readouterr().err
    assert not (tmp_path / "result").exists()


def test_a_loss_that_is_not_finite_is_refused(tiny_model_dir, adapter, sample, tmp_path, capsys):
    """Behind the last router: what they decide is finite."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    model.lm_head.weight.data[0, 0] = torch.nan
    model.save_pretrained(base)
    flags = ("--dtype", "float32", "--leave_one_out", "layers", "--json", tmp_path / "result")
    assert run(base, adapter, sample, *flags) == 2
    assert "the model's loss must be a finite number" in capsys.readouterr().err


def test_an_adapter_saved_by_pickle_has_all_sections(inspected, tiny_model_dir, adapter, sample, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(adapter, other, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(adapter / "adapter_model.safetensors"), other / "adapter_model.bin")
    config = json.loads((other / "adapter_config.json").read_text())
    del config["weights_sha256"]
    (other / "adapter_config.json").write_text(json.dumps(config))
    assert run(tiny_model_dir, other, sample, "--limit", 1, "--html", tmp_path / "other.html") == 0
    page = Page((tmp_path / "other.html").read_text())
    for key in ("allocation", "redundancy"):
        assert page.section(key).text == inspected.page.section(key).text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--leave_one_out", "experts"), "`leave_one_out` must be one of none, layers, modules: got 'experts'"),
        (("--leave_one_out_limit", 0), "`leave_one_out_limit` must be at least 1"),
        (("--limit", 0), "`limit` must be at least 1"),
        (("--examples", -1), "`examples` must be at least 0"),
        (("--split", "validation"), "`split` ('validation') must be left out"),
    ],
)
def test_wrong_options_are_refused(tiny_model_dir, adapter, sample, capsys, words, message):
    assert run(tiny_model_dir, adapter, sample, *words) == 2
    assert message in capsys.readouterr().err


def test_the_task_defaults_to_that_of_the_training(tiny_model_dir, adapter, sample, tmp_path):
    for place, groups in (("none", set()), ("trained", {"category"})):
        folder = shutil.copytree(adapter, tmp_path / place)
        if groups:
            (folder / "run.json").write_text('{"settings": {"task": "sample"}}', encoding="utf-8")
        words = [folder, "--data", sample, "--limit", 1, "--device", "cpu"]
        assert main(["inspect", *map(str, words), "--template", "alpaca", "--json", str(folder / "experts.json")]) == 0
        found = json.loads((folder / "experts.json").read_text())["examples"]
        assert {name for example in found for name in example["groups"]} == groups


def test_the_task_of_a_checkpoint_and_a_moved_task(no_weights_dir, adapter, tmp_path, caplog):
    run_dir = tmp_path / "run"
    checkpoint = shutil.copytree(adapter, run_dir / "checkpoint-2")
    options = InspectOptions(str(no_weights_dir), str(checkpoint), "data")
    for task, name in (("sample", "sample"), ("moved.yaml", None)):
        (run_dir / "run.json").write_text(json.dumps({"settings": {"task": task}}), encoding="utf-8")
        found = _task_of(options, trained_settings(checkpoint)["task"])
        assert (found and found.name) == name
    assert "The task of the training, moved.yaml, cannot be found: groups are left out" in caplog.text


def test_data_of_another_kind_than_the_task_of_the_training(tiny_model_dir, no_weights_dir, adapter, tmp_path, caplog):
    caplog.set_level("INFO")
    run_dir, data = shutil.copytree(adapter, tmp_path / "run"), tmp_path / "mine.jsonl"
    (run_dir / "run.json").write_text(json.dumps({"settings": {"task": "sample"}}), encoding="utf-8")
    row = {"question": "Where do ferns grow?", "answer": "In shade.", "category": "Plants"}
    data.write_text(json.dumps(row), encoding="utf-8")
    found = inspect(InspectOptions(str(tiny_model_dir), str(run_dir), str(data), device="cpu"))
    assert "mine.jsonl has no column `choices`, which the task of the training, sample, reads." in caplog.text
    assert "1 questions with answers" in caplog.text
    assert not any(name.startswith("category=") for name in found["usage"])
    base = str(no_weights_dir)
    with pytest.raises(MolaError, match="no column `choices`, which the task `sample` needs"):
        inspect(InspectOptions(base, str(run_dir), str(data), task="sample"))
    data.write_text('{"ask": "Where do ferns grow?", "reply": "In shade."}')
    with pytest.raises(MolaError, match="no column `question`, which the task `sample` needs"):
        inspect(InspectOptions(base, str(run_dir), str(data)))


def test_shares_equal_the_gates_of_one_sample(tiny_model_dir, adapter, sample, tmp_path):
    """Of one sample, from its text."""
    output = tmp_path / "experts.json"
    assert run(tiny_model_dir, adapter, sample, "--limit", 1, "--json", output, "--dtype", "float32") == 0
    [row] = json.loads(sample.read_text())[:1]
    model = load_model(tiny_model_dir, adapter, dtype="float32", device="cpu")
    tokenizer = load_tokenizer(tiny_model_dir)
    text = get_template(load_task("sample").template).prompt(row["instruction"], row["input"]) + row["output"]
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    expected = {each.module: (each.gates > 0).double().mean(0).tolist() for each in gates_of_tokens(model, ids)}
    found = {row["module"]: row["shares"] for row in json.loads(output.read_text())["usage"]["all"]}
    assert found == {module: pytest.approx(shares) for module, shares in expected.items()}


def test_redundancy_equals_that_of_the_weights(tiny_model_dir, adapter):
    model = load_model(tiny_model_dir, adapter, dtype="float32", device="cpu")
    found = {row.module: row for row in measure_redundancy(model)}
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    assert isinstance(layer, MolaLinear)
    experts_A, experts_B = layer.mola_A["default"], layer.mola_B["default"]
    first, second = (layer.scaling["default"] * experts_B[e].t() @ experts_A[e] for e in (0, 1))
    row = found["base_model.model.model.layers.1.mlp.up_proj"]
    assert row.distance == pytest.approx((first - second).norm().item(), rel=1e-5)
    assert 0 <= row.input_overlap <= 1


def test_new_experts_have_no_output_directions(tiny_model_dir, sample, tmp_path, capsys):
    adapter = save_adapter(tiny_model_dir, tmp_path / "new", MolaConfig(num_experts=2, r=2))
    assert run(tiny_model_dir, adapter, sample, "--limit", 1, "--json", tmp_path / "experts.json", "--examples", 0) == 0
    found = json.loads((tmp_path / "experts.json").read_text())
    assert found["examples"] == []
    rows = found["redundancy"]
    assert {row["distance"] for row in rows} == {0.0}
    assert {row["output_overlap"] for row in rows} == {None}
    assert "nan" not in capsys.readouterr().out


def test_split_filters_and_template_choose_rows_and_prompts(tiny_model_dir, adapter, sample, tmp_path, capsys):
    output, page = tmp_path / "experts.json", tmp_path / "experts.html"
    chosen = ("--split", "validation", "--filters", '{"category": "Tense"}', "--template", "alpaca")
    words = (tiny_model_dir, adapter, sample.parent / "dataset.hf", *chosen, "--json", output, "--html", page)
    assert run(*words) == 0
    assert "2 samples" in capsys.readouterr().out
    rows = json.loads((sample.parent / "validation.json").read_text())
    assert [row["category"] == "Tense" for row in rows] == [False, False, True, True]
    prompts = [get_template("alpaca").prompt(row["instruction"], row["input"]) for row in rows[2:]]
    found = json.loads(output.read_text())
    assert found["samples"] == 2
    assert [example["prompt"] for example in found["examples"]] == prompts
    assert [example["answer"] for example in found["examples"]] == [row["output"] for row in rows[2:]]
    tokenizer = load_tokenizer(tiny_model_dir)
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert {row["num_tokens"] for row in found["usage"]["prompt"]} == {sum(lengths)}

    before = output.read_bytes(), page.read_bytes()
    assert run(*words, "--limit", 1) == 2
    assert "must be a new file" in capsys.readouterr().err
    assert (output.read_bytes(), page.read_bytes()) == before
    assert run(*words, "--limit", 1, "--overwrite") == 0
    again = json.loads(output.read_text())
    assert (again["samples"], [example["prompt"] for example in again["examples"]]) == (1, prompts[:1])
    assert again["leave_one_out"] is again["leave_one_out_baseline"] is None
    assert len(Page(page.read_text()).section("samples").all("details")) == 1


def test_modules_with_other_tokens_count_in_all_only(tiny_model_dir, adapter, sample, tmp_path, monkeypatch):
    """As each expert of a base model's own does, if it is a linear."""
    name = {}

    def routed(model, ids):
        first, *others = gates_of_tokens(model, ids)
        name["first"] = first.module
        return [first._replace(gates=first.gates[:3], entropies=first.entropies[:3]), *others]

    monkeypatch.setattr("mola.insight.inspection.gates_of_tokens", routed)
    output = tmp_path / "experts.json"
    assert run(tiny_model_dir, adapter, sample, "--limit", 2, "--json", output, "--examples", 1) == 0
    found = json.loads(output.read_text())
    (first,) = [row for row in found["usage"]["all"] if row["module"] == name["first"]]
    assert first["num_tokens"] == 2 * 3
    assert name["first"] not in {row["module"] for row in found["usage"]["answer"]}
    assert len(found["usage"]["answer"]) == len(found["usage"]["all"]) - 1
    assert name["first"] not in {row["module"] for example in found["examples"] for row in example["experts"]}
