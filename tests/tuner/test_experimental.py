"""Experimental settings in whole models: each way to run a model computes the same, before and after saving."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from mola import MolaConfig, MolaError, MolaLinear
from mola.tuner.routing import route_dense

from .models import clone, random_config, tiny_llama, token_batch

SETTINGS = [
    {"router": "top_k_constant"},
    {"router": "sparsegen", "top_k": [1, 3, 2, 4]},
    {"router": "sparsegen", "sparsegen_lambda": 0.5, "top_k": [1, 3, 4, 4]},
    {"shared_a": True},
    {"shared_a": True, "router": "top_k_constant"},
]
PRINCIPAL = {"init_lora_weights": "principal", "r": 4, "target_modules": ["q_proj"], "top_k": 1}
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)


@pytest.fixture(scope="module")
def base():
    return tiny_llama(hidden_size=64, intermediate_size=96)  # sizes that all backends compute


def make(base, settings, **options):
    torch.manual_seed(3)
    return get_peft_model(clone(base), random_config(num_experts=[1, 3, 4, 4], **settings, **options)).eval()


def expected_update(layer, x):
    """The formula, with the gates of the router's own function."""
    gates, _ = route_dense(
        layer.settings["default"].router, layer.router_logits("default", x), layer.top_k["default"], 1
    )
    hidden = torch.einsum("eri,ni->ner", layer.mola_A["default"], x)
    return torch.einsum("ne,ner,ero->no", gates, hidden, layer.mola_B["default"]) * layer.scaling["default"]


@each_setting
@pytest.mark.parametrize("num_tokens", [3, 64])
@pytest.mark.parametrize("training", [True, False])
def test_layers_follow_the_formula(base, settings, num_tokens, training):
    layer = next(each for each in make(base, settings).modules() if isinstance(each, MolaLinear) and each.layer_index)
    x = torch.randn(num_tokens, layer.in_features)
    with torch.set_grad_enabled(training):
        found = layer.train(training)(x) - layer.base_layer(x)
    torch.testing.assert_close(found, expected_update(layer, x), atol=1e-5, rtol=1e-4)


@each_setting
@torch.no_grad()
def test_saved_and_loaded_it_computes_the_same(base, settings, tmp_path):
    model, batch = make(base, settings), token_batch()
    assert not torch.allclose(model(**batch).logits, make(base, {})(**batch).logits, atol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(clone(base), tmp_path)
    config = loaded.peft_config["default"]
    assert {name: getattr(config, name) for name in settings} == settings
    assert torch.equal(loaded.eval()(**batch).logits, model(**batch).logits)


def test_a_shared_A_is_saved_once_and_is_that_of_all_experts(base, tmp_path):
    model = make(base, {"shared_a": True})
    model.save_pretrained(tmp_path)
    shapes = {name: tensor.shape[0] for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert {count for name, count in shapes.items() if name.endswith("mola_A")} == {1}
    assert {count for name, count in shapes.items() if name.endswith("mola_B")} == {1, 3, 4}
    copies, batch = make(base, {}), token_batch()
    state = {name: each.clone() for name, each in model.state_dict().items() if "mola_" in name}
    counts = {name: len(each) for name, each in copies.state_dict().items() if "mola_A" in name}
    state |= {name: state[name].repeat(count, 1, 1) for name, count in counts.items()}
    copies.load_state_dict(state, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, copies(**batch).logits, atol=1e-5, rtol=1e-4)


def test_a_shared_A_with_principal_directions_has_the_largest(base):
    directions = {}
    for shared in (True, False):
        model = get_peft_model(
            clone(base), MolaConfig(num_experts=1 if not shared else 3, shared_a=shared, **PRINCIPAL)
        )
        layer = next(each for each in model.modules() if isinstance(each, MolaLinear))
        directions[shared] = layer.mola_A["default"][0].detach()
    overlap = torch.linalg.svdvals(torch.nn.functional.normalize(directions[True]) @ directions[False].t())
    torch.testing.assert_close(overlap, directions[False].norm(dim=1), atol=1e-2, rtol=1e-2)


def test_a_shared_A_has_no_orthogonal_start():
    with pytest.raises(MolaError, match=r"`init_lora_weights` 'orthogonal' draws .* with `shared_a`"):
        MolaConfig(shared_a=True, init_lora_weights="orthogonal")


@each_setting
@torch.no_grad()
def test_generation_with_a_cache_chooses_the_tokens_of_whole_passes(base, settings):
    model = make(base, settings)
    ids = token_batch(rows=2, length=40)["input_ids"]
    found = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model(input_ids=found).logits[:, 39:-1].argmax(-1)
    assert torch.equal(found[:, 40:], expected)


@each_setting
@torch.no_grad()
def test_rows_with_adapters_of_different_settings(base, settings):
    model, batch = make(base, settings), token_batch(rows=2, length=5)
    model.add_adapter("plain", random_config(num_experts=2))
    mixed = model.eval()(**batch, adapter_names=["plain", "default"]).logits
    for row, name in enumerate(["plain", "default"]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[row], model(**batch).logits[row], atol=1e-4, rtol=1e-4)


@each_setting
def test_router_losses_and_checkpointing_give_the_gradients_of_a_plain_pass(base, settings):
    gradients = []
    for checkpointing in (False, True):
        model = make(base, settings, router_aux_loss_coef=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(**token_batch()).loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.requires_grad})
    assert all(each is not None for each in gradients[0].values())
    torch.testing.assert_close(*gradients)


@each_setting
def test_several_experts_cannot_be_merged(base, settings):
    with pytest.raises(MolaError, match="its gates depend on the input"):
        make(base, settings).merge_and_unload()


@each_setting
def test_a_compiled_layer_computes_the_same(base, settings):
    layer = next(each for each in make(base, settings).modules() if isinstance(each, MolaLinear) and each.layer_index)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for num_tokens, training in ((3, False), (40, True)):
        x = torch.randn(num_tokens, layer.in_features)
        layer.train(training)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
