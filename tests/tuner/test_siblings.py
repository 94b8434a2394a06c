"""Mixtures that compute together while text is generated: the same logits, whatever happens meanwhile."""

import copy
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mola import MolaLinear
from mola.tuner import siblings

from .models import VOCABULARY, random_config, tiny_llama, token_batch

NEW_TOKENS = 6
BATCH = token_batch(2, 5)
PROMPT = {name: BATCH[name] for name in ("input_ids", "attention_mask")}


def mola_layers(model):
    return [module for module in model.modules() if isinstance(module, MolaLinear)]


def adapted(model=None, *, autocast_adapter_dtype=True, **options):
    model = tiny_llama() if model is None else model
    torch.manual_seed(3)
    config = random_config(**options)
    return get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype).eval()


def generate(model, prompt=PROMPT, **options):
    """Logits of every new token, `(tokens, rows, vocabulary)`."""
    fixed = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    output = model.generate(
        **prompt, **{**fixed, **options}, return_dict_in_generate=True, output_logits=True, disable_compile=True
    )
    return torch.stack(output.logits)


def alone(model, prompt=PROMPT, **options):
    """The same without the tuner's own `generate`."""
    return generate(model.base_model.model, prompt, **options)


def assert_as_alone(model, prompt=PROMPT, **options):
    together, expected = generate(model, prompt, **options), alone(model, prompt, **options)
    torch.testing.assert_close(together, expected)
    return together


@pytest.fixture
def groups(monkeypatch):
    """Sizes of the groups that have computed."""
    sizes = []
    compute = siblings.Group.compute

    def watch(group, x):
        sizes.append(len(group.slots))
        return compute(group, x)

    monkeypatch.setattr(siblings.Group, "compute", watch)
    return sizes


def test_queries_keys_values_and_gate_and_up_compute_together(groups):
    model = adapted()
    assert_as_alone(model)
    # The first token is the prompt's, the last one is not read; all four layers have more than one expert.
    assert groups == [3, 1, 2, 1] * 4 * (NEW_TOKENS - 1)


def test_one_product_for_all_thin_matrices_that_read_the_same_input():
    class CountProducts(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm)
            return func(*args, **(kwargs or {}))

    def products(how, tokens):
        with CountProducts() as counter:
            how(model, max_new_tokens=tokens, min_new_tokens=tokens)
        return counter.products

    model = adapted()
    # Per decoder layer: 7 of the base, 4 of what reads the same input, 7 of what is added to the base; and the head.
    assert products(generate, 4) - products(generate, 3) == 4 * (7 + 4 + 7) + 1
    assert products(alone, 4) - products(alone, 3) == 4 * (7 + 14 + 7) + 1


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_any_number_of_chosen_experts(top_k, groups):
    assert_as_alone(adapted(num_experts=4, top_k=top_k))
    assert groups


def test_layers_with_one_expert_compute_alone(groups):
    assert_as_alone(adapted(num_experts="12", top_k=1))
    assert groups == [3, 1, 2, 1] * 2 * (NEW_TOKENS - 1)


def test_modules_of_different_kinds_of_input_do_not_meet(groups):
    assert_as_alone(adapted(target_modules=["q_proj", "v_proj", "down_proj"]))
    assert groups == [2, 1] * 4 * (NEW_TOKENS - 1)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float64])
def test_number_formats(base, adapter, groups):
    model = adapted(tiny_llama().to(base), autocast_adapter_dtype=False)
    for layer in mola_layers(model):
        layer.mola_A.to(adapter)
        layer.mola_B.to(adapter)
    together, expected = generate(model), alone(model)
    assert together.dtype == expected.dtype
    torch.testing.assert_close(together, expected)
    # An input with more digits than the adapter is rounded by the layer before its experts see it.
    assert bool(groups) is (torch.promote_types(base, adapter) == adapter)


def test_factors_in_two_number_formats_compute_alone(groups):
    model = adapted(tiny_llama().to(torch.bfloat16), autocast_adapter_dtype=False)
    for layer in mola_layers(model):
        layer.mola_router.float()
        layer.mola_A.float()
    assert_as_alone(model)
    assert not groups


def test_biases(groups):
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    assert_as_alone(adapted(model))
    assert groups == [3, 1, 2, 1] * 2 * (NEW_TOKENS - 1)


def test_bases_that_are_no_plain_linear(groups):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
    assert_as_alone(adapted(GPT2LMHeadModel(config)))
    assert groups


def test_encoder_and_decoder(groups):
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0
    )
    model = adapted(T5ForConditionalGeneration(config), task_type="SEQ_2_SEQ_LM", num_experts=4)
    assert_as_alone(model)
    assert set(groups) == {1, 2}  # query and value of self-attention meet, of cross-attention do not


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}, {"prefill_chunk_size": 2}])
def test_ways_to_generate(options, groups):
    assert_as_alone(adapted(), **options)
    assert groups


def test_prompts_of_different_length_and_many_tokens(groups):
    prompt = token_batch(7, 30)
    prompt = {"input_ids": prompt["input_ids"], "attention_mask": prompt["attention_mask"].clone()}
    prompt["attention_mask"][0, :4] = 0
    assert_as_alone(adapted(), prompt)
    assert len(groups) == 4 * 4 * (NEW_TOKENS - 2)  # the first few tokens show who reads what


def test_inference_mode_computes_alone(groups):
    model = adapted()
    with torch.inference_mode():
        assert_as_alone(model)
    assert not groups


def test_of_equal_logits_the_first_expert_is_chosen():
    model = adapted(num_experts=4)
    for layer in mola_layers(model):
        layer.mola_router["default"].data[:] = layer.mola_router["default"].data[:1].clone()
    assert_as_alone(model)


