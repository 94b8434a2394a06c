"""Experts that a base model keeps stacked in one parameter: `target_parameters`, held to PEFT's LoRA."""

import json

import pytest
import torch
from accelerate import cpu_offload
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import AutoModelForCausalLM as Auto
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig

from mola import MolaConfig, MolaError, MolaLinear
from mola.tuner.loraplus import split_groups
from mola.tuner.stacked import StackedParameters
from tests.grids import slow
from tests.tuner.models import VOCABULARY, clone, random_config, token_batch
from tests.versions import needs

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
KINDS = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen3-moe": (Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 24}),
    "gpt-oss": (GptOssConfig, {"num_local_experts": 4}),  # stores (experts, in, out)
}
BOTH = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
LIKE_OURS = needs("peft", "0.19", "its A and B are those of the transposed weight")


def base(kind="mixtral", seed=0, **options):
    config, own = KINDS[kind]
    torch.manual_seed(seed)
    model = Auto.from_config(config(**{**SMALL, **own, **options}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def config(**options):
    """Attention with mixtures and both stacks, all of it other than zero."""
    return random_config(
        **{"num_experts": 3, "target_modules": ["q_proj", "v_proj"], "target_parameters": BOTH, **options}
    )


def stacks(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, StackedParameters)}


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**token_batch(**kwargs)).logits


def twins(kind, **options):
    """Ours and PEFT's with the same weights; and pairs of their tensors in one layout."""
    common = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], "target_parameters": BOTH, **options}
    model = base(kind)
    lora = get_peft_model(clone(model), LoraConfig(**common))
    ours = get_peft_model(clone(model), MolaConfig(num_experts=1, top_k=1, **common))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    pairs = []
    for name, module in lora.named_modules():
        if isinstance(module, ParamWrapper):
            wrapper = ours.get_submodule(name.replace(".base_layer", ""))
            A, B = (getattr(wrapper, f"mola_{part}_{module.parameter_name}")["default"] for part in "AB")
            theirs = module.lora_A["default"].weight, module.lora_B["default"].weight
            pairs += [
                (A, theirs[0], lambda a: a.flatten(0, 1)),
                (B, theirs[1], lambda b: b.permute(2, 1, 0).flatten(1)),
            ]
        elif hasattr(module, "lora_A"):
            own = ours.get_submodule(name)
            pairs.append((own.mola_A["default"], module.lora_A["default"].weight, lambda a: a[0]))
            pairs.append((own.mola_B["default"], module.lora_B["default"].weight, lambda b: b[0].t()))
    assert len(pairs) == len([each for each in ours.parameters() if each.requires_grad]) == 2 * 2 * 4
    with torch.no_grad():
        for own, theirs, layout in pairs:
            # The inverse of `layout`: of where each number goes.
            order = layout(torch.arange(own.numel()).view(own.shape)).reshape(-1)
            own.view(-1)[order] = theirs.reshape(-1)
            assert torch.equal(layout(own), theirs)
    return ours, lora, pairs


# ---------------------------------------------------------------------- PEFT's LoRA


