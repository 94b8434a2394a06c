"""What is asked of a model: the last logits alone, of rows that lie together."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mola.data.templates import CHAT, get_template, template_names
from mola.data.tokenized import tokenized
from mola.errors import MolaError
from mola.generation import likelihood, predicting
from mola.generation.batching.forward import Adapters, Forward

PROMPTS = ["Which of them?", "Why"]


@pytest.fixture
def head_inputs(tiny_model):
    """Shape of everything that the head reads, and whether its rows lie together in memory."""
    seen = []
    handle = tiny_model.lm_head.register_forward_pre_hook(
        lambda module, inputs: seen.append((tuple(inputs[0].shape[:2]), inputs[0].is_contiguous()))
    )
    yield seen
    handle.remove()


def test_likelihood_computes_the_last_logits_only(tiny_model, tiny_tokenizer, head_inputs):
    with predicting.inference_state(tiny_model):
        likelihood.option_log_probabilities(tiny_model, tiny_tokenizer, [["Is it? A", "Is it? B"], ["No? A", "No? B"]])
    assert head_inputs == [((2, 1), True)]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_computes_the_last_logits_only(num_beams, tiny_model, tiny_tokenizer, head_inputs):
    encoded = predicting.encode_prompts(tiny_tokenizer, PROMPTS)

    def answers(prompts):
        return predicting.generate_batch(tiny_model, tiny_tokenizer, prompts, max_new_tokens=3, num_beams=num_beams)

    with predicting.inference_state(tiny_model):
        together = answers(encoded)
        if num_beams == 1:
            assert set(head_inputs) == {((2, 1), True)}
        assert together == [answers([prompt])[0] for prompt in encoded]


def test_running_batch_computes_the_last_logits_only(tiny_model, head_inputs):
    forward = Forward(Adapters(tiny_model))
    cache = forward.new_cache()
    with predicting.inference_state(tiny_model):
        forward(cache, [[5, 6, 7], [8, 9]], [3, 2], {})
        forward(cache, [[10], [11]], [4, 3], {})
    assert head_inputs == [((2, 1), True)] * 2


NAMES = [name for name in template_names() if name != CHAT]  # which is a tokenizer's own


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_before_its_answer_has_the_tokens_of_training(name, blanks_tokenizer):
    template = get_template(name)
    example = {"id": "x", "instruction": "Which one?", "input": "", "output": "Answer: it"}
    sample = next(iter(tokenized([example], blanks_tokenizer, template, [])))
    prompt = template.prompt("Which one?", "")
    assert predicting.encode_before_answer(blanks_tokenizer, [prompt, "Why"])[0] == sample.ids[: sample.answer_start]
    if prompt.endswith("\n\n"):
        assert predicting.encode_prompts(blanks_tokenizer, [prompt])[0] != sample.ids[: sample.answer_start]


def test_a_mark_that_would_join_the_letter_is_kept(blanks_tokenizer):
    """Qwen's vocabulary has `:A`, and not `:Answer`, of which the prompt's colon is a token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, ":A"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "A")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert len(fast(":A")["input_ids"]) == 1
    (ids,) = predicting.encode_before_answer(fast, ["Say:"])
    assert fast.decode(ids) == "Say:"


def test_some_template_ends_in_two_line_breaks():
    assert any(get_template(name).prompt("Which one?", "").endswith("\n\n") for name in NAMES)


def test_tokens_without_an_embedding_are_refused(tiny_model, tiny_tokenizer):
    """On a GPU they would end the process."""
    known = tiny_model.get_input_embeddings().num_embeddings
    with predicting.inference_state(tiny_model):
        with pytest.raises(MolaError, match=f"one has the id {known}, the model has {known}"):
            predicting.generate_batch(tiny_model, tiny_tokenizer, [[3, 4], [3, known]], max_new_tokens=2)
        tiny_tokenizer.add_tokens(["<new>"])
        with pytest.raises(MolaError, match="must have tokens that the model knows"):
            likelihood.option_log_probabilities(tiny_model, tiny_tokenizer, [["a <new> b", "a <new> c"]])
