import json
import logging
import math
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from mola import MolaConfig
from mola.data.encode import data_fingerprint
from mola.data.prepare import load_examples
from mola.data.tasks import load_task
from mola.data.templates import get_template
from mola.errors import MolaError
from mola.evaluate import EvaluateOptions, evaluate, evaluate_examples, main
from mola.evaluation import predicting
from mola.evaluation.choices import answer_options, answer_prefix
from mola.evaluation.partial import PartialResults

SUBJECTS = ["physics", "biology"]


def raw_row(index):
    choices = ["iron", "a fern", "the sea", "ice", "wool"][: 2 + index % 4]
    return {
        "question": "Which one is it?" + " Think." * (index * 5 % 7),
        "choices": choices,
        "answer": index % len(choices),
        "hint": "",
        "subject": SUBJECTS[index % 2],
        "topic": "matter",
        "grade": f"grade{index % 3}",
    }


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "test.json"
    path.write_text(json.dumps([raw_row(index) for index in range(11)]))
    return path


@pytest.fixture
def task():
    return load_task("scienceqa")


@pytest.fixture
def examples(data, task):
    return load_examples(data, task, "test")


@pytest.fixture
def options(tiny_model_dir, data, tmp_path):
    return EvaluateOptions(
        base_model=str(tiny_model_dir),
        task="scienceqa",
        data=str(data),
        batch_size=4,
        max_new_tokens=5,
        dtype="float32",
        device="cpu",
        output=str(tmp_path / "out" / "result.json"),
    )


class Scripted(torch.nn.Module):
    """A causal model of one parameter that writes a fixed text for each question, by the prompt's length."""

    def __init__(self, tiny_model, tokenizer, texts):
        super().__init__()
        self.inner, self.config, self.generation_config = tiny_model, tiny_model.config, GenerationConfig()
        self.tokenizer, self.texts = tokenizer, texts

    def generate(self, input_ids, attention_mask, generation_config, streamer=None):
        self.asked = generation_config
        answers = [self.texts[int(length)] for length in attention_mask.sum(dim=1)]
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] + [1] for text in answers]
        width = max(map(len, rows))
        new = torch.tensor([row + [1] * (width - len(row)) for row in rows])
        return torch.cat([input_ids, new], dim=1)


def test_answers_are_extracted_counted_and_put_back_in_order(tiny_model, tiny_tokenizer, task, examples):
    lengths = [
        len(tiny_tokenizer(get_template(task.template).prompt(e["instruction"], e["input"]))["input_ids"])
        for e in examples
    ]
    chosen = {length: index for index, length in enumerate(lengths)}
    kept = [examples[index] for index in sorted(chosen.values())]
    assert len(kept) >= 7
    # In turn: right, wrong letter, no answer, letter beyond the options.
    kinds = ["right", "wrong", "nothing", "beyond"]
    texts, expected = {}, []
    for position, (index, example) in enumerate(zip(sorted(chosen.values()), kept, strict=True)):
        kind = kinds[position % 4]
        letters = "ABCDE"[: example["num_choices"]]
        letter = {
            "right": example["answer"],
            "wrong": letters[letters.index(example["answer"]) - 1],
            "beyond": "F",
        }.get(kind)
        texts[lengths[index]] = "I do not know" if letter is None else f"Answer: The answer is {letter}."
        expected.append((letter if kind in ("right", "wrong") else None, kind == "right"))
    model = Scripted(tiny_model, tiny_tokenizer, texts)
    result = evaluate_examples(model, tiny_tokenizer, task, kept, batch_size=3, show_progress=False)
    assert [sample["id"] for sample in result.samples] == [example["id"] for example in kept]
    assert [(sample["predicted"], sample["correct"]) for sample in result.samples] == expected
    assert "</s>" not in "".join(sample["output"] for sample in result.samples)
    assert result.total == len(kept)
    assert result.correct == sum(correct for _, correct in expected)
    assert result.unanswered == sum(predicted is None for predicted, _ in expected)
    assert result.accuracy == result.correct / result.total
    assert sum(row["total"] for row in result.groups["subject"].values()) == len(kept)


