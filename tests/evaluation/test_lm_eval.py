"""`mola lm-eval` on a task made here, compared with log-likelihoods computed directly."""

import json
import re
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from mola import MolaConfig, cli
from mola.evaluation.lm_eval import LmEvalOptions, lm_eval
from mola.models.loading import load_model
from mola.models.tokenizer import load_tokenizer
from tests.serving.skills_folders import KINDS, NO_KIND, PROMPTS, make_skills_folder

pytest.importorskip("lm_eval", reason="needs the extra lm-eval: pip install 'mola-peft[lm-eval]'")

# The harness and the libraries under it warn about what they will do one day.
pytestmark = pytest.mark.filterwarnings("default")

TASK = """\
task: parity
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""
SAMPLES = [
    {"question": f"Is {7 * number} even?", "choices": ["yes", "no", "maybe so"], "label": number % 2}
    for number in range(10)
]


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory):
    """Experts that change every answer's likelihood."""
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    torch.manual_seed(1)
    model = get_peft_model(model, MolaConfig(num_experts="2468", r=4, top_k=2, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "mola_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Folder with a task of our own and its data."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "parity.jsonl"
    data.write_text("".join(json.dumps(sample) + "\n" for sample in SAMPLES), encoding="utf-8")
    (folder / "parity.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The harness keeps prepared data sets; none may stay from an earlier test run."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def likelihoods(base, adapter):
    """Log-likelihood of every choice of every sample, one forward pass each."""
    model = load_model(str(base), None if adapter is None else str(adapter), "float32", "cpu")
    tokenizer = load_tokenizer(str(base))

    def one(prompt, choice):
        tokens = torch.tensor([tokenizer(prompt + choice)["input_ids"]])
        start = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0]
        return sum(logits[place - 1].log_softmax(-1)[tokens[0, place]].item() for place in range(start, len(tokens[0])))

    return [
        [one(f"Question: {sample['question']}\nAnswer:", f" {choice}") for choice in sample["choices"]]
        for sample in SAMPLES
    ]


@pytest.mark.parametrize("with_adapter", [pytest.param(False, marks=pytest.mark.slow), True])
def test_same_as_computed_directly(tiny_model_dir, adapter, tasks, tmp_path, with_adapter, capsys):
    output = tmp_path / "result.json"
    flags = [f"--base_model={tiny_model_dir}", "--tasks=parity", f"--include_path={tasks}", "--dtype=float32"]
    flags += [f"--output={output}", "--batch_size=4", "--device=cpu", "--log_samples=true"]
    flags += [f"--adapter={adapter}"] if with_adapter else []
    assert cli.main(["lm-eval", *flags]) == 0
    assert "parity" in capsys.readouterr().out

    expected = likelihoods(tiny_model_dir, adapter if with_adapter else None)
    lines = (tmp_path / "result.parity.jsonl").read_text(encoding="utf-8").splitlines()
    found = {sample["doc_id"]: sample for sample in map(json.loads, lines)}
    for index, values in enumerate(expected):
        reported = [float(response[0]) for response in found[index]["filtered_resps"]]
        assert reported == pytest.approx(values, abs=1e-3)
    right = [
        max(range(3), key=values.__getitem__) == sample["label"]
        for values, sample in zip(expected, SAMPLES, strict=True)
    ]
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["results"]["parity"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert result["mola"]["settings"]["adapter"] == (str(adapter) if with_adapter else None)
    assert set(tmp_path.iterdir()) == {output, tmp_path / "result.parity.jsonl", tmp_path / "cache"}


def test_the_adapter_changes_the_likelihoods(tiny_model_dir, adapter):
    """Far more than the tolerance above, or it would not notice a harness that leaves the adapter out."""
    before, after = likelihoods(tiny_model_dir, None), likelihoods(tiny_model_dir, adapter)
    for row, other in zip(before, after, strict=True):
        assert max(abs(a - b) for a, b in zip(row, other, strict=True)) > 0.1


@pytest.mark.slow  # the harness reads thousands of task files first
def test_limit_and_solved_examples(tiny_model_dir, tasks):
    options = LmEvalOptions(
        str(tiny_model_dir), "parity", limit=3, include_path=str(tasks), device="cpu", num_fewshot=2
    )
    result = lm_eval(options)
    assert result["n-samples"]["parity"]["effective"] == 3
    assert result["n-shot"]["parity"] == 2


def test_each_context_asks_a_skill(tiny_model_dir, tasks, tmp_path):
    """Its continuations have the likelihoods of this skill's LoRA in the harness's own model."""
    kinds = {kind: PROMPTS[kind] for kind in ("numbers", "shouts")}
    folder = make_skills_folder(str(tiny_model_dir), tmp_path / "skills", kinds, tmp_path / "loras")
    names = ("numbers", "shouts", "base")
    rows = [{"question": NO_KIND if kind is None else prompt, "choices": ["73 HA", "No"]} for kind, prompt in KINDS]
    data = tmp_path / "kinds.jsonl"
    data.write_text("".join(json.dumps({**row, "label": 0}) + "\n" for row in rows), encoding="utf-8")
    task = TASK.replace("Question: {{{{question}}}}\\nAnswer:", "{{{{question}}}}").replace("parity", "kinds")
    (tmp_path / "kinds.yaml").write_text(task.format(data=data), encoding="utf-8")

    def scores(**changes):
        output = tmp_path / f"{changes.get('skill')}.json"
        options = LmEvalOptions(
            str(tiny_model_dir), "kinds", str(folder), include_path=str(tmp_path), output=str(output), log_samples=True
        )
        result = lm_eval(replace(options, dtype="float32", device="cpu", **changes))
        lines = output.with_name(f"{output.stem}.kinds.jsonl").read_text(encoding="utf-8").splitlines()
        found = {sample["doc_id"]: sample["filtered_resps"] for sample in map(json.loads, lines)}
        return result["mola"], [[float(response[0]) for response in found[index]] for index in range(3)]

    mola, found = scores()
    assert mola["asked"] == dict.fromkeys(sorted(names), 1)
    for index, name in enumerate(names):
        mola, alone = scores(skill=name)
        assert "asked" not in mola
        assert found[index] == pytest.approx(alone[index], abs=1e-3)
        assert all(abs(alone[other][0] - found[other][0]) > 0.01 for other in {0, 1, 2} - {index})


WRONG = [
    pytest.param({"tasks": "nosuch"}, "`tasks`.*nosuch.*lm-eval ls tasks", marks=pytest.mark.slow),
    ({"limit": 1.5}, "`limit`.*1.5"),
    ({"limit": 0}, "`limit`.*0"),
    ({"base_model": "no/such/folder"}, "`base_model`"),
    ({"adapter": "nosuch"}, "`adapter`.*'nosuch'"),
    ({"dtype": "float8"}, "`dtype`.*'float8'"),
    ({"log_samples": "true"}, "`log_samples`.*`output`"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_input_is_found_before_the_model_loads(tiny_model_dir, tasks, change, message, monkeypatch, capsys):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", pytest.fail)
    options = {"base_model": tiny_model_dir, "tasks": "parity", "include_path": tasks, **change}
    assert cli.main(["lm-eval", *(f"--{name}={value}" for name, value in options.items())]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mola lm-eval: error: ")
    assert re.search(message, error)


@pytest.mark.slow
def test_data_that_is_not_there_is_named(tiny_model_dir, tmp_path, capsys):
    (tmp_path / "parity.yaml").write_text(TASK.format(data=tmp_path / "gone.jsonl"), encoding="utf-8")
    flags = [f"--base_model={tiny_model_dir}", "--tasks=parity", f"--include_path={tmp_path}"]
    assert cli.main(["lm-eval", *flags]) == 2
    assert "gone.jsonl" in capsys.readouterr().err


def test_an_existing_result_is_kept(tiny_model_dir, tasks, tmp_path, capsys):
    output = tmp_path / "result.json"
    output.write_text("{}", encoding="utf-8")
    flags = [f"--base_model={tiny_model_dir}", "--tasks=parity", f"--include_path={tasks}", f"--output={output}"]
    assert cli.main(["lm-eval", *flags]) == 2
    assert "`overwrite`" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == "{}"


def test_a_result_that_is_no_number_is_null(tiny_model_dir, tasks, tmp_path, monkeypatch):
    """Some metrics of the harness are NaN, which JSON does not have."""
    found = {"results": {"parity": {"alias": "parity", "bits": 1.5, "perplexity": float("nan")}}, "versions": {}}
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda **arguments: found | {"n-shot": {}, "higher_is_better": {}})
    output = tmp_path / "result.json"
    lm_eval(LmEvalOptions(str(tiny_model_dir), "parity", include_path=str(tasks), output=str(output)))
    assert json.loads(output.read_text())["results"]["parity"] == {"alias": "parity", "bits": 1.5, "perplexity": None}
