"""Every answer of a running batch is the one that `generate` gives alone, whatever other answers join and leave."""

import itertools
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mola import MolaConfig
from mola.generation import predicting
from mola.generation.batching.cache import _Layer
from mola.generation.batching.engine import BatchEngine, SingleEngine
from mola.generation.batching.forward import Adapters, why_not_batched
from mola.generation.batching.rows import Penalties, Row, Sampling
from mola.generation.decoding import decoding_settings
from tests.grids import slow

ENDLESS = 10**9


class Recorder:
    """A listener that records one answer."""

    def __init__(self, leaves_after=ENDLESS):
        self.tokens, self.logprobs, self.events, self.leaves_after = [], [], [], leaves_after

    def is_cancelled(self):
        return len(self.tokens) >= self.leaves_after

    def on_start(self):
        self.events.append("begins")

    def on_token(self, token_id, logprobs):
        self.tokens.append(token_id)
        self.logprobs.append(logprobs)
        return True

    def on_end(self):
        self.events.append("ends")

    def on_error(self, error):
        self.events.append(error)


def mixture(experts, r=2, **settings):
    return MolaConfig(num_experts=experts, r=r, top_k=2, target_modules=["q_proj", "v_proj", "down_proj"], **settings)


def randomise(model, names=("mola_B", "mola_router", "lora_B")):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for name, parameter in model.named_parameters():
            if any(each in name for each in names):
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def adapted(tiny_model):
    """Two mixtures of other shapes, and the base model."""
    model = get_peft_model(tiny_model, mixture("2222"), adapter_name="first")
    model.add_adapter("second", mixture("4321", r=4))
    return randomise(model)


