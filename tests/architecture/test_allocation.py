"""Notations, their limits, and the costs of the paper's allocations."""

import dataclasses
import json
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mola.architecture.allocation import LinearShape, StackShape, check_top_k, effective_top_k, plan_allocation
from mola.architecture.notation import check_notation, default_num_experts, resolve_per_layer
from mola.errors import MolaError

FIELDS = ("num_experts", "r", "top_k")
QUARTERS = [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8


# --- notations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, [3, 3, 3, 3]),
        ("3", [3, 3, 3, 3]),
        (" 3 ", [3, 3, 3, 3]),
        ("16,", [16, 16, 16, 16]),
        ("2,2,4,4", [2, 2, 4, 4]),
        (" 2, 2 ,4,4 ", [2, 2, 4, 4]),
        ("2,2,4,4,", [2, 2, 4, 4]),
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ((1, 2, 3, 12), [1, 2, 3, 12]),
        ([1.0, 2, 3, 4], [1, 2, 3, 4]),
    ],
)
def test_resolve_notations_of_every_field(value, expected, name):
    result = resolve_per_layer(value, 4, name)
    assert result == expected
    assert all(type(item) is int for item in result)


@pytest.mark.parametrize(
    ("value", "num_layers", "expected"),
    [
        ("2468", 32, QUARTERS),
        ("2468", 30, [2] * 7 + [4] * 7 + [6] * 8 + [8] * 8),
        ("2-4", 5, [2, 2, 4, 4, 4]),
        ("8-16-12", 4, [8, 16, 12, 12]),
        ("123", 4, [1, 2, 3, 3]),
        ("1234", 4, [1, 2, 3, 4]),
        ("inverted_triangle", 32, QUARTERS),
        ("inverted-triangle", 32, QUARTERS),
        ("triangle", 4, [8, 6, 4, 2]),
        ("hourglass", 4, [8, 2, 2, 8]),
        ("rectangle", 6, [5] * 6),
        ("diamond", 8, [2, 2, 8, 8, 8, 8, 2, 2]),
    ],
)
def test_resolve_groups_and_shapes(value, num_layers, expected):
    assert resolve_per_layer(value, num_layers, "num_experts") == expected


@pytest.mark.parametrize("name", ["r", "top_k"])
def test_digits_of_other_fields_are_one_number(name):
    assert resolve_per_layer("16", 3, name) == [16, 16, 16]
    assert resolve_per_layer("64", 1, name) == [64]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("is_object", [False, True])
def test_resolve_reads_json_files(tmp_path, is_object, name):
    path = tmp_path / "allocation.json"
    values = [1, 2, 300]
    path.write_text(json.dumps({"method": "by hand", name: values} if is_object else values))
    assert resolve_per_layer(str(path), 3, name) == [1, 2, 300]


def test_resolve_reads_a_file_without_json_ending(tmp_path):
    path = tmp_path / "allocation"
    path.write_text("[4, 5]")
    assert resolve_per_layer(str(path), 2, "num_experts") == [4, 5]


@given(digits=st.lists(st.integers(1, 9), min_size=2, unique=True), extra=st.integers(0, 100))
def test_groups_keep_order_and_differ_by_one_layer(digits, extra):
    num_layers = len(digits) + extra
    result = resolve_per_layer("-".join(map(str, digits)), num_layers, "num_experts")
    if len(digits) > 2:
        assert result == resolve_per_layer("".join(map(str, digits)), num_layers, "num_experts")
    groups = [(digit, len(list(members))) for digit, members in groupby(result)]
    sizes = [size for _, size in groups]
    assert len(result) == num_layers
    assert [digit for digit, _ in groups] == digits
    assert sizes == sorted(sizes)  # later groups are never smaller
    assert max(sizes) - min(sizes) <= 1


scalars = st.one_of(st.text(max_size=12), st.integers(), st.floats(), st.none(), st.booleans())


@given(
    value=st.one_of(scalars, st.lists(scalars, max_size=4), st.lists(st.integers(1, 9), max_size=4)),
    num_layers=st.integers(1, 8),
    name=st.sampled_from(FIELDS),
)
def test_any_value_is_resolved_or_a_mola_error(value, num_layers, name):
    try:
        result = resolve_per_layer(value, num_layers, name)
    except MolaError:
        return
    assert len(result) == num_layers
    assert min(result) >= 1
    check_notation(value, name)


# --- wrong notations ---------------------------------------------------------------------------


def test_wrong_count_names_both_numbers():
    with pytest.raises(MolaError, match=r"got 33 entries, .* 32 layers\. Pass one integer or 32 integers\."):
        resolve_per_layer("4," * 33, 32, "r")
    with pytest.raises(MolaError, match="got 1 entry, the model has 2 layers"):
        resolve_per_layer([4], 2, "num_experts")


