"""Which backend computes a mixture: the order, what is forced, and what is left without the extra `cpu`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mola
from mola import MolaError, MolaLinear
from mola.tuner.kernels import dispatch, native
from mola.tuner.kernels.autograd import compute
from mola.tuner.kernels.dispatch import BACKENDS, cast_inputs, explain, mixture, select
from mola.tuner.layer import ExpertSettings

from .inputs import make_inputs
from .native import HAS_NUMBA, has_vectors

ORDER = ["cpu_decode", "lora", "gathered", "decode", "triton", "cpu_train", "grouped", "dense", "reference"]
TRAIN = "cpu_train" if has_vectors(torch.float32) else "dense"


def make(shape=(40, 32), num_experts=4, dtype=torch.float32, **options):
    return make_inputs(shape, num_experts, dtype, **{"r": 8, "out": 64, **options})


def changed(inputs, **settings):
    return inputs._replace(settings=inputs.settings._replace(**settings))


def quiet(inputs):
    return changed(inputs, needs_router_output=False)


# ---------------------------------------------------------------------- by itself


def test_order():
    assert [backend.name for backend in BACKENDS] == ORDER


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (make(), TRAIN),
        (make((3, 32)), TRAIN),
        (make((40, 33)), "dense"),
        (make(num_experts=32), TRAIN if TRAIN == "cpu_train" else "grouped"),
        (make((40, 36), num_experts=32, out=60), "grouped"),
        (make(dtype=torch.float64), "dense"),
        (changed(make(), jitter=0.1), "reference"),
        (make()._replace(router=None), "lora"),
    ],
    ids=[
        "usual",
        "few tokens",
        "odd size",
        "many experts",
        "many experts, odd size",
        "float64",
        "jitter",
        "one expert",
    ],
)
def test_with_gradients(inputs, expected):
    assert select(inputs).name == expected


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (quiet(make((3, 32))), "cpu_decode" if HAS_NUMBA else "decode"),
        (make((3, 32)), "decode"),
        (quiet(make((3, 32), dtype=torch.float64)), "decode"),
        (quiet(make((33, 32))), TRAIN),
        (quiet(make((3, 32), dropout=True)), TRAIN),
        (changed(make((3, 32)), jitter=0.1), "reference"),
        (make((3, 32))._replace(router=None), "lora"),
        (quiet(make((0, 32))), "dense"),
    ],
    ids=["few tokens", "logits wanted", "float64", "more tokens", "dropout", "jitter", "one expert", "no tokens"],
)
@torch.no_grad()
def test_without_gradients(inputs, expected):
    assert select(inputs).name == expected


def test_a_reason_for_each_that_is_not_chosen():
    inputs = make((40, 36), num_experts=4, out=60)
    reasons = dict(explain(inputs))
    assert list(reasons) == ORDER
    assert reasons == {
        "cpu_decode": "only without gradients and without autocast",
        "lora": "there are several experts",
        "gathered": "gradients are recorded",
        "decode": "only without gradients and without autocast",
        "triton": "needs a GPU and Triton",
        "cpu_train": "needs features in multiples of 32, and at least one token",
        "grouped": "slower than dense for so few experts or tokens",
        "dense": None,
        "reference": None,
    }


def test_inputs_that_are_cast():
    """To the dtype of the products, except by autocast itself; the base product is made in its own dtype."""
    inputs = make(x_dtype=torch.bfloat16, params_dtype=torch.float32)
    cast = cast_inputs(inputs)
    assert cast.weight is cast.bias is None
    assert torch.equal(cast.base_output, F.linear(inputs.x, inputs.weight))
    assert torch.equal(cast.x, inputs.x.float())
    assert cast_inputs(make()).weight is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        apart = changed(make(fused=False), dtype=torch.bfloat16)
        assert cast_inputs(apart).x is apart.x
    output = mixture(inputs).output
    torch.testing.assert_close(output, mixture(cast).output)
    assert output.dtype == torch.float32


# ---------------------------------------------------------------------- forced


@pytest.mark.parametrize("name", ["dense", "grouped", "reference"])
def test_a_forced_backend_is_taken_where_it_is_slower_too(name, force):
    force(name)
    assert select(make()).name == name
    assert select(make((3, 32))).name == name


def test_a_forced_backend_computes_a_layer(force, monkeypatch):
    settings = ExpertSettings(8, 4, 2, 8.0, init_lora_weights=False)
    layer = MolaLinear(nn.Linear(32, 64).requires_grad_(False), "default", settings)
    x, used, outputs, names = torch.randn(3, 32), [], [], ["decode", "grouped", "dense", "reference"]
    monkeypatch.setattr(dispatch, "compute", lambda *arguments: used.append(arguments[0].name) or compute(*arguments))
    with torch.no_grad():
        for name in ("", *names):
            force(name)
            outputs.append(layer.eval()(x))
    assert used[-len(names) :] == names  # by itself a layer may take a short way
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])


def test_layers_with_one_expert_are_lora_whatever_is_forced(force):
    force("dense")
    assert select(make()._replace(router=None)).name == "lora"


def test_a_forced_backend_that_cannot_compute_is_an_error(force):
    force("cpu_train" if HAS_NUMBA else "decode")
    with pytest.raises(MolaError) as error:
        select(make((5, 9), out=7))
    name, reason = (
        ("cpu_train", "needs features in multiples of 32, and at least one token")
        if HAS_NUMBA
        else ("decode", "only without gradients and without autocast")
    )
    assert str(error.value) == (
        f"MOLA_KERNEL={name} cannot compute input (5, 9) with experts (4, 8, 9): {reason}. "
        "Unset MOLA_KERNEL to let mola choose."
    )


def test_a_name_that_no_backend_has_is_an_error(force):
    force("cuda")
    with pytest.raises(MolaError) as error:
        select(make())
    assert str(error.value) == (f"The environment variable MOLA_KERNEL must be one of {', '.join(ORDER)}, got 'cuda'.")


# ---------------------------------------------------------------------- without the extra `cpu`


def test_without_numba_backends_in_torch_are_chosen(monkeypatch):
    monkeypatch.setattr(native, "load", lambda name: None)
    assert select(make()).name == "dense"
    with torch.no_grad():
        assert select(quiet(make((3, 32)))).name == "decode"
        reasons = dict(explain(quiet(make((3, 32)))))
    assert reasons["cpu_decode"].endswith("or no numba here")
    assert "or no numba" in reasons["cpu_train"]
    output = mixture(make()).output
    monkeypatch.undo()
    torch.testing.assert_close(output, mixture(make()).output)


SCRIPT = """
import logging
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
import mola

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
config = mola.MolaConfig(num_experts="2-4", lora_dropout=0.1, init_lora_weights=False, task_type="CAUSAL_LM")
model = get_peft_model(base, config)
ids = torch.arange(10).view(1, 10)
loss = model.train()(input_ids=ids, labels=ids).loss
loss.backward()
assert all(each.grad is not None for each in model.parameters() if each.requires_grad)
tokens = model.eval().generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
print(tokens.tolist())
with torch.no_grad():
    layer = next(module for module in model.modules() if isinstance(module, mola.MolaLinear))
    x = torch.randn(3, layer.in_features)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, layer(x))
"""


def run(*paths):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_package_trains_and_generates_without_numba(tmp_path):
    source = Path(mola.__file__).parents[1]
    (tmp_path / "numba.py").write_text("raise ImportError", encoding="utf-8")
    assert run(tmp_path, source) == run(source)


@pytest.mark.slow
def test_nothing_of_numba_is_imported_before_it_is_needed():
    script = "import sys, mola.tuner.layer; print('numba' in sys.modules, len(mola.tuner.kernels.dispatch.BACKENDS))"
    environment = {**os.environ, "PYTHONPATH": str(Path(mola.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", str(len(dispatch.BACKENDS))], done.stderr