def random_rows(adapters, count, seed=0, sampled=False, vocabulary=256):
    """Rows of different lengths."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        prompt = [draw.randrange(2, vocabulary) for _ in range(draw.randint(1, 40))]
        values = {"temperature": 1.3, "top_p": 0.9, "top_k": 50} if sampled else {}
        decoding = decoding_settings(draw.randint(1, 12), **values)
        rows.append(Row(adapters[number % len(adapters)], prompt, Sampling(decoding, number), Recorder()))
    return rows


def run(engine, rows, arrivals=()):
    """Let rows in, some of them after so many steps; their answers."""
    waiting = sorted(itertools.zip_longest(arrivals, rows, fillvalue=0), key=lambda pair: pair[0])
    step = 0
    while waiting or not engine.is_idle:
        while waiting and waiting[0][0] <= step:
            engine.add(waiting.pop(0)[1])
        if not engine.is_idle:
            engine.step()
        step += 1
    for row in rows:
        assert row.listener.events == ["begins", "ends"]
    return [row.listener.tokens for row in rows]


def again(rows):
    return [Row(row.adapter, row.prompt, row.sampling, Recorder()) for row in rows]


def batched(model, size=5, prefill=24, total=10_000, ends=()):
    return BatchEngine(Adapters(model), ends, size, prefill, total)


def alone(model, tokenizer, rows):
    """What `generate` gives."""
    tokenizer.eos_token_id = predicting.base_of(model).generation_config.eos_token_id = None
    return run(SingleEngine(Adapters(model), tokenizer), again(rows))


@pytest.mark.parametrize(
    ("sampled", "sizes"),
    [(True, [(2, 7), (16, 1000)]), *slow((True, [(1, 1000), (5, 24)]), (False, [(2, 7), (5, 24), (16, 1000)]))],
)
def test_answers_with_several_adapters_are_those_of_generate(sampled, sizes, adapted, tiny_tokenizer):
    rows = random_rows([None, "first", "second"], 12, sampled=sampled)
    arrivals = [random.Random(1).randrange(30) for _ in rows]
    with predicting.inference_state(adapted):
        expected = alone(adapted, tiny_tokenizer, rows)
        for size, prefill in sizes:
            assert run(batched(adapted, size, prefill), again(rows), arrivals) == expected, (size, prefill)
    assert len({tuple(answer[:2]) for answer in expected}) > 4


def lora(**settings):
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **settings)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["side by side", "by turns"])
def test_other_methods_of_peft(settings, tiny_model, tiny_tokenizer):
    model = get_peft_model(tiny_model, lora(**settings), adapter_name="first")
    model.add_adapter("second", lora(**settings))
    randomise(model)
    assert Adapters(model).can_mix == (not settings)
    rows = random_rows([None, "first", "second", "second"], 8)
    with predicting.inference_state(model):
        assert run(batched(model), rows) == alone(model, tiny_tokenizer, rows)


SIZES = {"vocab_size": 258, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
OTHERS = {
    "window": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, sliding_window=8, initializer_range=0.3)
    ),
    "learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=258, n_layer=2, n_embd=32, n_head=4, n_positions=64, initializer_range=0.3)
    ),
    "query norms": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=16, initializer_range=0.3)
    ),
    "eager": lambda: LlamaForCausalLM._from_config(
        LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, initializer_range=0.3),
        attn_implementation="eager",
    ),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_models(make, tiny_tokenizer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    assert why_not_batched(model) is None
    rows = random_rows([None], 12)
    with predicting.inference_state(model):
        assert run(batched(model), rows, [0, 0, 3, 9]) == alone(model, tiny_tokenizer, rows)


def test_models_without_a_key_value_cache_are_not_batched():
    config = FalconMambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, num_attention_heads=1)
    assert why_not_batched(FalconMambaForCausalLM(config)) is not None


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_row_are_not_batched(kind):
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    settings = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**settings, rope_parameters=rope, max_position_embeddings=32))
    assert "depend on the longest row" in why_not_batched(model)
    assert predicting.max_length_of_batched_rope(model.config) == 16
    assert predicting.max_length_of_batched_rope(LlamaConfig(**settings)) is None


def test_lack_of_memory_for_a_prompt_ends_this_answer_only(adapted, monkeypatch):
    first, second = (
        Row(None, list(range(5, 5 + length)), Sampling(decoding_settings(6)), Recorder()) for length in (3, 90)
    )
    engine = batched(adapted, prefill=200)
    original = _Layer._reserve

    def reserve(self, rows, *rest):
        if self is engine._running.cache._own[-1] and rows > 1:
            raise RuntimeError("out of memory")
        original(self, rows, *rest)

    with predicting.inference_state(adapted):
        engine.add(first)
        engine.step()
        monkeypatch.setattr(_Layer, "_reserve", reserve)
        engine.add(second)
        while not engine.is_idle:
            engine.step()
    assert isinstance(second.listener.events[1], RuntimeError)
    assert first.listener.events == ["begins", "ends"]


def test_a_cache_that_is_partly_moved_is_not_used(adapted, monkeypatch):
    rows = [Row(None, list(range(5, 5 + length)), Sampling(decoding_settings(6)), Recorder()) for length in (3, 90, 3)]
    engine = batched(adapted, prefill=200)
    original = _Layer._shift

    def shift(self, by):
        if self is engine._running.cache._own[-1] and by > 0:
            raise RuntimeError("out of memory")
        original(self, by)

    with predicting.inference_state(adapted):
        engine.add(rows[0])
        engine.step()
        monkeypatch.setattr(_Layer, "_shift", shift)
        engine.add(rows[1])
        engine.step()
        assert [isinstance(row.listener.events[-1], RuntimeError) for row in rows[:2]] == [True, True]
        engine.add(rows[2])
        while not engine.is_idle:
            engine.step()
    assert rows[2].listener.events == ["begins", "ends"]
    assert rows[2].listener.tokens[0] == rows[0].listener.tokens[0]


def test_cache_never_grows_to_the_most_rows_times_the_most_columns(adapted):
    """Many short answers, of which one stays, and then a long prompt."""
    rows = [
        Row("first", [5] * 4, Sampling(decoding_settings(60 if index == 3 else 4)), Recorder()) for index in range(16)
    ]
    engine = batched(adapted, size=16, prefill=1000, total=2000)
    long = Row("first", [5] * 500, Sampling(decoding_settings(8)), Recorder())
    with predicting.inference_state(adapted):
        for row in rows:
            engine.add(row)
        for _ in range(8):
            engine.step()
        assert engine.num_active == 1
        engine.add(long)
        most = 0
        while not engine.is_idle:
            engine.step()
            keys = engine._running.cache._own[0].keys
            most = max(most, keys.shape[0] * keys.shape[-2])
        assert most < 4 * 600
        assert [rows[3].listener.tokens, long.listener.tokens] == run(batched(adapted), again([rows[3], long]))


def test_caches_of_prompts_being_read_stay_within_max_total_tokens(adapted):
    """Each long prompt has a cache of its own until it is read; all together stay within `total`, but for rounding."""
    rows = [Row("first", [5] * 400, Sampling(decoding_settings(4)), Recorder()) for _ in range(6)]
    engine, total = batched(adapted, size=8, prefill=64, total=6 * 404), 6 * 404
    with predicting.inference_state(adapted):
        for row in rows:
            engine.add(row)
        most = 0
        while not engine.is_idle:
            engine.step()
            caches = [part.cache._own[0].keys for part in engine._groups()]
            most = max(most, sum(keys.shape[0] * keys.shape[-2] for keys in caches if keys.numel()))
    assert total / 2 < most < 1.5 * total


def test_columns_of_removed_rows_are_freed_before_others_join(adapted):
    gone = Recorder()
    rows = [Row("first", [5] * 500, Sampling(decoding_settings(50)), gone)]
    rows.append(Row("first", [5] * 4, Sampling(decoding_settings(50)), Recorder()))
    engine = batched(adapted, size=8, prefill=1000, total=2000)
    with predicting.inference_state(adapted):
        for row in rows:
            engine.add(row)
        while len(engine._running.rows) < 2:
            engine.step()
        gone.leaves_after = 0
        engine._remove_cancelled()
        assert engine._running.cache.columns < 64


def test_a_failed_switch_of_adapters_is_repeated(adapted, monkeypatch):
    """Off and on again: what failed in between leaves no other adapter on."""
    adapters = Adapters(adapted)
    with adapters.activate([None], is_lasting=True):
        pass
    with monkeypatch.context() as patch:
        patch.setattr("mola.generation.batching.forward.set_adapter_to_infer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), adapters.activate(["second"], is_lasting=True):
            pass
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), adapters.activate([None], is_lasting=True):
        found = adapted(input_ids=ids).logits
    with torch.no_grad(), adapted.disable_adapter():
        assert torch.equal(found, adapted(input_ids=ids).logits)


def test_an_adapter_that_was_disabled_stays_frozen(adapted):
    """PEFT makes an adapter trainable when it switches it on, and a GPU packs trainable weights at every use."""
    adapters = Adapters(adapted)
    name = adapted.active_adapter
    for names in ([name], [None], [name]):
        with adapters.activate(names, is_lasting=True):
            pass
    assert adapted.active_adapter == name
    assert not any(parameter.requires_grad for parameter in adapted.parameters())
    with adapters.activate([None], is_lasting=True):
        pass
    with adapters.activate([None, name], is_lasting=False):
        assert not any(parameter.requires_grad for parameter in adapted.parameters())
    with adapters.activate([None], is_lasting=True):
        pass
    adapters.restore()
    assert not any(parameter.requires_grad for parameter in adapted.parameters())


def test_activated_loras_are_not_batched(tiny_model):
    """They look for their invocation tokens in what a forward pass is given: later one token."""
    model = get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]))
    assert "certain tokens of the prompt" in why_not_batched(model)


def test_nan_of_a_removed_answer_does_not_reach_the_next():
    def filled(rows, columns, value):
        layer, tensor = _Layer(), torch.full((rows, 1, columns, 2), value)
        layer.update(tensor, tensor.clone())
        return layer

    running = filled(2, 6, 1.0)
    running.keys[1] = running.values[1] = float("nan")
    running.remove(1)
    running.append(filled(1, 2, 3.0))
    for kept in (running.keys, running.values):
        assert running._used(kept).isfinite().all()


def test_end_tokens_and_cancelled_answers_free_their_place(adapted, tiny_tokenizer):
    rows = random_rows([None, "first"], 6)
    with predicting.inference_state(adapted):
        full = alone(adapted, tiny_tokenizer, rows)
        leaver = max(range(6), key=lambda index: len(full[index]))
        eos = full[leaver][5]
        mine = again(rows)
        mine[leaver].listener.leaves_after = 1
        engine = batched(adapted, size=3, ends=[300, eos])
        for row in mine:
            engine.add(row)
        while not engine.is_idle:
            engine.step()
            assert engine.num_active <= 3
    left = mine.pop(leaver).listener
    # The step that reads a prompt gives a second token too.
    assert left.tokens == full.pop(leaver)[:2]
    assert left.events == ["begins"]
    for row, answer in zip(mine, full, strict=True):
        ends = answer.index(eos) + 1 if eos in answer else len(answer)
        assert row.listener.tokens == answer[:ends]


def test_rows_join_in_order_and_memory_is_bounded(adapted):
    short, long = decoding_settings(4), decoding_settings(60)
    rows = [Row("first", [5] * 4, Sampling(each), Recorder()) for each in (short, short, long, short)]
    engine = batched(adapted, size=8, total=70)  # the long one leaves no room for a second
    begun = []
    with predicting.inference_state(adapted):
        for row in rows:
            engine.add(row)
        while not engine.is_idle:
            engine.step()
            begun.append([bool(row.listener.events) for row in rows])
    assert begun[0] == [True, True, False, False]
    assert all(three or not four for _, _, three, four in begun)
    assert [True, True, True, False] in begun
    assert [len(row.listener.tokens) for row in rows] == [4, 4, 60, 4]


def test_penalties_do_not_count_the_prompt():
    found = Penalties(3, 1.0, 0.5)(torch.tensor([[5, 6, 7, 8, 8]]), torch.zeros(1, 10))
    assert found.tolist() == [[0.0] * 8 + [-2.0, 0.0]]


def test_a_long_prompt_does_not_delay_other_answers(adapted):
    running = Row(None, [5, 6], Sampling(decoding_settings(50)), Recorder())
    long = Row(None, [7] * 200, Sampling(decoding_settings(2)), Recorder())
    short = Row(None, [8] * 3, Sampling(decoding_settings(2)), Recorder())
    engine = batched(adapted, size=8, prefill=10)
    with predicting.inference_state(adapted):
        engine.add(running)
        engine.step()
        engine.add(long)
        engine.add(short)
        for _ in range(10):
            before = len(running.listener.tokens)
            engine.step()
            assert len(running.listener.tokens) == before + 1
    assert len(short.listener.tokens) == 2
    assert not long.listener.tokens


def test_a_failure_ends_the_answers_it_concerns_only(adapted):
    good, failing = (Row(None, [5, number], Sampling(decoding_settings(6)), Recorder()) for number in (6, 7))
    unreadable = Row(None, [10**6], Sampling(decoding_settings(6)), Recorder())
    error = RuntimeError("the tokenizer broke")

    def break_down(token_id, logprobs):
        raise error

    failing.listener.on_token = break_down
    engine = batched(adapted)
    with predicting.inference_state(adapted):
        for row in (good, failing):
            engine.add(row)
        engine.step()
        engine.add(unreadable)
        while not engine.is_idle:
            engine.step()
    assert failing.listener.events == ["begins", error]
    assert isinstance(unreadable.listener.events[1], IndexError)
    assert good.listener.events == ["begins", "ends"]
    assert len(good.listener.tokens) == 6


@pytest.mark.parametrize("kind", ["batch", "single"])
def test_logprobs_are_those_of_the_model(kind, adapted, tiny_tokenizer):
    tiny_tokenizer.eos_token_id = predicting.base_of(adapted).generation_config.eos_token_id = None
    rows = [
        Row("first", [5, 6, 7], Sampling(decoding_settings(4, **values), 3, num_logprobs=count), Recorder())
        for values, count in (({}, 2), ({"temperature": 0.7}, 0), ({}, None))
    ]
    engine = batched(adapted) if kind == "batch" else SingleEngine(Adapters(adapted), tiny_tokenizer)
    with predicting.inference_state(adapted):
        run(engine, rows)
        adapted.set_adapter("first")
        for row in rows[:2]:
            ids = torch.tensor([[*row.prompt, *row.listener.tokens]])
            values = adapted(input_ids=ids).logits[0, 2:-1].log_softmax(-1)
            for token, logprobs, expected in zip(row.listener.tokens, row.listener.logprobs, values, strict=True):
                assert logprobs.own == pytest.approx(float(expected[token]), abs=1e-4)
                top = expected.topk(row.sampling.num_logprobs)
                assert [token_id for token_id, _ in logprobs.top] == top.indices.tolist()
                assert [value for _, value in logprobs.top] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert rows[2].listener.logprobs == [None] * 4


@pytest.mark.parametrize("kind", ["batch", "single"])
def test_penalties_count_the_tokens_of_the_answer(kind, adapted, tiny_tokenizer):
    tiny_tokenizer.eos_token_id = predicting.base_of(adapted).generation_config.eos_token_id = None
    plain = Row("first", [5, 6, 7], Sampling(decoding_settings(30)), Recorder())
    present = Row("first", [5, 6, 7], Sampling(decoding_settings(30), presence_penalty=1e4), Recorder())
    frequent = Row("first", [5, 6, 7], Sampling(decoding_settings(30), frequency_penalty=1e4), Recorder())
    engine = batched(adapted) if kind == "batch" else SingleEngine(Adapters(adapted), tiny_tokenizer)
    with predicting.inference_state(adapted):
        said, once, evenly = run(engine, [plain, present, frequent])
    assert len(set(said)) < 30
    assert len(set(once)) == len(set(evenly)) == 30  # nothing twice while there is anything else
    assert once[0] == said[0]