# ------------------------------------------------------------------ what may happen while text is generated


def on(model, place="self_attn.k_proj"):
    return next(module for name, module in model.named_modules() if name.endswith(f"layers.1.{place}"))


def write_in_place(model):
    for layer in mola_layers(model):
        for part in (layer.mola_A, layer.mola_B, layer.mola_router):
            with torch.no_grad():
                part["default"].mul_(1.5)


def write_one(part):
    def write(model):
        with torch.no_grad():
            getattr(on(model), part)["default"].mul_(3)

    return write


def replace(model):
    layer = on(model)
    layer.mola_B["default"] = torch.nn.Parameter(layer.mola_B["default"].detach() * 2)


def load(model):
    model.load_state_dict(
        {name: value * 1.5 if "mola_" in name else value for name, value in model.state_dict().items()}
    )


def change_scaling(model):
    on(model).scaling["default"] *= 3


def change_top_k(model):
    on(model).top_k["default"] = 1


def switch_adapter(model):
    model.set_adapter("other")


def switch_one(model):
    on(model).set_adapter("other")


def disable(model):
    model.base_model.disable_adapter_layers()


def watch_base(model):
    on(model).base_layer.register_forward_hook(lambda module, arguments, output: output * 2)


def change_input(model):
    def before(module, arguments):
        return (arguments[0] * 2,)

    on(model).register_forward_pre_hook(before)


def write_input(model):
    def before(module, arguments):
        arguments[0].mul_(2)

    on(model).register_forward_pre_hook(before)


def replace_base(model):
    layer = on(model)
    layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight.detach() * 2, requires_grad=False)


@pytest.mark.parametrize(
    "event",
    [
        write_in_place,
        write_one("mola_A"),
        write_one("mola_B"),
        write_one("mola_router"),
        replace,
        load,
        change_scaling,
        change_top_k,
        switch_adapter,
        switch_one,
        disable,
        watch_base,
        change_input,
        write_input,
        replace_base,
    ],
)
def test_changes_while_text_is_generated_have_their_effect(event):
    def changing(model):
        seen = []

        def processor(ids, scores):
            seen.append(scores)
            if len(seen) == 3:
                event(model)
            return scores

        return [processor]

    model = adapted()
    torch.manual_seed(5)
    model.add_adapter("other", random_config())
    unchanged = generate(model)
    other = copy.deepcopy(model)
    together = generate(model, logits_processor=changing(model))
    expected = alone(other, logits_processor=changing(other))
    torch.testing.assert_close(together, expected)
    assert not torch.allclose(together[3:], unchanged[3:])


def test_dropout_switched_on_while_text_is_generated_acts():
    model = adapted(lora_dropout=0.5)
    first, calls = generate(model), []

    def processor(ids, scores):
        calls.append(1)
        for layer in mola_layers(model) if len(calls) == 3 else ():
            layer.mola_dropout.train()
        return scores

    changed = generate(model, logits_processor=[processor])
    torch.testing.assert_close(changed[:3], first[:3])
    assert not torch.allclose(changed[3:], first[3:])


# ------------------------------------------------------------------ nothing is left


def test_nothing_is_left_when_it_ends_or_fails():
    model = adapted()
    layers = mola_layers(model)
    seen = []

    def processor(ids, scores):
        seen.extend(layer.slot for layer in layers)
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        generate(model, logits_processor=[processor])
    assert all(slot is not None for slot in seen)
    assert [layer.slot for layer in layers] == [None] * len(layers)
    generate(model)
    assert [layer.slot for layer in layers] == [None] * len(layers)


def test_a_copy_made_meanwhile_has_nothing_of_it(tmp_path):
    model, copies = adapted(), []

    def processor(ids, scores):
        if not copies:
            copies.append(copy.deepcopy(model))
            model.save_pretrained(tmp_path)
        return scores

    expected = generate(model, logits_processor=[processor])
    assert [layer.slot for layer in mola_layers(copies[0])] == [None] * 28
    torch.testing.assert_close(generate(copies[0]), expected)
    torch.testing.assert_close(generate(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()), expected)


def test_two_threads_on_one_model():
    model = adapted()
    prompts = [
        {name: token_batch(2, 5, seed=seed)[name] for name in ("input_ids", "attention_mask")} for seed in range(4)
    ]
    expected = [alone(model, prompt) for prompt in prompts]
    results = {}
    start = threading.Barrier(len(prompts))

    def work(index):
        start.wait()
        results[index] = [generate(model, prompts[index]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, wanted in enumerate(expected):
        for result in results[index]:
            torch.testing.assert_close(result, wanted)
    assert [layer.slot for layer in mola_layers(model)] == [None] * 28


def test_a_compiled_model_does_not_compile_again_when_text_is_generated():
    model = adapted()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model.base_model.model, backend=counter, dynamic=False)
    ids = BATCH["input_ids"]
    with torch.no_grad():
        before = compiled(ids, use_cache=False).logits
        with siblings.computing_together(iter(mola_layers(model))):
            model(ids[:, :2])  # groups form
            model(ids[:, :2])
            during = compiled(ids, use_cache=False).logits
        after = compiled(ids, use_cache=False).logits
    assert counter.frame_count == 1
    assert torch.equal(before, during)
    assert torch.equal(before, after)


def test_two_active_adapters_compute_alone(groups):
    model = adapted(num_experts="2222")
    model.add_adapter("other", random_config(num_experts="2222"))
    model.base_model.set_adapter(["default", "other"])
    assert_as_alone(model)
    assert not groups
