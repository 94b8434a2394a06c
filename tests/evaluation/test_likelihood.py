"""Scoring by likelihood: the most probable of the options is the answer."""

import math
from dataclasses import replace

import pytest
import torch

from mola.data.tasks import load_task
from mola.data.templates import get_template
from mola.errors import MolaError
from mola.evaluation.core import evaluate_examples
from mola.evaluation.questions import Question, answer_options, split_at_answer, warn_unread_outputs
from mola.generation import likelihood, predicting


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
        scores = likelihood.option_log_probabilities(tiny_model, tiny_tokenizer, texts)
    for options, values, stem in zip(texts, scores, ["Is it? ", "A longer question? "], strict=True):
        shared = len(tiny_tokenizer(stem)["input_ids"])
        for text, value in zip(options, values, strict=True):
            ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
            with torch.no_grad():
                log_probabilities = tiny_model(input_ids=ids).logits.log_softmax(-1)
            expected = sum(float(log_probabilities[0, i - 1, ids[0, i]]) for i in range(shared, ids.shape[1]))
            assert math.isclose(value, expected, rel_tol=1e-4, abs_tol=1e-4)


def test_the_options_of_a_sample_that_is_asked_alone_are_not_padded(tiny_model, tiny_tokenizer, monkeypatch):
    """Models that see padding are asked so."""
    sample, other = ["Is it? Yes", "Is it? Yellow", "Is it? No"], ["Up? a", "Up? b"]
    rows, original = [], tiny_model.forward

    def forward(attention_mask, **arguments):
        rows.append(attention_mask)
        return original(attention_mask=attention_mask, **arguments)

    monkeypatch.setattr(tiny_model, "forward", forward)
    with predicting.inference_state(tiny_model):
        (alone,) = likelihood.option_log_probabilities(tiny_model, tiny_tokenizer, [sample])
        assert len(rows) > 1
        assert all(mask.all() for mask in rows)
        rows.clear()
        together = likelihood.option_log_probabilities(tiny_model, tiny_tokenizer, [sample, other])
    assert len(rows) == 1
    assert alone == pytest.approx(together[0], rel=1e-4)


def test_around_answer_is_the_place_the_task_reads(task):
    example = {"id": "x", "answer": "A", "num_choices": 2, "output": "A fern. The answer is A. So A it is."}
    assert split_at_answer(example, task)[0] == "A fern. The answer is "
    assert answer_options(example, task) == ["A", "B"]


def test_an_answer_that_begins_another_is_rated_with_what_follows():
    """Or "1" could not be less probable than "10"."""
    question = Question({}, "How much? ", "Answer: ", ("1", "10", "2"), ".")
    assert question.option_texts("</s>") == [f"How much? Answer: {each}." for each in ("1", "10", "2")]
    reason = replace(question, suffix=". Ten is what the right answer's reason says")
    assert reason.option_texts("</s>") == question.option_texts("</s>")
    assert replace(question, suffix="因为他说了").option_texts("</s>")[1] == "How much? Answer: 10因"
    assert replace(question, suffix=" được vì").option_texts("</s>")[1] == "How much? Answer: 10 được"
    assert replace(question, suffix=" apples, as he said").option_texts("</s>")[1] == "How much? Answer: 10 apples"
    assert replace(question, suffix="").option_texts("</s>")[0] == "How much? Answer: 1</s>"
    assert replace(question, options=("1", "2")).option_texts("</s>") == ["How much? Answer: 1", "How much? Answer: 2"]


def test_around_an_answer_in_a_script_without_blanks(tmp_path):
    lines = [
        "name: own",
        "version: 1",
        "template: alpaca",
        "instruction: '{text}'",
        "output: '答案是{answer}。'",
        "answer_pattern: '答案是(对|错)'",
    ]
    lines += ["columns: [text, label]", "answer: {column: label, words: {0: 错, 1: 对}}", "metric: accuracy"]
    (tmp_path / "own.yaml").write_text("\n".join(lines), encoding="utf-8")
    example = {"id": "x", "answer": "对", "num_choices": None, "output": "答案是对。"}
    assert split_at_answer(example, load_task(str(tmp_path / "own.yaml"))) == ("答案是", "。")


def test_a_pattern_that_does_not_read_the_outputs_of_the_data_is_told(task, caplog):
    examples = [
        {"id": "x", "answer": "A", "num_choices": 2, "output": "The answer is A."},
        {"id": "y", "answer": "B", "num_choices": 2, "output": "It is the second."},
        {"id": "z", "answer": "B", "num_choices": 2, "output": None},
    ]
    warn_unread_outputs(task, examples)
    assert "does not find the answer in the output of 1 of 3 samples, such as 'y'" in caplog.text


@pytest.mark.parametrize(
    "change", [{"num_choices": None}, {"output": "It is the first one."}, {"output": "The answer is B."}]
)
def test_likelihood_refuses_what_it_cannot_score(change, task):
    example = {"id": "x", "answer": "A", "num_choices": 2, "output": "The answer is A."} | change
    with pytest.raises(MolaError, match="'x'.*'generate'"):
        split_at_answer(example, task)


def test_scores_that_are_no_numbers_end_in_one_line(tiny_model, tiny_tokenizer, task, examples):
    """They made the first option of every sample the answer."""
    with torch.no_grad():
        tiny_model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(MolaError, match=r"the scores of sample 'test-\d+' are NaN"):
        evaluate_examples(tiny_model, tiny_tokenizer, task, examples, scoring="likelihood", show_progress=False)


def test_data_without_answers_are_told_from_a_task_without(tiny_model, tiny_tokenizer, task, examples):
    rows = [{**examples[0], "answer": None}]
    with pytest.raises(MolaError, match="`data` must have answers: .* or prepare the source with `mola prepare`"):
        evaluate_examples(tiny_model, tiny_tokenizer, task, rows, show_progress=False)
