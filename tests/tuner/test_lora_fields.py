"""Fields of PEFT's LoraConfig: each works as in LoRA or raises an error; docs/reference/lora-fields.md lists all."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from mola import MolaConfig, MolaError, MolaLinear
from mola.tuner.initialization import initialize
from mola.tuner.loraplus import split_groups
from tests.tuner.models import clone, random_config, tiny_llama, token_batch
from tests.versions import has, needs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "lora-fields.md"
OWN = {field.name for field in dataclasses.fields(LoraConfig)} - {
    field.name for field in dataclasses.fields(LoraConfig.__mro__[1])
}
TIED = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    needs("peft", "0.19", "it ties nothing for other methods"),
]


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, MolaLinear)}


def randomize(model):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def test_every_field_of_lora_is_a_field_of_ours_or_refused_and_in_the_table():
    ours = {field.name for field in dataclasses.fields(MolaConfig)}
    rows = re.findall(r"^\| (`.*?) \| (not supported)?", PAGE.read_text(encoding="utf-8"), re.M)
    refused = {name: bool(is_refused) for row, is_refused in rows for name in re.findall(r"`(\w+)`", row)}
    assert {name: refused[name] for name in OWN} == {name: name not in ours for name in OWN}


def test_a_field_of_lora_alone_is_refused():
    with pytest.raises(MolaError, match=r"MolaConfig has no fields use_dora\..*docs/reference/lora-fields.md explains"):
        MolaConfig(use_dora=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "r": 8},
        {"rank_pattern": {"mlp.*": 2, "layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"down_proj": 3}},
        {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
        {"trainable_token_indices": [3, 5]},
        {"trainable_token_indices": {"embed_tokens": [7]}},
        {"modules_to_save": ["lm_head"]},
        pytest.param({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, marks=TIED),
        pytest.param({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, marks=TIED),
    ],
    ids=str,
)
def test_with_one_expert_it_is_lora(settings, tmp_path):
    base = tiny_llama(tie_word_embeddings="ensure_weight_tying" in settings)
    common = {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "lora_alpha": 16, "r": 4, **settings}
    lora = get_peft_model(clone(base), LoraConfig(**common))
    ours = get_peft_model(clone(base), MolaConfig(num_experts=1, top_k=1, **common))
    randomize(lora)
    theirs = {name: module for name, module in lora.named_modules() if hasattr(module, "lora_A")}
    assert {name: layer.scaling for name, layer in layers(ours).items()} == {
        name: layer.scaling for name, layer in theirs.items()
    }
    trained = {name: each for name, each in lora.named_parameters() if each.requires_grad and "lora_" not in name}
    with torch.no_grad():
        for name, layer in layers(ours).items():
            layer.mola_A["default"][0].copy_(theirs[name].lora_A["default"].weight)
            layer.mola_B["default"][0].copy_(theirs[name].lora_B["default"].weight.t())
        same = {name: each for name, each in ours.named_parameters() if each.requires_grad and "mola_" not in name}
        assert same.keys() == trained.keys()
        for name, parameter in same.items():
            parameter.copy_(trained[name])
    batch = token_batch()
    ours.eval(), lora.eval()
    assert torch.equal(ours(**batch).logits, lora(**batch).logits)
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(clone(base), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, ours(**batch).logits)


def test_patterns_of_experts_by_name(tmp_path):
    config = random_config(
        num_experts=[1, 2, 4, 4], num_experts_pattern={"self_attn.*": 1, "layers.0.mlp.up_proj": 8, "up_proj": 3}
    )
    model = get_peft_model(tiny_llama(), config).eval()
    found = {name.split("layers.")[1]: layer for name, layer in layers(model).items()}
    numbers = {name: (layer.num_experts["default"], layer.top_k["default"]) for name, layer in found.items()}
    assert {numbers[f"{index}.self_attn.q_proj"] for index in range(4)} == {(1, 1)}
    assert [numbers[f"{index}.mlp.up_proj"] for index in range(4)] == [(8, 2), (3, 2), (3, 2), (3, 2)]
    assert [numbers[f"{index}.mlp.down_proj"] for index in range(4)] == [(1, 1), (2, 2), (4, 2), (4, 2)]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    batch = token_batch()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_the_first_matching_key_still_counts_after_loading(tmp_path):
    """PEFT writes the keys of a configuration in the order of the alphabet."""
    patterns = {
        "num_experts_pattern": {"up_proj": 3, "mlp.*": 2},
        "rank_pattern": {"q_proj": 2, "layers.0.*": 8},
        "alpha_pattern": {"self_attn.*": 8, "q_proj": 32},
    }
    model = get_peft_model(tiny_llama(), random_config(**patterns)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    for name, pattern in patterns.items():
        assert list(getattr(loaded.peft_config["default"], name).items()) == list(pattern.items())
    batch = token_batch()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts_pattern": {"up_proj": 2}, "num_experts": 4, "top_k": 3}, "has 2 experts .* and top_k 3"),
        ({"rank_pattern": {"foo": 2}}, "`rank_pattern` .* matches no adapted module: 'foo'. There are down_proj"),
        ({"alpha_pattern": {"lm_head": 2}}, "`alpha_pattern` .* matches no adapted module: 'lm_head'"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "even rank: .* has 3. Choose 4"),
        ({"init_lora_weights": "principal", "num_experts": 8}, "16 directions for .*8 experts of rank 4 need 32"),
    ],
)
def test_settings_that_do_not_fit_leave_the_model_unchanged(settings, message):
    base = tiny_llama()
    before = [(name, type(module)) for name, module in base.named_modules()]
    with pytest.raises(MolaError, match=message):
        get_peft_model(base, random_config(**settings))
    assert [(name, type(module)) for name, module in base.named_modules()] == before


@pytest.mark.skipif(has("peft", "0.19"), reason="this PEFT ties saved modules")
def test_a_peft_that_ties_nothing_is_refused():
    config = random_config(modules_to_save=["lm_head"], ensure_weight_tying=True)
    with pytest.raises(MolaError, match="`ensure_weight_tying` with `modules_to_save` needs PEFT 0.19"):
        get_peft_model(tiny_llama(tie_word_embeddings=True), config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"a(": 3}}, r"no regular expression: 'a\('"),
        ({"rank_pattern": {"(?i)mlp": 3}}, r"no regular expression: '\(\?i\)mlp': global flags"),
        ({"rank_pattern": {"mlp": 0}}, "an integer of at least 1 for every key: got 0 for 'mlp'"),
        ({"num_experts_pattern": {"mlp": 2.0}}, "an integer of at least 1"),
        ({"alpha_pattern": {"mlp": -1}}, "a number above 0 for every key: got -1"),
        ({"rank_pattern": [3]}, r"must map names of modules to numbers, .*: got \[3\]"),
        ({"init_lora_weights": "pissa_niter_4"}, "got 'pissa_niter_4'"),
        ({"init_lora_weights": 1}, "got 1"),
        ({"use_rslora": 1}, r"`use_rslora` must be one of \[False, True\], got 1"),
    ],
)
def test_impossible_values_are_refused(settings, message):
    with pytest.raises(MolaError, match=message):
        MolaConfig(**settings)


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "principal"])
def test_a_start_is_the_base_model_with_experts_that_differ(start):
    base = tiny_llama()
    config = random_config(init_lora_weights=start, num_experts=4, r=4)
    model = get_peft_model(clone(base), config)
    batch = token_batch()
    torch.testing.assert_close(model(**batch).logits, base(**batch).logits, rtol=0, atol=2e-6)
    for layer in layers(model).values():
        A, B = layer.mola_A["default"], layer.mola_B["default"]
        torch.testing.assert_close(torch.einsum("ero,eri->eoi", B, A), torch.zeros(4, *layer.weight.shape))
        assert (B == 0).all() == (start != "orthogonal")
        assert all(not torch.equal(A[0], A[expert]) for expert in range(1, 4))
    model(**batch).loss.backward()
    assert all(layer.mola_B["default"].grad.abs().sum() > 0 for layer in layers(model).values())
    with_A = [bool((layer.mola_A["default"].grad != 0).any()) for layer in layers(model).values()]
    assert set(with_A) == {start == "orthogonal"}


def test_gaussian_is_as_wide_as_lora_s():
    torch.manual_seed(0)
    experts_A, experts_B = torch.empty(4, 8, 256), torch.empty(4, 8, 16)
    initialize("gaussian", experts_A, experts_B, None, nn.Linear(256, 16))
    assert experts_A.std().item() == pytest.approx(1 / 8, rel=0.03)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "bfloat16"])
def test_principal_deals_the_largest_directions_in_turn(kind):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    linear = nn.Linear(24, 16)
    with torch.no_grad():
        U, V = torch.linalg.qr(torch.randn(16, 16)).Q, torch.linalg.qr(torch.randn(24, 24)).Q
        linear.weight.copy_(U @ torch.diag(2.0 ** -torch.arange(16.0)) @ V[:, :16].t())
    base = linear
    if kind == "conv1d":
        base = Conv1D(16, 24)
        base.weight.data = linear.weight.t().contiguous()
    elif kind == "bfloat16":
        base = linear.bfloat16()
    experts_A, experts_B, router = torch.empty(3, 2, 24), torch.empty(3, 2, 16), torch.empty(3, 24)
    initialize("principal", experts_A, experts_B, router, base)
    for expert in range(3):
        for place in range(2):
            cosine = torch.cosine_similarity(experts_A[expert, place], V[:, place * 3 + expert], dim=0)
            assert abs(cosine.item()) == pytest.approx(1, abs=0.03 if kind == "bfloat16" else 1e-3)
    assert experts_A.norm(dim=-1).flatten().tolist() == pytest.approx([3**-0.5] * 6, rel=1e-4)
    assert router.abs().max() > 0


def test_loraplus_gives_b_its_own_rate():
    model = get_peft_model(tiny_llama(), random_config())
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = split_groups(torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1), model, 16)
    rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates.pop(id(parameter)) == pytest.approx(1e-3 * (16 if "mola_B" in name else 1))
    assert not rates
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    model(**token_batch()).loss.backward()
    optimizer.step()


def test_loraplus_refuses_a_ratio_of_zero_and_models_without_b():
    model = get_peft_model(tiny_llama(), random_config())
    with pytest.raises(MolaError, match="`loraplus_lr_ratio` must be a number above 0, got 0"):
        split_groups(torch.optim.SGD(model.parameters()), model, 0)
    other = get_peft_model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(MolaError, match="no trainable `B`"):
        split_groups(torch.optim.SGD(other.parameters()), other, 2.0)


@pytest.mark.parametrize(
    "settings", [{"trainable_token_indices": [3, 5]}, {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}]
)
def test_merging_and_unloading_leave_other_trained_modules_in_place(settings):
    model = get_peft_model(tiny_llama(), random_config(num_experts=1, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    expected = model(**token_batch()).logits
    merged = clone(model).merge_and_unload()
    torch.testing.assert_close(merged(**token_batch()).logits, expected, atol=1e-4, rtol=1e-4)
    plain = model.unload()
    assert not any("mola" in name or "token_adapter" in name for name, _ in plain.named_modules())


@pytest.mark.parametrize("name", ["0", "layers", "self_attn", "q_proj", "mola_A", "model"])
def test_an_adapter_must_not_be_called_like_a_module(name):
    with pytest.raises(MolaError, match=f"An adapter cannot be called '{name}'"):
        get_peft_model(tiny_llama(), random_config(), adapter_name=name)
    model = get_peft_model(tiny_llama(), random_config(), adapter_name="first")
    with pytest.raises(MolaError, match=f"An adapter cannot be called '{name}'"):
        model.add_adapter(name, random_config())
    with pytest.raises(MolaError, match=f"An adapter cannot be called '{name}'"):
        model.add_adapter(name, random_config(inference_mode=True))  # `first` would be saved without its tensors
    quiet = get_peft_model(tiny_llama(), random_config(inference_mode=True), adapter_name="first")
    quiet.add_adapter(name, random_config(inference_mode=True))  # as in a server
