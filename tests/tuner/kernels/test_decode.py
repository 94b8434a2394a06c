"""Few tokens without gradients: the same values as with them, whatever happens from one call to the next."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from mola import MolaLinear
from mola.tuner.kernels.api import NO_ROUTER
from mola.tuner.kernels.cpu import decode as cpu_decode
from mola.tuner.kernels.decode import MANY_TOKENS, MAX_TOKENS, Decode, is_decode
from mola.tuner.layer import ExpertSettings
from tests.grids import slow

from ..models import clone, random_config, tiny_llama, token_batch
from .inputs import make_inputs
from .native import needs_numba

IN, OUT = 16, 24
IDS = token_batch(2, 5)["input_ids"]


@pytest.fixture(autouse=True, params=[pytest.param("native", marks=needs_numba), "torch"])
def way(request, monkeypatch):
    """With the native function, and as without numba."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_decode, "_kernel", lambda *dtypes: None)


def make_layer(dtype=torch.float32, *, bias=True, seed=0, **options):
    torch.manual_seed(seed)
    settings = {"r": 3, "num_experts": 4, "top_k": 2, "lora_alpha": 6.0, "init_lora_weights": False}
    base = nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    return MolaLinear(base, "default", ExpertSettings(**{**settings, **options})).eval()


def draw(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
def few(module, x):
    return module(x)


@torch.enable_grad()
def usual(module, x):
    """With gradients the few tokens are nothing special."""
    return module(x).detach()


def assert_usual(x, *modules):
    outputs = [few(module, x) for module in modules]
    torch.testing.assert_close(outputs, [usual(module, x) for module in modules])


@pytest.fixture
def pair():
    """Two layers that have read the same input."""
    q, k = make_layer(), make_layer(seed=1)
    for seed in range(3):
        assert_usual(draw(2, IN, seed=seed), q, k)
    return q, k


class Logits(nn.Module):
    """From token ids to logits."""

    def __init__(self, model):
        super().__init__()
        self.peft = model

    def forward(self, ids):
        return self.peft(input_ids=ids).logits


@pytest.fixture(scope="module")
def fresh():
    """A model that nobody has called; for the tests to copy."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(2), random_config())
    model.add_adapter("other", random_config(num_experts=3, r=2))
    model.add_adapter("single", random_config(num_experts=1, r=2))
    return Logits(model).eval()


@pytest.fixture
def model(fresh):
    """A model that has been called before."""
    model = clone(fresh)
    few(model, IDS), few(model, IDS)
    return model


# ------------------------------------------------------------------ values


@pytest.mark.parametrize(("bias", "top_k"), [(True, 2), *slow((False, 1), (False, 4))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_are_no_less_exact(dtype, bias, top_k):
    layer, x = make_layer(dtype, bias=bias, top_k=top_k), draw(MAX_TOKENS, IN, dtype=dtype)
    exact = usual(copy.deepcopy(layer).double(), x.double())
    output = few(layer, x)
    assert output.dtype == dtype
    # Both round to the narrow dtype; by chance one of them may come out a little worse.
    assert (output - exact).norm() <= 1.5 * (usual(layer, x) - exact).norm()


@pytest.mark.parametrize(
    "x",
    [
        *(draw(*s, IN) for s in [(), (2, 3), (0,), (2, 0)]),
        draw(IN, 3).t(),
        draw(3, 2 * IN)[:, ::2],
        draw(IN).expand(4, IN),
    ],
    ids=["vector", "batch", "no rows", "no tokens", "transposed", "strided", "expanded"],
)
def test_shapes(x):
    layer = make_layer()
    for _ in range(2):
        assert few(layer, x).shape == (*x.shape[:-1], OUT)
        assert_usual(x, layer)


def test_outputs_stay_while_numbers_of_tokens_take_turns(pair):
    inputs = [draw(n, IN, seed=n) for n in (1, 4, 2, MAX_TOKENS, MAX_TOKENS + 1, 1, 1)]
    outputs = [few(layer, x) for x in inputs for layer in pair]
    torch.testing.assert_close(outputs, [usual(layer, x) for x in inputs for layer in pair])


# ------------------------------------------------------------------ whole models


@pytest.mark.parametrize("rows", [1, 4])
def test_generate(fresh, rows):
    model, ids = clone(fresh), token_batch(rows, 6)["input_ids"]
    generated = model.peft.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for _ in range(8):
        ids = torch.cat([ids, usual(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


# ------------------------------------------------------------------ what changes between two calls


@torch.no_grad()
def change(layer, tensor, way):
    of_base = tensor in ("weight", "bias")
    owner, name = (layer.base_layer._parameters, tensor) if of_base else (getattr(layer, f"mola_{tensor}"), "default")
    new = -2.0 * owner[name].detach()
    if way == "in place":
        owner[name].copy_(new)
    elif way == "in place, data":
        owner[name].data.copy_(new)
    elif way == "new data":
        owner[name].data = new
    else:
        owner[name] = nn.Parameter(new, requires_grad=False)


@pytest.mark.parametrize("way", ["in place", "in place, data", "new data", "new parameter"])
def test_changed_weights_are_seen(pair, way):
    (q, k), x = pair, draw(2, IN)
    for tensor in ("A", "B", "router", "weight", "bias"):
        before = few(q, x), few(k, x)
        change(k, tensor, way)
        after = few(q, x), few(k, x)
        torch.testing.assert_close(after, (before[0], usual(k, x)))
        assert not torch.allclose(after[1], before[1]), tensor


@pytest.mark.filterwarnings("ignore:The routers of adapter 'default' are in torch.bfloat16")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_another_dtype_and_back(model, dtype):
    assert few(model.to(dtype), IDS).dtype == dtype
    if dtype == torch.float64:  # rounded to bfloat16, experts may be chosen differently
        assert_usual(IDS, model)
    assert_usual(IDS, model.float())


def test_hooks_on_a_base_layer_are_called(pair):
    (q, k), x, seen = pair, draw(2, IN), []
    handle = k.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    for count in (1, 2):
        few(q, x), few(k, x)
        assert len(seen) == count
    handle.remove()
    assert_usual(x, q, k)


# ------------------------------------------------------------------ adapters


def test_switching_adapters(model):
    previous = few(model, IDS)
    for names in ("other", ["default", "other"], "single", "default"):
        model.peft.base_model.set_adapter(names)
        for _ in range(3):
            assert_usual(IDS, model)
        assert not torch.allclose(few(model, IDS), previous)
        previous = few(model, IDS)


def test_disabled_adapters(model, pair):
    before = few(model, IDS)
    with model.peft.disable_adapter():
        assert_usual(IDS, model)
        assert not torch.allclose(few(model, IDS), before)
    assert torch.equal(few(model, IDS), before)
    (q, k), x = pair, draw(2, IN)
    few(q, x)
    k.enable_adapters(False)
    assert torch.equal(few(k, x), k.base_layer(x))


def test_a_deleted_adapter(model):
    with pytest.warns(UserWarning, match="which is now deleted"):
        model.peft.delete_adapter("default")
    for _ in range(3):
        assert_usual(IDS, model)


def test_a_merged_adapter(model):
    before = few(model, IDS)
    model.peft.set_adapter("single")
    single = few(model, IDS)
    model.peft.merge_adapter()
    torch.testing.assert_close(few(model, IDS), single)
    model.peft.unmerge_adapter()
    model.peft.set_adapter("default")
    torch.testing.assert_close(few(model, IDS), before)


# ------------------------------------------------------------------ where it is used


@pytest.mark.parametrize("other_way", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_other_modes(other_way):
    layer = make_layer()
    x = draw(3, IN)
    with torch.no_grad(), other_way():
        output = layer(x)
    torch.testing.assert_close(output.float(), usual(layer, x), atol=5e-2, rtol=5e-2)
    torch.testing.assert_close(few(layer, x), usual(layer, x))


def test_which_input_is_few():
    assert not is_decode(torch.zeros(1, IN))
    with torch.no_grad():
        assert is_decode(torch.zeros(MAX_TOKENS, IN))
        assert is_decode(torch.zeros(2, MAX_TOKENS // 2, IN))
        assert not is_decode(torch.zeros(MAX_TOKENS + 1, IN))
        assert not is_decode(torch.zeros(0, IN))
        assert not is_decode(torch.zeros(1, IN, device="meta"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not is_decode(torch.zeros(1, IN))


def test_where_it_is_used():
    inputs = make_inputs((3, IN), 4, torch.float32)
    assert Decode().why_unsupported(inputs) == "only without gradients and without autocast"
    with torch.no_grad():
        assert Decode().why_unsupported(inputs) is Decode().why_slower(inputs) is None
        many = make_inputs((MAX_TOKENS + 1, IN), 4, torch.float32)
        assert Decode().why_unsupported(many) is None
        assert Decode().why_slower(many) == MANY_TOKENS
        assert Decode().why_unsupported(inputs._replace(router=None)) == NO_ROUTER
        dropped = inputs._replace(settings=inputs.settings._replace(dropout=0.1))
        assert Decode().why_unsupported(dropped) == "dropout is on"
