"""The fused computation of a mixture: its values and gradients against the plain formula, and what it costs."""

import pytest
import torch
import torch.nn.functional as F
from mola.tuner.dropout import keep_mask, keep_probability
from mola.tuner.mixture import FrozenLinear, MixtureSettings, add_mixture
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks

from mola import MolaError

from .counting import CountOperators
from .models import clone, random_config, tiny_llama, token_batch

TOLERANCE = {
    torch.float64: {"atol": 1e-12, "rtol": 1e-10},
    torch.float32: {"atol": 2e-5, "rtol": 1e-4},
    # Products of bfloat16 numbers are rounded to 8 bits, in another order here and there.
    torch.bfloat16: {"atol": 6e-2, "rtol": 3e-2},
}


def plain(base, x, experts_A, experts_B, router, kept, settings):
    """The formula as it is written: one expert after the other, in float64 whatever comes in."""
    x, experts_A, experts_B, router = (t.double() for t in (x, experts_A, experts_B, router))
    if isinstance(base, FrozenLinear):
        y = F.linear(x, base.weight.double(), None if base.bias is None else base.bias.double())
    else:
        y = base.double()
    logits = x @ router.t()
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(settings.top_k).indices, 1.0)
    gates = logits.softmax(-1) * chosen
    gates = gates / gates.sum(-1, keepdim=True)
    dropped = x if kept is None else x * kept
    for e in range(experts_A.shape[0]):
        update = dropped @ experts_A[e].t() @ experts_B[e]
        y = y + settings.scaling * gates[..., e : e + 1] * update
    return y, logits.flatten(0, -2).t()


def make(
    shape, num_experts, dtype, *, fused, bias=False, dropout=False, top_k=2, router_dtype=torch.float32, r=3, out=7
):
    generator = torch.Generator().manual_seed(0)

    def draw(*size, dtype=dtype):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) / size[-1] ** 0.5).to(dtype)

    in_features, out_features = shape[-1], out
    base = FrozenLinear(draw(out_features, in_features), draw(out_features) if bias else None)
    x = draw(*shape)
    leaves = [
        x,
        draw(num_experts, r, in_features),
        draw(num_experts, r, out_features),
        draw(num_experts, in_features, dtype=torch.promote_types(router_dtype, dtype)),
    ]
    if not fused:
        base = F.linear(x, *base)
        leaves.append(base)
    for leaf in leaves:
        leaf.requires_grad_()
    kept = torch.rand(shape, generator=generator) > 0.3 if dropout else None
    return base, leaves, kept, MixtureSettings(top_k, 1.7, dtype)


