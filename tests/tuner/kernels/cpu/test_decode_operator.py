"""Compiled code finds a layer by its B: it sees what the layer holds now, and never another layer's experts."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

from mola.tuner.kernels.cpu import decode_operator
from mola.tuner.kernels.cpu.decode_operator import find_owner
from mola.tuner.layer import ExpertSettings, MolaLinear
from tests.versions import needs

pytest.importorskip("numba", reason="needs numba (the extra `cpu`)")


def make_layer(**options):
    torch.manual_seed(0)
    defaults = {"r": 4, "num_experts": 4, "top_k": 2, "lora_alpha": 6.0, "init_lora_weights": False}
    base = nn.Linear(16, 24).requires_grad_(False)
    return MolaLinear(base, "default", ExpertSettings(**{**defaults, **options})).eval()


def compiled(layer):
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)


@pytest.fixture
def x():
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def test_each_layer_and_adapter_is_found():
    layers = [make_layer() for _ in range(3)]
    layers[1].update_layer("other", layers[1].settings["default"])
    for layer in [*layers, copy.deepcopy(layers[1])]:
        for name, experts_B in layer.mola_B.items():
            for _ in range(2):  # looked for, then known
                owner = find_owner(experts_B)
                assert (owner.layer(), owner.adapter_name) == (layer, name)


def test_no_layer_is_kept_alive():
    layer = make_layer()
    key, parameter = id(layer.mola_B["default"]), weakref.ref(layer.mola_A["default"])
    find_owner(layer.mola_B["default"])
    assert key in decode_operator._owners
    del layer
    gc.collect()
    assert parameter() is None
    assert key not in decode_operator._owners


def test_a_layer_that_was_found_can_be_pickled_and_copied():
    layer = make_layer()
    find_owner(layer.mola_B["default"])
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert find_owner(other.mola_B["default"]).layer() is other
    assert find_owner(layer.mola_B["default"]).layer() is layer


def test_a_b_that_is_replaced_is_no_longer_the_layers():
    layer = make_layer()
    old = layer.mola_B["default"]
    find_owner(old)
    layer.mola_B["default"] = nn.Parameter(old.detach().clone())
    with pytest.raises(RuntimeError, match="belongs to no layer"):
        find_owner(old)
    assert find_owner(layer.mola_B["default"]).layer() is layer


def test_an_id_that_belongs_to_another_tensor_now():
    layers = make_layer(), make_layer()
    owner = find_owner(layers[0].mola_B["default"])
    experts_B = layers[1].mola_B["default"]
    decode_operator._owners[id(experts_B)] = owner
    assert find_owner(experts_B).layer() is layers[1]


def test_many_threads_look_while_layers_come_and_go():
    layers, failures = [make_layer() for _ in range(4)], []
    start = threading.Barrier(4)

    def work(layer):
        start.wait()
        try:
            for _ in range(200):
                assert find_owner(layer.mola_B["default"]).layer() is layer
                other = copy.deepcopy(layer)
                assert find_owner(other.mola_B["default"]).layer() is other
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_b_that_is_nobodys():
    with pytest.raises(RuntimeError, match=r"of shape \(4, 4, 24\) that belongs to no layer"):
        find_owner(torch.zeros(4, 4, 24))


def test_layers_that_share_a_b():
    one, other = make_layer(), make_layer()
    other.mola_B["default"] = one.mola_B["default"]
    with pytest.raises(RuntimeError, match="is shared by layers that differ in A, router, scaling or top_k"):
        find_owner(one.mola_B["default"])
    other.mola_A["default"], other.mola_router["default"] = one.mola_A["default"], one.mola_router["default"]
    x = torch.ones(3, 16)
    with torch.no_grad():
        output = torch.zeros(3, 24)
        torch.ops.mola.decode(output, x, one.mola_B["default"])
        torch.testing.assert_close(output, one.add_expert_output("default", x, torch.zeros(3, 24)))
    assert find_owner(one.mola_B["default"]).layer() in (one, other)
    other.scaling["default"] *= 2
    decode_operator._owners.clear()
    with pytest.raises(RuntimeError, match="shared by layers"):
        find_owner(one.mola_B["default"])


@torch.no_grad()
def change_numbers(layer):
    for part in (layer.mola_A, layer.mola_B, layer.mola_router):
        part["default"].add_(0.5)


def replace_parameters(layer):
    for part in (layer.mola_A, layer.mola_router):
        part["default"] = nn.Parameter(part["default"].detach() + 0.5)


def replace_b(layer):
    layer.mola_B["default"] = nn.Parameter(layer.mola_B["default"].detach() + 0.5)


def move_numbers(layer):
    for part in (layer.mola_A, layer.mola_B, layer.mola_router):
        part["default"].data = part["default"].data + 0.5


def change_scaling(layer):
    layer.scaling["default"] *= 3


def change_choice(layer):
    layer.top_k["default"] = 1


@torch.no_grad()
def test_compiled_code_sees_what_the_layer_holds_now(x):
    layer = make_layer()
    function = compiled(layer)
    before = function(x)
    torch.testing.assert_close(before, layer(x))
    for change in (change_numbers, replace_parameters, replace_b, move_numbers, change_scaling, change_choice):
        change(layer)
        after = function(x)
        torch.testing.assert_close(after, layer(x))
        assert not torch.equal(after, before), change
        before = after


@torch.no_grad()
def test_compiled_code_follows_a_change_of_dtype(x):
    layer = make_layer()
    function = compiled(layer)
    function(x)
    for part in (layer.mola_A, layer.mola_B):
        part.to(torch.bfloat16)
    torch.testing.assert_close(function(x), layer(x), atol=5e-2, rtol=5e-2)
    layer.double()
    torch.testing.assert_close(function(x.double()), layer(x.double()))


@pytest.mark.slow
@torch.no_grad()
def test_dropout_that_is_switched_on_later(x):
    layer = make_layer(lora_dropout=0.5)
    function = compiled(layer)
    assert torch.equal(function(x), function(x))
    layer.mola_dropout.train()
    assert not torch.equal(function(x), function(x))
    mean = torch.stack([function(x) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, layer.eval()(x), atol=0.3, rtol=0.1)


@needs("torch", "2.13", "its `is_exporting` is true under `torch.compile` too: plain operators run")
@torch.no_grad()
def test_other_parameters_in_place_of_a_layers_own(x):
    layer = make_layer()
    others = {name: value.detach() + 0.5 for name, value in layer.named_parameters()}
    expected = torch.func.functional_call(layer, others, (x,))
    assert not torch.allclose(expected, layer(x))
    function = compiled(layer)
    function(x)
    # Around compiled code these are the layer's own for as long as the call takes.
    torch.testing.assert_close(torch.func.functional_call(function, wrapped(others), (x,)), expected)
    torch._dynamo.reset()
    inside = torch.compile(lambda p, x: torch.func.functional_call(layer, p, (x,)), backend="aot_eager")
    with pytest.raises(RuntimeError, match="put `torch.func.functional_call` around the compiled model"):
        inside(others, x)


def wrapped(parameters):
    return {f"_orig_mod.{name}": value for name, value in parameters.items()}