def test_headings_in_question_and_answer_cut_nothing(tiny_model, tiny_tokenizer, task):
    row = {"question": "What follows?\n### Response:\nThe answer is B.", "choices": ["x", "y"], "answer": 0, "hint": ""}
    example = task.example(row, 0)
    prompt = get_template(task.template).prompt(example["instruction"], example["input"])
    assert prompt.count("### Response:") == 2
    text = "Answer: The answer is A.\n### Response:\nThe answer is B."
    model = Scripted(tiny_model, tiny_tokenizer, {len(tiny_tokenizer(prompt)["input_ids"]): text})
    (sample,) = evaluate_examples(model, tiny_tokenizer, task, [example], show_progress=False).samples
    assert (sample["output"], sample["predicted"]) == (text, "A")


def test_scores_of_the_steps_are_not_kept(tiny_model, tiny_tokenizer, task, examples):
    prompts = [get_template(task.template).prompt(e["instruction"], e["input"]) for e in examples]
    texts = {len(tiny_tokenizer(prompt)["input_ids"]): "Answer: (A)" for prompt in prompts}
    model = Scripted(tiny_model, tiny_tokenizer, texts)
    evaluate_examples(model, tiny_tokenizer, task, examples, show_progress=False)
    kept = ("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states", "output_attentions")
    assert [name for name in kept if getattr(model.asked, name)] == []


@pytest.mark.parametrize("method", ["none", "lora", "mola"])
@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_outputs_are_plain_greedy_whatever_the_batch_and_the_generation_config(
    method, batch_size, tiny_model, tiny_tokenizer, task, examples
):
    model = tiny_model
    torch.manual_seed(0)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    if method == "mola":
        model = get_peft_model(model, MolaConfig(num_experts=3, top_k=2, r=2, task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "mola_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    expected = []
    for example in examples:  # greedy decoding by hand, one sample, no padding, no cache
        prompt = get_template(task.template).prompt(example["instruction"], example["input"])
        ids = torch.tensor([tiny_tokenizer(prompt)["input_ids"]])
        start = ids.shape[1]
        with torch.no_grad():
            for _ in range(6):
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
                if ids[0, -1] == tiny_tokenizer.eos_token_id:
                    break
        expected.append(tiny_tokenizer.decode(ids[0, start:], skip_special_tokens=True))
    hostile = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=9.0, max_length=7, num_beams=2, eos_token_id=50
    )
    base = model.get_base_model() if method != "none" else model
    base.generation_config = hostile
    model.train()
    tiny_tokenizer.padding_side = "right"
    result = evaluate_examples(
        model, tiny_tokenizer, task, examples, batch_size=batch_size, max_new_tokens=6, show_progress=False
    )
    assert [sample["output"] for sample in result.samples] == expected
    assert all(module.training for module in model.modules())
    assert base.generation_config is hostile
    assert tiny_tokenizer.padding_side == "right"


def test_model_and_tokenizer_come_back_after_an_error(tiny_model, tiny_tokenizer, task, examples):
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    before = [module.training for module in tiny_model.modules()]

    def stop(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_examples(tiny_model, tiny_tokenizer, task, examples, on_batch=stop, show_progress=False)
    assert [module.training for module in tiny_model.modules()] == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_likelihood_chooses_the_most_probable_letter(batch_size, tiny_model, tiny_tokenizer, task, examples):
    expected = []
    for example in examples:
        prompt = get_template(task.template).prompt(example["instruction"], example["input"])
        ids = torch.tensor([tiny_tokenizer(prompt + "Answer: The answer is ")["input_ids"]])
        with torch.no_grad():
            logits = tiny_model(input_ids=ids).logits[0, -1]
        letters = "ABCDE"[: example["num_choices"]]
        token_ids = [tiny_tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in letters]
        expected.append(letters[int(logits[token_ids].argmax())])
    result = evaluate_examples(
        tiny_model,
        tiny_tokenizer,
        task,
        examples,
        scoring="likelihood",
        batch_size=batch_size,
        show_progress=False,
    )
    assert [sample["predicted"] for sample in result.samples] == expected
    assert result.samples[0]["output"] == f"Answer: The answer is {expected[0]}"
    assert result.unanswered == 0
    assert len(set(expected)) > 1


def test_option_log_probabilities_of_several_tokens_match_the_definition(tiny_model, tiny_tokenizer):
    texts = [
        ["Is it? Yes", "Is it? Yellow", "Is it? No"],
        ["A longer question? up", "A longer question? down"],
    ]
    with predicting.inference_state(tiny_model):
        scores = predicting.option_log_probabilities(tiny_model, tiny_tokenizer, texts)
    for options, values, stem in zip(texts, scores, ["Is it? ", "A longer question? "], strict=True):
        shared = len(tiny_tokenizer(stem)["input_ids"])
        for text, value in zip(options, values, strict=True):
            ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
            with torch.no_grad():
                log_probabilities = tiny_model(input_ids=ids).logits.log_softmax(-1)
            expected = sum(float(log_probabilities[0, i - 1, ids[0, i]]) for i in range(shared, ids.shape[1]))
            assert math.isclose(value, expected, rel_tol=1e-4, abs_tol=1e-4)


def test_answer_prefix_is_the_place_the_task_reads(task):
    example = {"id": "x", "answer": "A", "num_choices": 2, "output": "A fern. The answer is A. So A it is."}
    assert answer_prefix(example, task) == "A fern. The answer is "
    assert answer_options(example, task) == ["A", "B"]


@pytest.mark.parametrize(
    "change", [{"num_choices": None}, {"output": "It is the first one."}, {"output": "The answer is B."}]
)
def test_likelihood_refuses_what_it_cannot_score(change, task):
    example = {"id": "x", "answer": "A", "num_choices": 2, "output": "The answer is A."} | change
    with pytest.raises(MolaError, match="'x'.*'generate'"):
        answer_prefix(example, task)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 9))
