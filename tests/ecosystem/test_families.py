"""mola on every model family of docs/reference/compatibility.md: tiny random models, one test per cell of the table."""

import re

import peft
import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

from mola import MolaConfig, MolaError
from mola.models.lora_config import draw_like_one_expert, lora_like
from tests.ecosystem.families import (
    AUTO_CLASSES,
    FAMILIES,
    GENERATING,
    adapt,
    auto_class,
    batch,
    build,
    is_encoder_decoder,
    layers,
    logits,
)
from tests.tuner.kernels.native import needs_compiler
from tests.versions import needs

# Their linears are those of a family beside them.
ALIKE = ("mistral", "qwen3", "gemma2", "qwen2-moe")


def parameters(names, slow=ALIKE):
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


EVERY_FAMILY = pytest.mark.parametrize("family", parameters(FAMILIES))


def leaf(name):
    return name.rpartition(".")[2]


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# --- targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", parameters(name for name in FAMILIES if FAMILIES[name].task == TaskType.CAUSAL_LM))
def test_one_expert_everywhere_is_the_lora_that_starts_alike(family):
    """As `mola train --num_experts 1` makes one."""
    config = MolaConfig(num_experts=1, r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    lora = get_peft_model(build(family), lora_like(config, build(family).to("meta")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        draw_like_one_expert(lora, False)
    torch.testing.assert_close(logits(lora, family), logits(adapt(build(family), family, num_experts=1), family))


@pytest.mark.compatibility(column="targets")
@EVERY_FAMILY
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_targets(family, targets):
    expected = FAMILIES[family].all_linear if targets and FAMILIES[family].all_linear else FAMILIES[family].default
    # Towers beside a language model have no layers of their own: "all-linear" needs one number for all there.
    uniform = bool(targets) and family == "gemma3-composite"
    model = adapt(build(family), family, target_modules=targets, num_experts=3 if uniform else "2-4")
    adapted = layers(model)
    assert {leaf(name) for name in adapted} == set(expected)
    heads = ("lm_head", "score", "classifier")
    assert not any(leaf(name) in heads or name.startswith(heads) for name in adapted)
    if not uniform:
        depth = max(layer.layer_index for layer in adapted.values()) + 1
        assert depth == (6 if is_encoder_decoder(family) else 4)
        for layer in adapted.values():
            assert layer.num_experts["default"] == (2 if layer.layer_index < depth / 2 else 4)


@pytest.mark.compatibility(column="targets")
@pytest.mark.parametrize(("family", "encoder_layers"), [("t5", 3), ("bart", 2)])
def test_layers_of_the_decoder_are_above_those_of_the_encoder(family, encoder_layers):
    adapted = layers(adapt(build(family), family, num_experts=[1, 2, 3, 4, 5, 6]))
    for name, layer in adapted.items():
        within = int(re.search(r"\.(\d+)\.", name)[1])
        assert layer.layer_index == (within if ".encoder." in f".{name}" else encoder_layers + within)
        assert layer.num_experts["default"] == layer.layer_index + 1
    assert {layer.layer_index for layer in adapted.values()} == set(range(6))


@pytest.mark.compatibility(column="targets", family="gemma3-composite")
def test_the_vision_tower_is_adapted_only_on_request():
    family = "gemma3-composite"
    default = layers(adapt(build(family), family))
    assert all(name.startswith("model.language_model.layers.") for name in default)
    with pytest.raises(MolaError, match=r"vision_tower.*in none of the 4 decoder layers.*`exclude_modules`"):
        adapt(build(family), family, target_modules=["q_proj"])
    asked = layers(adapt(build(family), family, target_modules=["q_proj"], num_experts=2))
    assert sum("vision_tower" in name for name in asked) == 2
    without = layers(adapt(build(family), family, exclude_modules=["q_proj", "layers.0.mlp.up_proj"]))
    assert set(without) == {name for name in default if not name.endswith(("q_proj", "layers.0.mlp.up_proj"))}
    one_layer = layers(adapt(build(family), family, layers_to_transform=[3]))
    assert {layer.layer_index for layer in one_layer.values()} == {3}


@pytest.mark.compatibility(column="targets")
@pytest.mark.parametrize("family", parameters(["mixtral", "qwen2-moe", "qwen3-moe"]))
def test_fused_experts_are_refused(family):
    base = build(family)
    with pytest.raises(MolaError, match=r"\.gate_up_proj' holds the weights of all 4 experts"):
        adapt(base, family, target_modules=["q_proj", "gate_up_proj"])
    assert not layers(base)


# --- train -------------------------------------------------------------------------------------


@pytest.mark.compatibility(column="train")
@EVERY_FAMILY
def test_train(family):
    model = adapt(build(family), family, router_aux_loss_coef=0.1)
    inputs = batch(family)
    with torch.no_grad():
        task_loss = model(**inputs).loss
    optimizer = torch.optim.AdamW(trained(model).values(), lr=5e-3)
    model.train()
    losses = []
    for step in range(5):
        loss = model(**inputs).loss
        losses.append(loss.item())
        if step == 0:
            torch.testing.assert_close(loss, task_loss + 0.1 * model.get_balance_loss())
        loss.backward()
        if step == 0:
            assert [name for name, parameter in trained(model).items() if parameter.grad is None] == []
            for name, layer in layers(model).items():
                check_gradients(name, layer, rows=len(inputs["input_ids"]), all_tokens=family != "sequence-classifier")
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def check_gradients(name, layer, rows, all_tokens):
    """Chosen experts have gradients, others exactly none; routers have some for every expert.

    The first token of a row attends to itself only and the last one predicts nothing: they may leave none.
    """
    chosen = layer.router_outputs["default"].expert_indices.view(rows, -1, layer.top_k["default"])
    for experts in (layer.mola_A["default"], layer.mola_B["default"]):
        nonzero = {index for index, gradient in enumerate(experts.grad) if gradient.abs().sum() > 0}
        assert nonzero <= set(chosen.flatten().tolist()), name
        assert nonzero >= set(chosen[:, 1:-1].flatten().tolist()) or not all_tokens, name
        assert len(nonzero) >= layer.top_k["default"], name
    assert (layer.mola_router["default"].grad.abs().sum(1) > 0).all(), name


@pytest.mark.compatibility(column="train")
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_balance_loss_counts_the_tokens_of_its_own_side(family):
    """As many tokens in as out, half of both masked: each side's routers count by its own mask."""
    inputs = batch(family)
    inputs["input_ids"], inputs["attention_mask"] = (
        torch.cat([inputs[name], inputs[name][:, :2]], 1) for name in ("input_ids", "attention_mask")
    )
    inputs["attention_mask"][:, 6:] = 0
    assert inputs["attention_mask"].shape == inputs["labels"].shape
    inputs["labels"][0, 2:] = -100
    # Without cross attention, whose keys and values are tokens of the encoder.
    model = adapt(build(family), family, router_aux_loss_coef=0.1, exclude_modules=r".*(EncDecA|encoder_a)tt.*").train()
    model(**inputs)
    masks = {True: inputs["attention_mask"].bool(), False: inputs["labels"] != -100}
    expected = balance_of(model, lambda name: masks[".encoder." in f".{name}"])
    torch.testing.assert_close(model.get_balance_loss(), expected)


def balance_of(model, mask_of):
    """Mean over the routers of a model; `mask_of(name)` has the tokens that count in a module."""
    found = []
    for name, layer in layers(model).items():
        output, mask = layer.router_outputs["default"], mask_of(name).flatten()
        counted = output.logits[mask].softmax(-1)
        share = torch.bincount(output.expert_indices[mask].flatten(), minlength=counted.shape[1])
        found.append(counted.shape[1] * (share / share.sum() * counted.mean(0)).sum())
    return torch.stack(found).mean()


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param({}, marks=needs("peft", "0.20", "0.18 takes lists inside of T5's layers too")),
        {"layers_pattern": "block"},
    ],
    ids=["", "pattern"],
)
def test_layers_to_transform_count_within_encoder_and_decoder(pattern):
    model = adapt(build("t5"), "t5", num_experts=2, layers_to_transform=[1], **pattern)
    assert {".".join(name.split(".")[:3]) for name in layers(model)} == {"encoder.block.1", "decoder.block.1"}


@pytest.mark.parametrize("num_labels", [3, 8])
def test_keys_of_cross_attention_count_by_the_attention_mask(num_labels):
    """But where there are as many labels as input tokens, which are told from each other by their number."""
    ids = torch.arange(3, 19).view(2, 8)
    mask, labels = torch.ones_like(ids), ids[:, :num_labels].clone()
    mask[0, 5:] = 0
    labels[1, 2:] = -100
    model = adapt(build("t5"), "t5", router_aux_loss_coef=0.1, target_modules=["EncDecAttention.k"]).train()
    model(input_ids=ids, attention_mask=mask, labels=labels)
    expected = balance_of(model, lambda name: mask.bool() if num_labels == 3 else labels != -100)
    torch.testing.assert_close(model.get_balance_loss(), expected)


def test_balance_loss_of_a_classifier_counts_all_but_padding():
    inputs = batch("sequence-classifier")
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 6:] = 0
    model = adapt(build("sequence-classifier"), "sequence-classifier", router_aux_loss_coef=0.1).train()
    model(**inputs)
    expected = balance_of(model, lambda name: inputs["attention_mask"].bool())
    torch.testing.assert_close(model.get_balance_loss(), expected)