@LIKE_OURS
@pytest.mark.parametrize(
    ("kind", "options"), [("mixtral", {}), ("gpt-oss", {"use_rslora": True, "r": 3}), *slow(("qwen3-moe", {}))]
)
def test_it_is_lora(kind, options):
    ours, lora, pairs = twins(kind, **options)
    ours.train(), lora.train()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1) for model in (ours, lora)]
    for step in range(5):
        batch = token_batch(seed=step)
        outputs = [model(**batch) for model in (ours, lora)]
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-5, atol=1e-5)
        for output in outputs:
            output.loss.backward()
        for own, theirs, layout in pairs:
            assert theirs.grad.abs().max() > 0
            # Once the weights have drifted apart by rounding, so do gradients.
            torch.testing.assert_close(layout(own.grad), theirs.grad, rtol=1e-3, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for own, theirs, layout in pairs:
            # AdamW divides by the size of the gradient: rounding of tiny ones counts.
            torch.testing.assert_close(layout(own), theirs, rtol=1e-3, atol=1e-4)


@needs("peft", "0.21", "its update is rounded once")
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_lora_s(kind):
    ours, lora, _ = twins(kind)
    before = logits(ours)
    for model in (ours, lora):
        for name, parameter in model.named_parameters():
            if "lora_" not in name and "mola_" not in name:
                parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(ours), logits(lora))
        assert not torch.equal(logits(ours), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_base_model_and_as_wide_as_lora_s(kind):
    model = base(kind)
    adapted = get_peft_model(clone(model), config(init_lora_weights=True, num_experts=1, top_k=1))
    assert torch.equal(logits(adapted), logits(model))
    for wrapper in stacks(adapted).values():
        for parameter in ("gate_up_proj", "down_proj"):
            A, B = (getattr(wrapper, f"mola_{part}_{parameter}")["default"] for part in "AB")
            weight = getattr(wrapper.base_layer, parameter)
            sizes = weight.shape[1:] if kind == "gpt-oss" else weight.shape[:0:-1]
            assert (len(A), A.shape[2], B.shape[2]) == (4, *sizes)
            assert 0.9 < A.abs().max() * A.shape[2] ** 0.5 <= 1
            assert not B.any()


def test_a_parameter_with_two_dimensions_is_a_linear():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    common = {"num_experts": 1, "top_k": 1, "r": 2, "init_lora_weights": False}
    bare = get_peft_model(clone(linear), MolaConfig(target_modules=[], target_parameters=["0.weight"], **common))
    plain = get_peft_model(clone(linear), MolaConfig(target_modules=["0"], **common))
    with torch.no_grad():
        for part in "AB":
            own = getattr(bare.base_model.model[0], f"mola_{part}_weight")["default"]
            own.copy_(getattr(plain.base_model.model[0], f"mola_{part}")["default"])
    x = torch.randn(7, 6)
    torch.testing.assert_close(bare(x), plain(x))
    assert not torch.equal(bare(x), linear(x))


# ---------------------------------------------------------------------- one adapter with mixtures


@pytest.mark.parametrize("kind", ["mixtral", *slow("qwen3-moe", "gpt-oss")])
def test_mixtures_and_stacked_experts_train_together(kind):
    model = get_peft_model(base(kind), config(init_lora_weights=True, router_aux_loss_coef=0.01)).train()
    frozen = {name: each.clone() for name, each in model.named_parameters() if not each.requires_grad}
    assert all("mola_" not in name for name in frozen)
    optimizer, losses = split_groups(torch.optim.AdamW(model.parameters(), lr=3e-3), model, 4), []
    assert sum("mola_B" in name for name, _ in model.named_parameters()) == len(optimizer.param_groups[1]["params"])
    for _ in range(10):
        losses.append(model(**token_batch()).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])
        assert name in frozen or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    plain = get_peft_model(base(), config()).train()
    saving = clone(plain)
    saving.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saving.enable_input_require_grads()
    for model in (plain, saving):
        model(**token_batch()).loss.backward()
    grads = [[each.grad for each in model.parameters() if each.requires_grad] for model in (plain, saving)]
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_ranks_and_scales_are_those_of_the_layer_and_of_patterns():
    model = get_peft_model(
        base(), config(r=[2, 5], rank_pattern={"1.mlp.experts.down_proj": 7}, alpha_pattern={"experts.*": 3})
    )
    found = {name[-13]: wrapper.settings["default"] for name, wrapper in stacks(model).items()}
    ranks = {(layer, parameter): each.r for layer, own in found.items() for parameter, each in own.items()}
    assert ranks == {("0", "down_proj"): 2, ("0", "gate_up_proj"): 2, ("1", "down_proj"): 7, ("1", "gate_up_proj"): 5}
    assert {(each.lora_alpha, each.num_experts) for own in found.values() for each in own.values()} == {(3, 1)}


@pytest.mark.parametrize("options", [{"layers_to_transform": [1]}, {"exclude_modules": r".*\.0\.mlp\..*"}], ids=str)
def test_fields_that_leave_linears_out_leave_parameters_out(options):
    assert [name[-13] for name in stacks(get_peft_model(base(), config(**options)))] == ["1"]


def test_without_linears():
    model = get_peft_model(base(), config(target_modules=[]))
    assert len(stacks(model)) == 2
    assert not any(isinstance(module, MolaLinear) for module in model.modules())
    model.train()(**token_batch()).loss.backward()


def test_linears_get_mixtures_unless_they_are_left_out(tmp_path):
    """None is the default, beside `target_parameters` too; in a file of earlier versions it meant none."""
    model = get_peft_model(base(), config(target_modules=None))
    mixtures = [name for name, module in model.named_modules() if isinstance(module, MolaLinear)]
    assert len(mixtures) == 2 * 4  # attention: q, k, v and o
    assert model.peft_config["default"].target_modules
    bare = get_peft_model(base(), config(target_modules=[]))
    bare.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    assert settings["target_modules"] == []
    path.write_text(json.dumps(settings | {"target_modules": None}))
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(bare.eval()))