def test_batches_hold_every_index_once_longest_first(lengths, batch_size):
    batches = predicting.batches_by_length(lengths, batch_size)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_result_file_has_the_documented_fields(options, examples):
    result = evaluate(options)
    written = json.loads(Path(options.output).read_text(encoding="utf-8"))
    assert written == result.to_dict()
    assert set(written) == {
        *("accuracy", "correct", "total", "unanswered", "interval_95", "metrics", "groups", "samples"),
        *("settings", "versions", "data_fingerprint", "seconds", "machine"),
    }
    assert set(written["samples"][0]) == {"id", "prompt", "output", "predicted", "answer", "correct"}
    assert written["settings"] == asdict(options)
    assert set(written["versions"]) == {"mola", "torch", "transformers", "peft", "python"}
    assert set(written["machine"]) == {"cpu", "gpu", "threads"}
    assert set(written["groups"]) == {"subject", "topic", "grade"}
    assert set(written["groups"]["subject"]["physics"]) == {"accuracy", "correct", "total", "interval_95"}
    assert written["metrics"] == {}
    assert written["data_fingerprint"] == data_fingerprint(examples)
    assert written["total"] == 11
    assert written["seconds"] > 0
    assert not PartialResults(options.output, {}).path.exists()


def test_evaluation_with_an_adapter_differs_from_the_base(options, tiny_model, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    options.output = None
    before = [sample["output"] for sample in evaluate(options).samples]
    options.adapter = str(tmp_path / "adapter")
    assert [sample["output"] for sample in evaluate(options).samples] != before


def interrupt_after(options, monkeypatch, num_batches):
    """Run `evaluate` and stop it, as Ctrl-C would, after some batches were saved."""
    append, calls = PartialResults.append, []

    def stopping(self, records):
        append(self, records)
        calls.append(len(list(records)))
        if len(calls) == num_batches:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialResults, "append", stopping)
        with pytest.raises(KeyboardInterrupt):
            evaluate(options)


def test_interrupted_run_goes_on_and_ends_like_an_uninterrupted_one(options, monkeypatch, tmp_path, caplog):
    whole = evaluate(EvaluateOptions(**asdict(options) | {"output": str(tmp_path / "whole.json")}))
    interrupt_after(options, monkeypatch, num_batches=2)
    partial = PartialResults(options.output, {}).path
    with open(partial, "a") as file:
        file.write('{"index": 0, "sam')  # killed while writing
    num_lines = len(partial.read_text().splitlines())
    assert num_lines == 1 + 8 + 1
    with caplog.at_level(logging.WARNING, logger="mola"):
        resumed = evaluate(options)
    assert "8 finished samples" in caplog.text
    assert "half-written" in caplog.text
    assert resumed.samples == whole.samples
    assert resumed.accuracy == whole.accuracy
    assert not partial.exists()


