"""One model, with and without its adapter, one answer at a time."""

import itertools
import threading

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from mola import MolaConfig, MolaError, generate_text
from mola.serving.demonstration.answering import Answerer


@pytest.fixture
def model(tiny_model_dir):
    torch.manual_seed(1)
    config = MolaConfig(num_experts="2468", r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), config).eval()


@pytest.fixture
def answerer(model, tiny_tokenizer):
    answerer = Answerer(model, tiny_tokenizer)
    yield answerer
    answerer.close()


def last(answers):
    return list(answers)[-1]


def test_with_and_without_the_adapter(answerer, model, tiny_tokenizer):
    with_it = last(answerer.answer("The cat", with_adapter=True, max_new_tokens=12))
    alone = last(answerer.answer("The cat", with_adapter=False, max_new_tokens=12))
    assert with_it.text == generate_text(model, tiny_tokenizer, "The cat", max_new_tokens=12)
    with model.disable_adapter():
        assert alone.text == generate_text(model, tiny_tokenizer, "The cat", max_new_tokens=12)
    assert with_it.text != alone.text
    assert tiny_tokenizer.decode(with_it.token_ids, skip_special_tokens=True) == "The cat" + with_it.text


def test_an_answer_grows(answerer):
    texts = [answer.text for answer in answerer.answer("The cat", with_adapter=True, max_new_tokens=12)]
    assert len(texts) > 6
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


def test_experts_of_an_answer(answerer):
    answer = last(answerer.answer("The cat", with_adapter=True, max_new_tokens=6))
    experts = answerer.experts(answer)
    assert experts.num_prompt_tokens == answer.num_prompt_tokens == len("<The cat")
    assert len(experts.tokens) == len(answer.token_ids)
    assert {len(each.gates) for each in experts.modules} == {len(experts.tokens)}
    assert "".join(experts.tokens[1:8]) == "The cat"


def test_closing_the_iterator_stops_the_model(answerer, tiny_tokenizer):
    running = answerer.answer("The cat", with_adapter=False, max_new_tokens=900)
    next(running)
    running.close()
    assert len(answerer._current.token_ids) < 450
    again = last(answerer.answer("The cat", with_adapter=True, max_new_tokens=4))
    assert again.text == generate_text(answerer.model, tiny_tokenizer, "The cat", max_new_tokens=4)


def test_an_abandoned_answer_does_not_block_the_next(answerer):
    """A page that is closed leaves its generator suspended."""
    forgotten = answerer.answer("The cat", with_adapter=True, max_new_tokens=6)
    next(forgotten)
    assert last(answerer.answer("The cat", with_adapter=True, max_new_tokens=6)).text


def test_answers_at_the_same_time(answerer, model, tiny_tokenizer):
    wanted = [("The cat", True), ("The cat", False), ("A dog", True), ("A dog", False)]
    got = {}

    def ask(number, prompt, with_adapter):
        got[number] = last(answerer.answer(prompt, with_adapter=with_adapter, max_new_tokens=6)).text

    threads = [threading.Thread(target=ask, args=(number, *each)) for number, each in enumerate(wanted)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (prompt, with_adapter) in enumerate(wanted):
        assert got[number] == last(answerer.answer(prompt, with_adapter=with_adapter, max_new_tokens=6)).text


def test_errors_reach_the_caller(answerer):
    with pytest.raises(MolaError, match="positions"):
        last(answerer.answer("The cat", with_adapter=True, max_new_tokens=100_000))