@pytest.mark.compatibility(column="train")
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_router_losses_ignore_the_number_of_items_if_the_model_does(family):
    """It takes `num_items_in_batch` and computes its mean all the same: the routers' losses follow what it does."""
    model = adapt(build(family), family, router_aux_loss_coef=0.1).train()
    inputs = batch(family)
    without = adapt(build(family), family).train()
    assert torch.equal(without(**inputs).loss, without(**inputs, num_items_in_batch=99).loss)
    torch.testing.assert_close(model(**inputs).loss, model(**inputs, num_items_in_batch=99).loss)


def test_router_losses_follow_the_number_of_items_if_the_model_does():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    base = T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=sizes, decoder=sizes, vocab_size=64))
    targets = {"target_modules": ["q_proj"], "task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(base, MolaConfig(num_experts=3, r=2, router_aux_loss_coef=1.0, **targets)).train()
    ids = torch.arange(3, 19).view(2, 8)
    whole = model(input_ids=ids, labels=ids).loss
    half = model(input_ids=ids, labels=ids, num_items_in_batch=2 * ids.numel()).loss
    torch.testing.assert_close(half, whole / 2, rtol=0.05, atol=0.0)  # attention has a dropout


# --- save/load ---------------------------------------------------------------------------------


@pytest.mark.compatibility(column="save/load")
@EVERY_FAMILY
def test_save_and_load(family, tmp_path):
    build(family).save_pretrained(tmp_path / "base")
    model = adapt(auto_class(family).from_pretrained(tmp_path / "base"), family)
    with torch.no_grad():
        for parameter in trained(model).values():  # the head of a classifier too
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    expected = logits(model, family)
    model.save_pretrained(tmp_path / "adapter")

    base = auto_class(family).from_pretrained(tmp_path / "base")
    assert not torch.equal(logits(base, family), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), family), expected)
    auto = getattr(peft, "AutoPeft" + AUTO_CLASSES[FAMILIES[family].task])
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "adapter"), family), expected)