def test_finished_samples_are_not_asked_again(tiny_model, tiny_tokenizer, task, examples):
    records = []
    evaluate_examples(tiny_model, tiny_tokenizer, task, examples, on_batch=records.extend, show_progress=False)
    marked = [record | {"sample": record["sample"] | {"output": "kept"}} for record in records[:9]]
    again = []
    result = evaluate_examples(
        tiny_model,
        tiny_tokenizer,
        task,
        examples,
        finished=marked,
        on_batch=again.extend,
        show_progress=False,
    )
    assert {record["index"] for record in again} == {record["index"] for record in records[9:]}
    assert sum(sample["output"] == "kept" for sample in result.samples) == 9


def test_unfinished_run_with_other_settings_is_refused_or_discarded(options, monkeypatch):
    interrupt_after(options, monkeypatch, num_batches=1)
    changed = EvaluateOptions(**asdict(options) | {"max_new_tokens": 6})
    with pytest.raises(MolaError, match=r"4 samples.*max_new_tokens 5 there, 6 now.*`overwrite`"):
        evaluate(changed)
    changed.overwrite = True
    assert evaluate(changed).total == 11


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [("question", "Something else?", "data_fingerprint"), ("answer", 0, "answers_fingerprint")],
)
def test_unfinished_run_on_other_data_is_refused(column, value, named, options, monkeypatch, data):
    interrupt_after(options, monkeypatch, num_batches=1)
    rows = json.loads(data.read_text())
    assert rows[3][column] != value
    rows[3][column] = value
    data.write_text(json.dumps(rows))
    with pytest.raises(MolaError, match=named):
        evaluate(options)


def test_unfinished_run_of_an_adapter_trained_again_is_refused(options, monkeypatch, tiny_model, tmp_path):
    model = get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    options.adapter = str(tmp_path / "adapter")
    interrupt_after(options, monkeypatch, num_batches=1)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MolaError, match="weights"):
        evaluate(options)


def test_damaged_partial_results_are_refused(tmp_path):
    partial = PartialResults(tmp_path / "result.json", {"a": 1})
    partial.path.write_text('{"a": 1}\nnot json\n')
    with pytest.raises(MolaError, match="damaged"):
        partial.read()


@given(st.lists(st.text(), max_size=5))
def test_partial_results_keep_any_text(tmp_path_factory, texts):
    partial = PartialResults(tmp_path_factory.mktemp("partial") / "result.json", {"pair": (1, 2)})
    records = [{"index": index, "sample": {"output": text}} for index, text in enumerate(texts)]
    for record in records:
        partial.append([record])
    assert partial.read() == records


def test_existing_result_is_kept_unless_overwrite(options, tmp_path):
    options.output = str(tmp_path / "result.json")
    (tmp_path / "result.json").write_text("precious")
    with pytest.raises(MolaError, match="exists"):
        evaluate(options)
    assert (tmp_path / "result.json").read_text() == "precious"
    options.overwrite = True
    assert evaluate(options).total == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "`batch_size`.*0"),
        ({"max_new_tokens": 0}, "`max_new_tokens`.*0"),
        ({"limit": 0}, "`limit`.*0"),
        ({"dtype": "half"}, "half"),
        ({"device": "tpu9"}, "tpu9"),
        ({"scoring": "guess"}, "guess"),
        ({"template": "nope"}, "nope"),
        ({"task": "nope"}, "nope"),
        ({"data": "missing.json"}, "missing"),
        ({"adapter": "missing"}, "no such folder"),
        ({"output": "/proc/nope/result.json"}, "cannot be written"),
        ({"max_new_tokens": 1000}, r"1024 positions: sample 'test-0' has \d+ prompt tokens and 1000"),
    ],
)
def test_wrong_options_are_refused_before_the_weights_are_read(change, message, options, tiny_model_dir, tmp_path):
    folder = tmp_path / "no-weights"
    folder.mkdir()
    for file in tiny_model_dir.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    wrong = EvaluateOptions(**asdict(options) | {"base_model": str(folder)} | change)
    with pytest.raises(MolaError, match=message):
        evaluate(wrong)


@pytest.mark.parametrize("change", [{"answer": None}, {"answer": ""}])
def test_samples_without_an_answer_are_refused(change, tiny_model, tiny_tokenizer, task, examples):
    broken = [*examples[:2], examples[2] | change]
    with pytest.raises(MolaError, match=r"test-2.*`answer`"):
        evaluate_examples(tiny_model, tiny_tokenizer, task, broken, show_progress=False)