@pytest.mark.parametrize("name", ["num_experts", "r"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "at least 1, got 0"),
        ("-2", "at least 1, got -2"),
        ("2,0,4,4", "entry 1 is 0"),
        ([2, 2.5, 4, 4], "entry 1 is 2.5"),
        ([float("nan"), 2, 4, 4], "entry 0 is nan"),
        ([2, True, 4, 4], "entry 1 is True"),
        ([2, "2", 4, 4], "entry 1 is '2'"),
        ([], "got an empty list"),
        (",", "'' is no integer"),
        ("2,,4", "'' is no integer"),
        ("2,x,4,4", "'x' is no integer"),
        (True, "got True .bool"),
        (2.0, "got 2.0 .float"),
        ("", "got ''"),
        ("2 2 4 4", "got '2 2 4 4'"),
        ("missing/allocation.json", "cannot be read: 'missing/allocation.json'"),
    ],
)
def test_wrong_notation(value, message, name):
    for check in (check_notation, lambda value, name: resolve_per_layer(value, 4, name)):
        with pytest.raises(MolaError, match=message) as caught:
            check(value, name)
        assert f"`{name}`" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("10", "'10,' .with the comma. is 10 experts in every layer"),
        (
            "16",
            "'16,' .with the comma. is 16 experts in every layer; '1-6' is 1 in the lower half .* 6 in the upper",
        ),
        ("2-0", "entry 1 is 0"),
        ("2068", "got '2068'"),
        (2468, "got 2468. If you meant a shape of digits, quote it as a string: '2468'"),
        ("dimond", "got 'dimond'. Known shapes: inverted_triangle .2468., triangle .8642."),
    ],
)
def test_wrong_num_experts(value, message):
    with pytest.raises(MolaError, match=message):
        check_notation(value, "num_experts")


def test_shapes_are_for_num_experts_only():
    with pytest.raises(MolaError, match=r"`top_k` must be an integer, .* got 'diamond'"):
        check_notation("diamond", "top_k")


def test_more_groups_than_layers():
    check_notation("24682", "num_experts")
    with pytest.raises(MolaError, match=r"5 groups \('2-4-6-8-2'\), the model has 4 layers"):
        resolve_per_layer("24682", 4, "num_experts")


def test_the_default_of_a_deep_model_is_the_digits():
    assert default_num_experts(30) == resolve_per_layer("2468", 30, "num_experts")


def test_many_experts_are_possible_when_spelt_out():
    assert resolve_per_layer("300,", 2, "num_experts") == [300, 300]
    assert resolve_per_layer(256, 1, "num_experts") == [256]
    assert resolve_per_layer(512, 1, "r") == [512]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[2, 2", "not valid JSON"),
        ("", "not valid JSON"),
        ("4", "must hold a list of integers"),
        ('"2468"', "must hold a list of integers"),
        ('{"experts": [2, 2]}', r"must have the key 'num_experts': it has \['experts'\]"),
        ('{"num_experts": "2468"}', "must hold a list of integers.*got '2468'"),
        ("[]", "got an empty list in"),
        ("[2, 2.5]", "entry 1 in .* is 2.5"),
        ("[2, null]", "entry 1 in .* is None"),
    ],
)
def test_wrong_json_file(tmp_path, content, message):
    path = tmp_path / "allocation.json"
    path.write_text(content)
    with pytest.raises(MolaError, match=message):
        check_notation(str(path), "num_experts")


def test_json_file_that_is_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MolaError, match="not valid JSON"):
        check_notation(str(tmp_path / "a.json"), "num_experts")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(MolaError, match="cannot be read"):
        check_notation(str(tmp_path / "folder.json"), "num_experts")


def test_model_without_layers():
    with pytest.raises(MolaError, match="this one has 0"):
        resolve_per_layer(2, 0, "num_experts")


# --- top_k -------------------------------------------------------------------------------------


def test_effective_top_k_is_one_where_there_is_one_expert():
    assert effective_top_k([1, 2, 1, 4], [2, 2, 2, 2]) == [1, 2, 1, 2]
    assert effective_top_k([3, 2], [1, 2]) == [1, 2]
    assert effective_top_k([1], [8]) == [1]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "message"),
    [
        ([4, 2, 1], [3, 3, 3], "layer 1 has top_k 3 and num_experts 2. Lower `top_k` to 2"),
        ([1, 4], [2, 3], "layer 0 has top_k 2 and num_experts 1"),
        ([4, 4], [4, 0], "layer 1 has top_k 0 and num_experts 4"),
    ],
)
def test_top_k_outside_the_experts(num_experts, top_k, message):
    for function in (check_top_k, effective_top_k):
        with pytest.raises(MolaError, match=message):
            function(num_experts, top_k)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8))
def test_effective_top_k_never_exceeds_the_experts(pairs):
    num_experts, top_k = (list(column) for column in zip(*pairs, strict=True))
    try:
        effective = effective_top_k(num_experts, top_k)
    except MolaError:
        assert any(chosen > experts for experts, chosen in pairs)
    else:
        assert effective == [min(chosen, experts) for experts, chosen in pairs]