# --- generate ----------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model, inputs, steps):
    """Tokens by calling the model on the whole text again and again, without `generate`."""
    inputs = dict(inputs)
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.full((len(inputs["input_ids"]), 1), start)
    grows = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    for _ in range(steps):
        token = model(**inputs).logits[:, -1].argmax(-1, keepdim=True)
        inputs[grows] = torch.cat([inputs[grows], token], 1)
        if not model.config.is_encoder_decoder:
            for name in set(inputs) - {grows}:
                inputs[name] = torch.cat([inputs[name], inputs[name][:, -1:]], 1)
    return inputs[grows]


def prompts(family):
    inputs = batch(family)
    del inputs["labels"]
    return inputs


@pytest.mark.compatibility(column="generate")
@pytest.mark.parametrize("family", parameters(GENERATING))
def test_generate(family):
    model = adapt(build(family), family).eval()
    inputs = prompts(family)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = greedy(model, inputs, 6)
    assert torch.equal(model.generate(**inputs, **options, use_cache=True), expected)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), expected)
    first = {"output_logits": True, "return_dict_in_generate": True}
    plain, adapted = (each.generate(**inputs, **options, **first) for each in (build(family), model))
    assert not torch.equal(plain.logits[0], adapted.logits[0])

    # Encoders pad on the right: their positions may be counted from the left.
    pad = 0
    sides = (0, 3) if is_encoder_decoder(family) else (3, 0)
    padded = {name: torch.nn.functional.pad(value, sides, value=pad) for name, value in inputs.items()}
    answer = model.generate(**padded, **options)
    new = expected if is_encoder_decoder(family) else expected[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(answer[:, -new.shape[1] :], new)


# --- switching ---------------------------------------------------------------------------------


@pytest.mark.compatibility(column="switching")
@EVERY_FAMILY
def test_switching(family):
    base = build(family)
    plain = logits(base, family)
    model = adapt(base, family)
    first = logits(model, family)
    config = model.peft_config["default"]
    model.add_adapter("second", type(config)(num_experts=3, r=2, init_lora_weights=False, task_type=config.task_type))
    assert torch.equal(logits(model, family), first)
    model.set_adapter("second")
    second = logits(model, family)
    assert {layer.active_adapter[0] for layer in layers(model).values()} == {"second"}
    assert not torch.equal(second, first)
    with model.disable_adapter():
        assert torch.equal(logits(model, family), plain)
    assert torch.equal(logits(model, family), second)
    model.set_adapter("default")
    assert torch.equal(logits(model, family), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model, family), first)
    assert not torch.equal(first, plain)
    assert torch.equal(logits(model.unload(), family), plain)


