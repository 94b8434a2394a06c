"""One adapted linear on a packed weight: base plus experts, dtypes, gradients, merging."""

from collections import Counter

import pytest
import torch
from peft import get_peft_model

from mola import MolaConfig, MolaError, MolaLinear
from mola.models.quantization import prepare_for_training, weight_bytes
from tests.grids import slow
from tests.quantised.models import packed_layers, quantised

pytestmark = [pytest.mark.quant, pytest.mark.usefixtures("bitsandbytes")]
ONE_KIND = ["nf4", *slow("fp4-double", "int8")]
IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))


def adapted(base, **options):
    """With experts that are not zero."""
    defaults = {"num_experts": "2-4", "r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    return get_peft_model(base, MolaConfig(**{**defaults, **options}))


def mixtures(model):
    return [module for module in model.modules() if isinstance(module, MolaLinear)]


def by_hand(layer, x):
    """The formula of the paper, expert by expert, on what the packed layer returns."""
    result = layer.base_layer(x).float()
    A, B, router = layer.mola_A["default"], layer.mola_B["default"], layer.mola_router["default"]
    chosen, experts = (x.float() @ router.float().T).softmax(-1).topk(layer.top_k["default"])
    gates = torch.zeros(*x.shape[:-1], len(A)).scatter(-1, experts, chosen / chosen.sum(-1, keepdim=True))
    for index in range(len(A)):
        update = x.float() @ A[index].float().T @ B[index].float()
        result = result + gates[..., index : index + 1] * layer.scaling["default"] * update
    return result


@pytest.mark.parametrize("kind", ONE_KIND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_base_plus_experts(kind, dtype, blocks_dir):
    layer = mixtures(adapted(quantised(blocks_dir, kind, dtype)).eval())[-1]  # 128 inputs, 4 experts
    assert (layer.num_experts["default"], layer.in_features, layer.out_features) == (4, 128, 64)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        expected, got = by_hand(layer, x), layer(x)
        base = layer.base_layer(x).float()
    assert got.dtype == dtype
    assert (expected - base).norm() > 0.1 * base.norm()
    # bfloat16 keeps 8 bits, and base and sum are both rounded to it.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)


def test_experts_and_routers_are_never_packed(blocks_dir):
    model = adapted(quantised(blocks_dir, "nf4", torch.bfloat16))
    formats = {name.split(".")[-2]: p.dtype for name, p in model.named_parameters() if "mola_" in name}
    assert formats == {"mola_A": torch.float32, "mola_B": torch.float32, "mola_router": torch.float32}


@pytest.mark.parametrize("kind", ONE_KIND)
def test_parameters_are_counted_unpacked(kind, blocks_dir, tmp_path):
    model = quantised(blocks_dir, kind)
    packed = sum(parameter.numel() for parameter in model.parameters())
    trained, total = adapted(model).get_nb_trainable_parameters()
    plain = 2 * 258 * 64 + 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
    assert total - trained == plain
    assert packed == plain if kind == "int8" else packed < plain


@pytest.mark.parametrize(("kind", "scales"), [("nf4", 4 / 64), ("fp4-double", 1 / 64 + 4 / 64 / 256), ("int8", 4 / 64)])
def test_bytes_are_counted_with_the_scales(kind, scales, blocks_dir):
    """One scale for 64 weights in 4 bits, for one row in 8 bits; all rows but those of `down_proj` are 64 long."""
    base = quantised(blocks_dir, kind)
    linears = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    rows = linears - 4 * 64 * 128 / 2 if kind == "int8" else linears
    packed = linears * (1 if kind == "int8" else 0.5) + rows * scales
    others = 4 * (2 * 258 * 64 + 4 * 2 * 64 + 64) + sum(buffer.nbytes for buffer in base.buffers())
    # The scales' own scales: one for 256, at least one per linear.
    assert weight_bytes(base) - others == pytest.approx(packed, abs=4 * 7 * 4 if kind == "fp4-double" else 0)


def gradients(model):
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("kind", "checkpointing"), [("nf4", True), *slow(("nf4", False), ("int8", True))])
def test_an_evaluation_does_not_change_the_gradients_after_it(kind, checkpointing, blocks_dir):
    """bitsandbytes repacks weights at an evaluation on some CPUs, and lets no gradient through from then on."""
    base = quantised(blocks_dir, kind)
    model = adapted(prepare_for_training(base, checkpointing, {"use_reentrant": False})).train()
    before = gradients(model)
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    after = gradients(model.train())
    assert set(before) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("mola_" in name for name in before)
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name
        assert gradient.abs().max() > 0, name


def test_which_weights_bitsandbytes_may_repack(tiny_model_dir, blocks_dir, monkeypatch):
    """Whole blocks in bfloat16, and none of a model that is trained; looked at on any processor."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)

    def flags(model):
        return {layer.support_avx512bf16_for_cpu for layer in packed_layers(model).values()}

    assert flags(quantised(tiny_model_dir, "nf4", torch.bfloat16)) == {False}  # 32 wide
    assert flags(quantised(blocks_dir, "nf4", torch.float32)) == {False}
    base = quantised(blocks_dir, "nf4", torch.bfloat16)
    assert flags(base) == {True}
    assert flags(prepare_for_training(base, False, None)) == {False}


def test_checkpointing_gives_the_same_gradients(blocks_dir):
    """And runs every decoder layer once more; that may stop before its last linears."""
    found, calls = {}, {False: Counter(), True: Counter()}
    for on in (False, True):
        model = adapted(prepare_for_training(quantised(blocks_dir, "nf4"), on, {"use_reentrant": False})).train()
        for layer in mixtures(model):
            layer.register_forward_hook(lambda layer, *_, seen=calls[on]: seen.update([layer.layer_index]))
        found[on] = gradients(model)
    assert calls[False] == dict.fromkeys(range(4), 7)
    assert all(calls[True][index] > 7 for index in range(4))
    assert found[True].keys() == found[False].keys()
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient, msg=name)


def test_repacked_weights_are_refused_for_training(bitsandbytes, blocks_dir):
    base = quantised(blocks_dir, "nf4", torch.bfloat16)
    with torch.no_grad():
        base(input_ids=IDS)
    if not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in packed_layers(base).values()):
        pytest.skip("this CPU has no bfloat16 instructions: bitsandbytes does not repack weights")
    with pytest.raises(MolaError, match="Load the model again"):
        prepare_for_training(base)


def test_norms_embeddings_and_head_are_float32_for_training(blocks_dir):
    base = quantised(blocks_dir, "nf4", torch.bfloat16)
    packed = {f"{name}.weight" for name in packed_layers(base)}
    assert {p.dtype for name, p in base.named_parameters() if name not in packed} == {torch.bfloat16}
    prepare_for_training(base)
    assert {p.dtype for name, p in base.named_parameters() if name not in packed} == {torch.float32}
    assert {p.dtype for name, p in base.named_parameters() if name in packed} == {torch.uint8}
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_a_plain_base_comes_back_as_it_is(tiny_model):
    assert prepare_for_training(tiny_model) is tiny_model
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())


def test_merging_is_refused_and_changes_nothing(blocks_dir):
    model = adapted(quantised(blocks_dir, "nf4"), num_experts=1)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        with pytest.raises(MolaError, match="without quantisation"):
            model.merge_and_unload()
        with pytest.raises(MolaError, match="without quantisation"):
            model.merge_adapter()
        assert torch.equal(model(input_ids=IDS).logits, before)


def test_packed_weights_stored_as_floats_are_not_merged(bitsandbytes):
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_storage=torch.bfloat16).to("cpu")
    assert layer.weight.is_floating_point()
    model = torch.nn.Sequential(layer)
    model = get_peft_model(model, MolaConfig(num_experts=1, target_modules=["0"]))
    with pytest.raises(MolaError, match="Linear4bit"):
        model.merge_and_unload()


def test_switched_off_it_is_the_packed_base(blocks_dir):
    base = quantised(blocks_dir, "int8")
    with torch.no_grad():
        expected = base(input_ids=IDS).logits.clone()
        model = adapted(base).eval()
        assert not torch.equal(model(input_ids=IDS).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, expected)


def test_generating_equals_calling_the_model_token_by_token(blocks_dir):
    model = adapted(quantised(blocks_dir, "nf4")).eval()
    with torch.no_grad():
        generated = model.generate(input_ids=IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
        ids = IDS[:1]
        while ids.shape[1] < generated.shape[1]:
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert generated.tolist() == ids.tolist()