def run(function, base, leaves, kept, settings):
    """Output, logits and gradients; both the output and the logits are used."""
    y, logits, *_ = function(base, *leaves[:4], kept, settings)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    loss = (y.double() * weights).sum() + (logits.double() ** 2).sum() * 0.1
    return y, logits, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("fused", [True, False], ids=["with_base", "base_apart"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("shape", "num_experts", "top_k"), [((2, 5, 8), 4, 2), ((6, 11), 3, 3), ((1, 1, 8), 8, 1), ((3, 4, 13), 5, 2)]
)
def test_values_and_gradients_follow_the_formula(shape, num_experts, top_k, dtype, fused, dropout):
    case = make(shape, num_experts, dtype, fused=fused, bias=True, dropout=dropout, top_k=top_k)
    check_against_the_formula(case, TOLERANCE[dtype])


def check_gradients_of_the_logits(case):
    base, leaves, kept, settings = case
    found = []
    for function in (add_mixture, plain):
        _, logits, *_ = function(base, *leaves[:4], kept, settings)
        found.append(torch.autograd.grad((logits**2).sum(), [leaves[0], leaves[3]]))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def check_against_the_formula(case, tolerance):
    found, expected = run(add_mixture, *case), run(plain, *case)
    for name, one, two in zip(("output", "logits"), found, expected, strict=False):
        torch.testing.assert_close(one.double(), two, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
    names = ("x", "A", "B", "router", "base output")
    for name, one, two in zip(names, found[2], expected[2], strict=False):
        torch.testing.assert_close(
            one.double(), two.double(), **tolerance, msg=lambda m, name=name: f"gradient of {name}: {m}"
        )


@pytest.mark.parametrize("fused", [True, False])
def test_without_gradients_the_values_are_the_same(fused):
    case = make((5, 9, 8), 4, torch.float32, fused=fused)
    with torch.no_grad():
        quiet = add_mixture(case[0], *case[1][:4], None, case[3])
    loud = add_mixture(case[0], *case[1][:4], None, case[3])
    assert torch.equal(quiet.output, loud.output)
    assert torch.equal(quiet.logits, loud.logits)


def test_base_output_of_another_format_is_not_rounded():
    """float32 experts on a bfloat16 base without autocast: the sum is made in float32."""
    case = make((2, 3, 8), 4, torch.float32, fused=False)
    result = case[0].detach().bfloat16()
    output = add_mixture(result, *case[1][:4], None, case[3]).output
    assert output.dtype == torch.float32
    torch.testing.assert_close(
        output.double(), plain(result, *case[1][:4], None, case[3])[0], **TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("fused", [True, False], ids=["with_base", "base_apart"])
@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8), (3, 0, 8)])
@pytest.mark.parametrize("grad", [True, False])
def test_empty_input(shape, fused, grad):
    case = make(shape, 4, torch.float32, fused=fused)
    with torch.set_grad_enabled(grad):
        y, logits, _ = add_mixture(case[0], *case[1][:4], None, case[3])
    assert y.shape == (*shape[:-1], 7)
    assert logits.shape == (4, 0)
    if grad:
        y.sum().backward()
        assert case[1][0].grad.shape == shape


@pytest.mark.parametrize("dropout", [False, True])
def test_input_in_another_order_of_dimensions(dropout):
    base, leaves, kept, settings = make((4, 6, 8), 4, torch.float32, fused=True, dropout=dropout)
    x = leaves[0].detach().transpose(0, 1)
    kept = None if kept is None else kept.transpose(0, 1)
    found = add_mixture(base, x, *leaves[1:4], kept, settings).output
    expected = add_mixture(base, x.contiguous(), *leaves[1:4], kept, settings).output
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("fused", [True, False], ids=["with_base", "base_apart"])
def test_output_may_be_changed_in_place(fused):
    case = make((2, 3, 8), 4, torch.float32, fused=fused)
    expected = torch.autograd.grad((add_mixture(case[0], *case[1][:4], None, case[3]).output * 2).sum(), case[1][0])
    y = add_mixture(case[0], *case[1][:4], None, case[3]).output
    y.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), case[1][0]), expected)