# --- checkpointing -----------------------------------------------------------------------------


def gradients(model, inputs):
    """Gradients of one step, and how often each adapted linear was called."""
    calls = []
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers(model).values()]
    model.train().zero_grad()
    model(**inputs).loss.backward()
    for handle in handles:
        handle.remove()
    return {name: parameter.grad.clone() for name, parameter in trained(model).items()}, len(calls)


@pytest.mark.compatibility(column="checkpointing")
@EVERY_FAMILY
@pytest.mark.parametrize("use_reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointing(family, use_reentrant):
    # The router losses refuse the re-entrant kind, which has no gradient for them.
    model = adapt(build(family), family, router_aux_loss_coef=0.0 if use_reentrant else 0.1)
    expected, calls = gradients(model, batch(family))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    result, more_calls = gradients(model, batch(family))
    assert calls == len(layers(model))
    assert more_calls > calls  # recomputation of a layer may stop before its last linears
    check_equal(result, expected)


def check_equal(gradients, expected):
    """Equal up to the rounding of float32: the order in which gradients are added up may differ."""
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (gradients[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-4, f"{name}: {error}"


# --- compile -----------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def one_step(forward, model, inputs):
    model.train().zero_grad()
    forward(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trained(model).items()}


def check_compiled(family, backend):
    """One graph, and the gradients of the model as it is."""
    inputs = batch(family)
    if family in GENERATING:
        inputs["use_cache"] = False
    # One layer: every adapted linear takes time to compile.
    model = adapt(build(family), family, router_aux_loss_coef=0.1, layers_to_transform=[2])
    if family == "gpt2":
        # What Transformers takes anyway, with a log message that no graph can hold.
        model.base_model.model.loss_type = "ForCausalLM"
    expected = one_step(model, model, inputs)
    check_equal(one_step(torch.compile(model, backend=backend, fullgraph=True), model, inputs), expected)


@pytest.mark.compatibility(column="compile")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("family", parameters(FAMILIES, slow=set(FAMILIES)))
def test_compiled(family):
    check_compiled(family, "aot_eager")


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_by_inductor():
    check_compiled("gpt2", "inductor")  # LLaMA: tests/training/test_compiled.py