def test_compiled_it_is_one_graph_with_the_same_gradients():
    plain = get_peft_model(base(num_experts_per_tok=4, experts_implementation="batched_mm"), config(target_modules=[]))
    module = next(iter(stacks(plain).values()))
    inputs = torch.randn(6, 32), torch.arange(4).expand(6, 4), torch.full((6, 4), 0.25)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    grads = []
    for call in (module, compiled):
        call(*inputs).square().sum().backward()
        grads.append([each.grad.clone() for each in module.parameters() if each.requires_grad])
        module.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


# ---------------------------------------------------------------------- files, several adapters


@pytest.mark.parametrize("kind", ["mixtral", *slow("qwen3-moe", "gpt-oss")])
def test_a_saved_adapter_is_the_same_to_the_last_bit(kind, tmp_path):
    model = base(kind)
    model.save_pretrained(tmp_path / "base")
    model = Auto.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(clone(model), config())
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    assert not torch.equal(expected, logits(model))
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(clone(model), tmp_path / "adapter", **options)
        assert torch.equal(logits(loaded), expected)
        assert loaded.peft_config["default"].target_parameters == BOTH
        assert not any(each.requires_grad for each in loaded.parameters())
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    model.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(model), expected)


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    get_peft_model(base(), config()).save_pretrained(tmp_path)
    with pytest.raises(MolaError, match=r"mola_B_gate_up_proj\.default has shape \(4, 4, 32\), .* needs \(4, 4, 40\)"):
        PeftModel.from_pretrained(base(intermediate_size=20), tmp_path)
    with pytest.raises(MolaError, match="tensors are missing .*layers.2"):
        PeftModel.from_pretrained(base(num_hidden_layers=3), tmp_path)


def test_two_adapters_with_parameters_of_their_own():
    model = base()
    expected = [logits(model)]
    for seed, options in ((1, {}), (2, {"target_parameters": BOTH[:1], "r": 2, "target_modules": ["o_proj"]})):
        torch.manual_seed(seed)
        expected.append(logits(get_peft_model(clone(model), config(**options))))
    torch.manual_seed(1)
    adapted = get_peft_model(clone(model), config(), "first")
    torch.manual_seed(2)
    adapted.add_adapter("second", config(target_parameters=BOTH[:1], r=2, target_modules=["o_proj"]))
    assert torch.equal(logits(adapted), expected[1])
    adapted.set_adapter("second")
    assert torch.equal(logits(adapted), expected[2])
    trained = {name for name, each in adapted.named_parameters() if each.requires_grad}
    assert trained
    assert all(name.endswith(".second") for name in trained)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), expected[0])
    adapted.base_model.set_adapter(["first", "second"])
    assert not any(torch.equal(logits(adapted), each) for each in expected)
    adapted.delete_adapter("second")
    adapted.set_adapter("first")
    assert torch.equal(logits(adapted), expected[1])
    assert not any(".second" in name for name, _ in adapted.named_parameters())
    assert all(set(wrapper.settings) == {"first"} for wrapper in stacks(adapted).values())
    unloaded = adapted.unload()
    assert torch.equal(logits(unloaded), expected[0])
    assert not stacks(unloaded)


def test_both_active_add_up():
    model = get_peft_model(base(), config(target_modules=[]))
    model.add_adapter("second", config(target_modules=[]))
    model.base_model.set_adapter(["default", "second"])
    separate = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), separate, rtol=0, atol=1e-5)


def test_an_offloaded_base_is_refused(tmp_path):
    base().save_pretrained(tmp_path / "base")
    parts = ["model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb", "model.layers.0"]
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    offloaded = Auto.from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "off")
    with pytest.raises(MolaError, match=r"must not be offloaded: the weights of 'model\.layers\.1.*experts'"):
        get_peft_model(offloaded, config(target_modules=[]))


def test_experts_that_were_offloaded_end_in_one_error():
    model = cpu_offload(get_peft_model(base(), config(target_modules=[])), execution_device="cpu")
    with pytest.raises(MolaError, match="the experts are not in memory: the model was offloaded"):
        logits(model)


# ---------------------------------------------------------------------- merging


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mixtral", {"num_experts": 1, "top_k": 1}),
        ("gpt-oss", {"target_modules": []}),
        *slow(("qwen3-moe", {"target_modules": []})),
    ],
)
def test_merging_equals_the_adapter(kind, options):
    model = base(kind)
    adapted = get_peft_model(clone(model), config(**options))
    expected = logits(adapted)
    adapted.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), logits(model), rtol=0, atol=1e-5)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-5)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert [(name, type(each)) for name, each in merged.named_modules()] == [
        (name, type(each)) for name, each in model.named_modules()
    ]