@pytest.mark.parametrize("tokens", [3, 63, 64, 500])
def test_router_computes_in_float32_for_any_number_of_tokens(tokens):
    """Also where the whole model was cast to bfloat16, the router with it."""
    base, leaves, _, settings = make((tokens, 32), 8, torch.bfloat16, fused=True)
    router = leaves[3].detach().bfloat16()
    logits = add_mixture(base, *leaves[:3], router, None, settings).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.t(), leaves[0].float() @ router.float().t(), atol=1e-5, rtol=1e-5)


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_the_base_layer_are_called(hook):
    model = get_peft_model(tiny_llama(), random_config())
    layer = next(module for module in model.modules() if hasattr(module, "mola_A"))
    called = []
    getattr(layer.base_layer, f"register_{hook}")(lambda *arguments: called.append(hook))
    x = torch.randn(1, 2, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert called == [hook]


def test_hooks_for_all_modules_are_called():
    model = get_peft_model(tiny_llama(), random_config())
    layer = next(module for module in model.modules() if hasattr(module, "mola_A"))
    called = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    layer(torch.randn(1, 2, layer.in_features))
    handle.remove()
    assert layer.base_layer in called


@pytest.mark.parametrize("unused", range(4), ids=["x", "A", "B", "router"])
def test_gradients_nobody_asks_for_are_not_made(unused):
    case = make((2, 3, 8), 4, torch.float32, fused=True)
    expected = run(add_mixture, *case)[2]
    leaves = [leaf.detach().requires_grad_(index != unused) for index, leaf in enumerate(case[1])]
    y, logits, _ = add_mixture(case[0], *leaves, None, case[3])
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    ((y.double() * weights).sum() + (logits.double() ** 2).sum() * 0.1).backward()
    assert leaves[unused].grad is None
    for index in set(range(4)) - {unused}:
        torch.testing.assert_close(leaves[index].grad, expected[index])


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_the_logits_alone(fused):
    """As of a balance loss whose output nobody uses."""
    check_gradients_of_the_logits(make((2, 5, 8), 4, torch.float64, fused=fused))


def test_second_derivatives_are_refused():
    base, leaves, kept, settings = make((2, 3, 8), 4, torch.float64, fused=True)
    y = add_mixture(base, *leaves, kept, settings).output
    with pytest.raises(MolaError, match="create_graph"):
        torch.autograd.grad(y.sum(), leaves[0], create_graph=True)


# ---------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 1 / 3])
@pytest.mark.parametrize("shape", [(1000, 1001), (3,), (7, 5)])
def test_masks_keep_the_share_they_say(p, shape):
    torch.manual_seed(0)
    x = torch.empty(shape)
    kept = keep_mask(x, p)
    assert kept.shape == x.shape
    assert abs(keep_probability(x, p) - (1 - p)) < 1e-5
    n = x.numel()
    if n > 10**6:  # five standard errors
        assert abs(kept.double().mean().item() - keep_probability(x, p)) < 5 * (p * (1 - p) / n) ** 0.5
        rows = kept.double().mean(1)  # every part of a draw decides alike
        assert rows.std().item() < 1.3 * (p * (1 - p) / shape[1]) ** 0.5
        for lane in range(4):
            share = kept.flatten()[lane::4].double().mean().item()
            assert abs(share - keep_probability(x, p)) < 5 * (4 * p * (1 - p) / n) ** 0.5


def test_masks_follow_the_seed():
    x = torch.empty(50, 50)
    torch.manual_seed(1)
    first, second = keep_mask(x, 0.5), keep_mask(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(first, keep_mask(x, 0.5))
    assert not torch.equal(first, second)


def test_dropout_leaves_the_mean_as_it_is():
    """Averaged over masks the update is the one without dropout."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), random_config(lora_dropout=0.3))
    layer = next(module for module in model.modules() if hasattr(module, "mola_A"))
    x = torch.randn(1, 1, layer.in_features)
    expected = layer.eval()(x)
    layer.train()
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, expected, atol=0.05 * expected.abs().max().item(), rtol=0)


# ---------------------------------------------------------------------- what it costs


def kept_bytes(model, batch):
    """Bytes that a forward pass keeps for the backward pass, each storage once, weights left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(size for size, _ in seen.values())


def adapted_bytes(config, batch, base):
    """Bytes kept per token and adapted linear on top of the frozen base."""
    floor = clone(base)
    floor.requires_grad_(False)
    floor.enable_input_require_grads()
    model = get_peft_model(clone(base), config).train()
    model.enable_input_require_grads()
    difference = kept_bytes(model, batch) - kept_bytes(floor.train(), batch)
    return difference / (batch["input_ids"].numel() * 28)


@pytest.mark.parametrize(("dropout", "limit"), [(0.0, 1.2), (0.05, 0.5)])
def test_memory_beside_lora(dropout, limit):
    """Without dropout a fifth more than LoRA at most, with dropout half of it."""
    base = tiny_llama(hidden_size=576, intermediate_size=1536)  # the share of what has rank size depends on them
    batch = {**token_batch(rows=4, length=64)}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=8, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    mixture = random_config(num_experts="2468", r=8, top_k=2, lora_dropout=dropout)
    assert adapted_bytes(mixture, batch, base) <= limit * adapted_bytes(lora, batch, base)


def test_few_operators_and_no_wait():
    base, leaves, _, settings = make((4, 16, 8), 6, torch.float32, fused=True)
    with CountOperators() as forward:
        y = add_mixture(base, *leaves, None, settings).output
    with CountOperators() as backward:
        y.sum().backward()
    assert forward.syncs == backward.syncs == []
    assert forward.operators <= 45
    assert backward.operators <= 60