# --- costs -------------------------------------------------------------------------------------


def llama_7b_linears():
    hidden, intermediate = 4096, 11008
    sizes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    sizes |= dict.fromkeys(("gate_proj", "up_proj"), (hidden, intermediate))
    sizes["down_proj"] = (intermediate, hidden)
    return [
        LinearShape(f"model.layers.{layer}.{name}", layer, *size) for layer in range(32) for name, size in sizes.items()
    ]


def plan_7b(num_experts, top_k=2, r=8):
    return plan_allocation(
        llama_7b_linears(),
        resolve_per_layer(num_experts, 32, "num_experts"),
        resolve_per_layer(top_k, 32, "top_k"),
        resolve_per_layer(r, 32, "r"),
    )


@pytest.mark.parametrize(
    ("num_experts", "r", "trainable"),
    [
        ("2468", 8, 105_635_840),
        ("5555", 8, 105_635_840),
        ("8888", 8, 169_017_344),
        ("4444", 8, 84_508_672),
        (1, 64, 159_907_840),
    ],
)
def test_trainable_parameters_of_the_papers_allocations(num_experts, r, trainable):
    assert plan_7b(num_experts, r=r).trainable_parameters == trainable


def test_router_parameters_per_expert_and_layer():
    plan = plan_7b("2468")
    assert [layer.router_parameters // layer.num_experts for layer in plan.layers] == [35_584] * 32
    assert plan.router_parameters == 160 * 35_584
    assert plan_7b(1).router_parameters == 0


def test_costs_of_one_layer_by_hand():
    linears = [LinearShape("layers.0.a", 0, 3, 5), LinearShape("layers.0.b", 0, 7, 2)]
    layer = plan_allocation(linears, [4], [2], [6], bytes_per_parameter=2).layers[0]
    assert layer.expert_parameters == 4 * 6 * (3 + 5) + 4 * 6 * (7 + 2)
    assert layer.router_parameters == 4 * 3 + 4 * 7
    assert layer.flops_per_token == 2 * 4 * 6 * (3 + 7) + 2 * 4 * 6 * (5 + 2) + 2 * 4 * (3 + 7)
    assert layer.active_flops_per_token == 2 * 2 * 6 * (3 + 7 + 5 + 2) + 2 * 4 * (3 + 7)  # two of four experts
    assert layer.adapter_bytes == 2 * (layer.expert_parameters + layer.router_parameters)


@pytest.mark.parametrize(("indices", "experts"), [([0], 4), ([], 12)])
def test_layers_with_stacks_alone_have_no_mixture_beside_those_with_linears(indices, experts):
    linears = [LinearShape(f"layers.{index}.a", index, 3, 5) for index in indices]
    stacks = [StackShape(f"layers.{index}.mlp", "up", index, 8, 3, 5) for index in range(3)]
    plan = plan_allocation(linears, [4] * 3, [2] * 3, [6] * 3, stacks=stacks)
    assert (plan.num_experts, len(plan.adapted_layers)) == (experts, len(indices) or 3)
    assert plan.to_dict()["totals"]["num_experts"] == experts


def test_a_layer_with_one_expert_has_no_router_flops():
    layer = plan_allocation([LinearShape("layers.0.a", 0, 3, 5)], [1], [2], [6]).layers[0]
    assert (layer.top_k, layer.router_parameters) == (1, 0)
    assert layer.flops_per_token == 2 * 6 * 3 + 2 * 6 * 5


def test_layers_without_adapted_linears_cost_nothing():
    plan = plan_allocation([LinearShape("layers.1.a", 1, 3, 5)], [2, 2, 2], [1, 1, 1], [4, 4, 4])
    assert [layer.expert_parameters for layer in plan.layers] == [0, 64, 0]


FLOPS = ("flops_per_token", "active_flops_per_token")


def test_totals_are_the_sums_of_the_layers():
    plan = plan_7b("2468", top_k=2, r="8")
    data = json.loads(json.dumps(plan.to_dict()))
    for key in ("num_experts", "expert_parameters", "router_parameters", "adapter_bytes", *FLOPS):
        assert data["totals"][key] == sum(layer[key] for layer in data["layers"])
    assert data["totals"]["trainable_parameters"] == 105_635_840
    assert data["totals"]["adapter_bytes"] == 4 * 105_635_840
    assert data["totals"]["num_layers"] == len(data["layers"]) == 32
    assert data["totals"]["trainable_share"] is None
    assert dataclasses.replace(plan, base_parameters=4 * 105_635_840).trainable_share == 1 / 4


@pytest.mark.parametrize("index", [None, 2])
def test_linear_outside_the_layers_is_refused(index):
    with pytest.raises(MolaError, match=r"inside the 2 decoder layers.*'lm_head' is not"):
        plan_allocation([LinearShape("lm_head", index, 3, 5)], [2, 2], [1, 1], [4, 4])
