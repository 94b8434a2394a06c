"""Scoring by generation: the outputs, and the answers read from them."""

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from mola import MolaConfig
from mola.data.tasks import load_task
from mola.data.templates import get_template
from mola.errors import MolaError
from mola.evaluation.core import evaluate_examples
from mola.generation import predicting
from tests.evaluation.scripted import Scripted
from tests.grids import slow


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


@pytest.mark.parametrize("method", ["none", *slow("lora"), "mola"])
def test_outputs_are_plain_greedy_whatever_the_batch_and_the_generation_config(
    method, tiny_model, tiny_tokenizer, task, examples
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
    hostile = GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=9.0, max_length=7, num_beams=2)
    base = model.get_base_model() if method != "none" else model
    base.generation_config = hostile
    model.train()
    tiny_tokenizer.padding_side = "right"
    for size in (1, 4):
        result = evaluate_examples(
            model, tiny_tokenizer, task, examples, batch_size=size, max_new_tokens=6, show_progress=False
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


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 9))
def test_batches_hold_every_index_once_longest_first(lengths, batch_size):
    batches = predicting.batches_by_length(lengths, batch_size)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in batches[:-1])


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


@pytest.mark.parametrize(
    ("number", "text", "labels", "is_named"),
    [
        (20, "The answer is Yes.", (1, 0), True),
        (19, "The answer is Yes.", (1, 0), False),  # may be chance
        (20, "The answer is Yes.", (1, 1), False),  # there is one right answer
        (20, "Who knows", (1, 0), False),  # unanswered, which is counted
    ],
)
def test_one_answer_to_everything_is_named(number, text, labels, is_named, tiny_model, tiny_tokenizer, caplog):
    task = load_task("cola")
    rows = [{"sentence": f"Boats {index} float.", "label": labels[index % 2]} for index in range(number)]
    examples = [task.example(row, index) for index, row in enumerate(rows)]
    model = Scripted(tiny_model, tiny_tokenizer, defaultdict(lambda: f"Answer: {text}"))
    evaluate_examples(model, tiny_tokenizer, task, examples, max_new_tokens=40, show_progress=False)
    assert ("All 20 samples got the same answer, 'Yes', which is correct for 50.0 % of them" in caplog.text) == is_named


@pytest.mark.parametrize("change", [{"answer": None}, {"answer": ""}])
def test_samples_without_an_answer_are_refused(change, tiny_model, tiny_tokenizer, task, examples):
    broken = [*examples[:2], examples[2] | change]
    with pytest.raises(MolaError, match=r"test-2.*`answer`"):
        evaluate_examples(tiny_model, tiny_tokenizer, task, broken, show_progress=False)


@pytest.mark.parametrize(("answer", "choices"), [("b", 3), ("D", 3), ("length", None), ("BC", None)])
def test_answers_that_no_text_can_have_are_refused(answer, choices, tiny_model, tiny_tokenizer, task, examples):
    broken = [*examples[:2], examples[2] | {"answer": answer, "num_choices": choices}]
    with pytest.raises(MolaError, match=rf"`answer` of sample 'test-2' must be one of 'A', .*got '{answer}'"):
        evaluate_examples(tiny_model, tiny_tokenizer, task, broken, show_progress=False)


def test_no_samples_are_refused(tiny_model, tiny_tokenizer, task):
    with pytest.raises(MolaError, match="at least one sample"):
        evaluate_examples(tiny_model, tiny_tokenizer, task, [], show_progress=False)