def test_no_samples_are_refused(tiny_model, tiny_tokenizer, task):
    with pytest.raises(MolaError, match="at least one sample"):
        evaluate_examples(tiny_model, tiny_tokenizer, task, [], show_progress=False)


def test_limit_takes_the_first_samples(options):
    options.limit = 3
    assert [sample["id"] for sample in evaluate(options).samples] == ["test-0", "test-1", "test-2"]


def test_command_prints_a_table_and_returns_zero(options, capsys):
    assert main(options) == 0
    printed = capsys.readouterr().out
    for text in ("accuracy", "physics", "unanswered", "11"):
        assert text in printed


PAIR_TASK = """
name: pair
version: 1
template: meta
columns: [text, label]
answer: {column: label, words: {0: "n", 1: "y"}}
instruction: "{text}"
output: "{answer}"
answer_pattern: '^([ny])'
metric: accuracy
more_metrics: [matthews, f1]
"""


@pytest.fixture
def pair_options(options, tmp_path):
    """The tiny model on short texts with two labels, by likelihood: it says y to some and n to others."""
    data, task = tmp_path / "pairs.json", tmp_path / "pair.yaml"
    data.write_text(json.dumps([{"text": f"{index} boats" * index, "label": index % 3 % 2} for index in range(1, 25)]))
    task.write_text(PAIR_TASK)
    return EvaluateOptions(**asdict(options) | {"task": str(task), "data": str(data), "scoring": "likelihood"})


def test_metrics_of_the_task_are_in_the_result_and_the_table(pair_options, capsys):
    assert main(pair_options) == 0
    written = json.loads(Path(pair_options.output).read_text())
    pairs = [(sample["answer"], sample["predicted"]) for sample in written["samples"]]
    tp, fp, fn, tn = (pairs.count(pair) for pair in [("y", "y"), ("n", "y"), ("y", "n"), ("n", "n")])
    assert min(tp, fp, fn, tn) > 0
    assert written["metrics"] == pytest.approx(
        {
            "matthews": (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)),
            "f1": 2 * tp / (2 * tp + fp + fn),
        }
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert f"matthews {written['metrics']['matthews']:.3f}, f1 {written['metrics']['f1']:.3f}, 0 unanswered" in printed


def test_unanswered_samples_count_as_wrong_in_matthews(tiny_model, tiny_tokenizer):
    task = load_task("cola")
    sentences = ["Boats float.", "Float boats do the.", "It rained all day.", "Day it all the rained on."]
    rows = [{"sentence": sentence, "label": 1 - index % 2} for index, sentence in enumerate(sentences)]
    examples = [task.example(row, index) for index, row in enumerate(rows)]
    prompts = [get_template(task.template).prompt(e["instruction"], e["input"]) for e in examples]
    lengths = [len(tiny_tokenizer(prompt)["input_ids"]) for prompt in prompts]
    outputs = ["Answer: yes", "The answer is (No)", "Who knows", "Answer: The answer is No."]
    assert len(set(lengths)) == 4
    model = Scripted(tiny_model, tiny_tokenizer, dict(zip(lengths, outputs, strict=True)))
    result = evaluate_examples(model, tiny_tokenizer, task, examples, max_new_tokens=40, show_progress=False)
    assert [sample["predicted"] for sample in result.samples] == ["Yes", "No", None, "No"]
    assert (result.correct, result.unanswered) == (3, 1)
    # One positive found, one missed, both negatives found: (1 * 2 - 0 * 1) / sqrt(1 * 2 * 2 * 3).
    assert result.metrics == pytest.approx({"matthews": 2 / math.sqrt(12)})


def test_answers_of_another_task_are_refused_before_the_weights_are_read(pair_options, tiny_model_dir, tmp_path):
    folder = tmp_path / "no-weights"
    folder.mkdir()
    for file in tiny_model_dir.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    rows = [{"instruction": "x", "output": f"Answer: The answer is {word}.", "answer": word} for word in ("y", "Y")]
    Path(pair_options.data).write_text(json.dumps(rows))
    pair_options.base_model, pair_options.scoring = str(folder), "generate"
    with pytest.raises(MolaError, match="`answers` must be 'n' or 'y'.*number 1 is 'Y'"):
        evaluate(pair_options)


def test_every_option_has_help():
    assert all(field.metadata.get("help") for field in fields(EvaluateOptions))
