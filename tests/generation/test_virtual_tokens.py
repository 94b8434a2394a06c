"""Methods of PEFT that put virtual tokens before a prompt: what `generate` makes is what the model itself says."""

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

from mola._compat import cache_argument, generation_reads_cache_keyword
from mola.errors import MolaError
from mola.evaluation.core import why_one_by_one
from mola.generation import predicting
from mola.generation.batching.forward import Adapters
from mola.generation.decoding import generate_text
from mola.serving.engine_choice import choose_engine
from tests.tuner.models import clone

pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported")  # by PEFT
TOKENS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}


def adapted(model, config):
    torch.manual_seed(0)
    model = get_peft_model(clone(model), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5)
    return model


def likeliest(model, tokenizer, prompt, count):
    ids = torch.tensor(predicting.encode_prompts(tokenizer, [prompt]))
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_virtual_tokens_count_at_every_token(tiny_model, tiny_tokenizer):
    model = adapted(tiny_model, PromptTuningConfig(**TOKENS))
    text = generate_text(model, tiny_tokenizer, "Once", max_new_tokens=8)
    assert text == likeliest(model, tiny_tokenizer, "Once", 8)
    assert text != generate_text(tiny_model, tiny_tokenizer, "Once", max_new_tokens=8)
    with model.disable_adapter():
        generate_text(model, tiny_tokenizer, "Once", max_new_tokens=1)
    assert text == generate_text(model, tiny_tokenizer, "Once", max_new_tokens=8)  # on again


def test_virtual_tokens_take_positions_and_prevent_batches(tiny_model, tiny_tokenizer):
    model = adapted(tiny_model, PromptTuningConfig(**TOKENS))
    limit = tiny_model.config.max_position_embeddings
    assert predicting.positions_left(model) == limit - 5
    with pytest.raises(MolaError, match=f"{limit - 5}"):
        generate_text(model, tiny_tokenizer, "Once", max_new_tokens=limit - 8)
    assert "padding" in why_one_by_one(model, 10)
    assert why_one_by_one(tiny_model, 10) is None


def test_a_prefix_counts_or_is_refused(tiny_model, tiny_tokenizer):
    model = adapted(tiny_model, PrefixTuningConfig(**TOKENS))
    if cache_argument(tiny_model) != "cache" or generation_reads_cache_keyword():
        text = generate_text(model, tiny_tokenizer, "Once", max_new_tokens=8)
        assert text == likeliest(model, tiny_tokenizer, "Once", 8)
        return
    with pytest.raises(MolaError, match="`adapter` of type PREFIX_TUNING cannot generate text"):
        generate_text(model, tiny_tokenizer, "Once", max_new_tokens=8)
    with pytest.raises(MolaError, match="`adapter` of type PREFIX_TUNING cannot generate text"):
        choose_engine(Adapters(model), tiny_tokenizer, 32, 512, None)  # before a server answers
    with model.disable_adapter():
        base = generate_text(model, tiny_tokenizer, "Once", max_new_tokens=8)
    assert base == generate_text(tiny_model, tiny_tokenizer, "Once", max_new_tokens=8)
    with pytest.raises(MolaError, match="`adapter` of type PREFIX_TUNING cannot generate text"):
        generate_text(model, tiny_tokenizer, "Once", max_new_tokens=8)


def test_the_server_does_not_batch_them(tiny_model, tiny_tokenizer, caplog):
    adapters = Adapters(adapted(tiny_model, PromptTuningConfig(**TOKENS)))
    with pytest.raises(MolaError, match="one after the other"):
        choose_engine(adapters, tiny_tokenizer, 32, 512, 100)
    choose_engine(adapters, tiny_tokenizer, 32, 512, None)
    assert "generated one after the other" in caplog.text