def test_a_weight_of_two_modules_is_not_merged():
    model = get_peft_model(
        base(tie_word_embeddings=True), config(target_modules=[], target_parameters=["embed_tokens.weight"])
    )
    head = model.get_base_model().lm_head.weight.detach().clone()
    with pytest.raises(MolaError, match="which shares its weight with"):
        model.merge_and_unload()
    assert torch.equal(model.get_base_model().lm_head.weight, head)


def test_beside_a_mixture_nothing_is_merged():
    model = get_peft_model(base(), config())
    before = {name: each.clone() for name, each in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MolaError, match="cannot be merged: .*q_proj' has 3 experts"):
            merge()
    assert not any(wrapper.merged for wrapper in stacks(model).values())
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())


def test_a_broken_update_is_not_merged():
    model = get_peft_model(base(), config(target_modules=[]))
    for wrapper in stacks(model).values():
        wrapper.mola_B_down_proj["default"].data[1, 0, 0] = float("inf")
    before = {name: each.clone() for name, each in model.named_parameters()}
    with pytest.raises(MolaError, match="NaNs detected in the merged weights. The adapter default"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["experts.up"]}, "do not: 'experts.up'. Stacked experts of this model: experts.gate_up"),
        ({"target_parameters": [*BOTH, "w1"]}, "these do not: 'w1'"),
        ({"layers_to_transform": [5], "target_modules": []}, "not be left out by other fields: these do not"),
        ({"target_parameters": ["input_layernorm.weight"]}, r"2 or 3 dimensions: .*has shape \(32,\)"),
        ({"target_parameters": ["q_proj.weight"]}, "must not name the same linear, .*q_proj'"),
        ({"rank_pattern": {"experts.up": 3}}, "`rank_pattern` has a key that matches no adapted module"),
        ({"num_experts_pattern": {"experts.down_proj": 3}}, "`num_experts_pattern` has a key that matches no"),
        (
            {"init_lora_weights": "orthogonal", "rank_pattern": {"experts.down_proj": 3}},
            "even rank: .*down_proj' has",
        ),
    ],
)
def test_settings_that_do_not_fit_leave_the_model_unchanged(options, message):
    model = base()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(MolaError, match=message):
        get_peft_model(model, config(**options))
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_packed_weights_are_refused():
    model = base()
    for layer in model.model.layers:
        packed = nn.Parameter(layer.mlp.experts.down_proj.to(torch.uint8), requires_grad=False)
        layer.mlp.experts.down_proj = packed
    with pytest.raises(MolaError, match=r"must name plain floating-point parameters .*torch.uint8"):
        get_peft_model(model, config())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"target_parameters": ["q_proj.weight"], "target_modules": []}, {"target_parameters": None}),
        ({"target_parameters": None}, {"target_parameters": ["q_proj.weight"], "target_modules": []}),
    ],
)
def test_a_linear_of_another_adapter_s_other_field_is_refused(first, second):
    model = get_peft_model(base(), config(**first))
    expected = logits(model)
    with pytest.raises(MolaError, match="must not name the same linear"):
        model.add_adapter("second", config(**second))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": [3]}, r"`target_parameters` must be a list of names: got \[3\]"),
        (
            {"target_parameters": BOTH, "lora_dropout": 0.05},
            "`lora_dropout` must be 0 .*got 0.05",
        ),
        ({"target_parameters": BOTH, "init_lora_weights": "principal"}, "'principal' reads the weights of linears"),
        ({"target_modules": []}, "`target_modules` must not be empty unless"),
    ],
)
def test_impossible_values_are_refused(options, message):
    with pytest.raises(MolaError, match=message):
        MolaConfig(**options)


def test_rows_of_one_batch_cannot_have_weights_of_their_own():
    model = get_peft_model(base(), config(target_modules=["q_proj"])).eval()
    model.add_adapter("linears", MolaConfig(num_experts=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    batch = token_batch()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mola_" in name:
                parameter.normal_(std=0.3)
    names = ["__base__"] * (len(batch["input_ids"]) - 1)
    with pytest.raises(MolaError, match="with adapters that have `target_parameters`"):
        model(**batch, adapter_names=["default", *names])
    mixed = model(**batch, adapter_names=["linears", *names]).logits
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1:], model(**batch).logits[1:])
    model.set_adapter("linears")
    torch.testing.assert_close(mixed[:1], model(**batch).logits[:1])
