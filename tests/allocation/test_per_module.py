"""`mola allocate --per_module` and `--shuffle`: exact budgets, scores, files with numbers of linears."""

import itertools
import json
from collections import Counter, defaultdict
from io import StringIO
from statistics import fmean
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors import safe_open

from mola import MolaConfig
from mola.allocation.allocate import AllocateOptions, allocate, module_table
from mola.allocation.base import read_base
from mola.allocation.measured import ModuleScore, eigenvalues, power_law_exponent, relative_scores
from mola.allocation.reallocate import ReallocateOptions, reallocate
from mola.allocation.rounding import Rule, layers_and_pattern, numbers_of_layers, numbers_of_modules
from mola.architecture.allocation import plan_allocation
from mola.architecture.patterns import by_pattern
from mola.cli import main
from mola.errors import MolaError
from mola.integrations.mixture_settings import checked_settings, continued_config
from mola.models.plan import PlanOptions, plan
from tests.conftest import save_adapter

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
BUDGET = 14


# ---------------------------------------------------------------------- numbers


@st.composite
def cases(draw):
    """Scores of linears, with layers of other kinds, and a rule that fits."""
    kinds = [draw(st.sets(st.sampled_from(KINDS), min_size=1)) for _ in range(draw(st.integers(1, 14)))]
    scores = draw(st.lists(st.integers(0, 60), min_size=3 * len(kinds), max_size=3 * len(kinds)))
    found = [
        ModuleScore(f"model.layers.{layer}.{kind}", layer, float(scores.pop()) + (layer == 0))
        for layer, own in enumerate(kinds)
        for kind in sorted(own)
    ]
    low = draw(st.integers(1, 4))
    high = draw(st.integers(low, low + 12))
    budget = draw(st.integers(low * len(kinds), high * len(kinds)))
    return found, len(kinds), Rule(budget, low, draw(st.sampled_from([high, None])), draw(st.sampled_from([1.0, 2.5])))


def test_linears_compete_within_their_kind():
    """GPT-2 has a `c_proj` in attention and one in the MLP."""
    names = [f"transformer.h.{layer}.{kind}.c_proj" for layer in range(4) for kind in ("attn", "mlp")]
    values = {name: (1.0 if ".attn." in name else 100.0) * (1 + index // 2) for index, name in enumerate(names)}
    base = SimpleNamespace(layer_of={name: index // 2 for index, name in enumerate(names)})
    scores = relative_scores(values, base)
    for kind in ("attn", "mlp"):
        assert fmean(each.score for each in scores if f".{kind}." in each.module) == pytest.approx(1)
    shuffled = numbers_of_modules(scores, Rule(8, 1, None, shuffle=1))
    plain = numbers_of_modules(scores, Rule(8, 1, None))
    for kind in ("attn", "mlp"):
        own = [[each.num_experts for each in found if f".{kind}." in each.module] for found in (plain, shuffled)]
        assert sorted(own[0]) == sorted(own[1])
    printed = Console(width=200, file=StringIO())
    printed.print(module_table(plain, 4, "title"))
    assert "attn.c_proj" in printed.file.getvalue()


@given(cases(), st.integers(0, 9))
def test_any_scores_of_linears(case, seed):
    found, num_layers, rule = case
    modules = numbers_of_modules(found, rule)
    numbers = [each.num_experts for each in modules]
    counts = Counter(each.layer_index for each in found)
    uniform = numbers_of_layers([1.0] * num_layers, Rule(rule.budget, rule.min_experts, rule.max_experts))
    assert sum(numbers) == sum(counts[layer] * uniform[layer] for layer in range(num_layers))
    if len(set(counts.values())) == 1:
        assert sum(numbers) == rule.budget * counts[0]
    assert min(numbers) >= rule.min_experts
    assert rule.max_experts is None or max(numbers) <= rule.max_experts
    ranked = sorted(modules, key=lambda each: each.score)
    for lower, higher in itertools.pairwise(ranked):
        assert lower.num_experts <= higher.num_experts or lower.score == higher.score

    layers, pattern = layers_and_pattern(modules, [1.0] * num_layers, rule)
    assert sum(layers) == rule.budget
    assert all(by_pattern(pattern, each.module, layers[each.layer_index]) == each.num_experts for each in modules)
    assert all(number != layers[int(name.split(".")[2])] for name, number in pattern.items())

    mixed = numbers_of_modules(found, Rule(rule.budget, rule.min_experts, rule.max_experts, rule.beta, seed))
    assert [(each.module, each.score) for each in mixed] == [(each.module, each.score) for each in modules]
    assert by_kind(mixed) == by_kind(modules)


def by_kind(modules):
    kinds = defaultdict(list)
    for each in modules:
        kinds[each.module.rpartition(".")[2]].append(each.num_experts)
    return {kind: sorted(numbers) for kind, numbers in kinds.items()}


def test_shuffled_layers(no_weights_dir):
    def numbers(**more):
        return allocate(AllocateOptions(str(no_weights_dir), "1234", 20, **more))

    assert numbers().num_experts == [2, 4, 6, 8]
    found = [numbers(shuffle=seed) for seed in range(6)]
    assert all(sorted(each.num_experts) == [2, 4, 6, 8] for each in found)
    assert all(each.scores == [1, 2, 3, 4] for each in found)
    assert len({tuple(each.num_experts) for each in found}) > 2
    assert numbers(shuffle=3).num_experts == found[3].num_experts
    assert "shuffled over the layers, by seed 3" in found[3].why
    assert "shuffled" not in numbers().why
    some = numbers(shuffle=1, target_modules=r".*layers\.[12]\.mlp\.up_proj")
    assert (some.num_experts[0], some.num_experts[3], sum(some.num_experts)) == (1, 1, 22)


# ---------------------------------------------------------------------- methods


@pytest.fixture(scope="module")
def probe(tiny_model_dir, tmp_path_factory):
    config = MolaConfig(num_experts=3, r=2, init_lora_weights=False, target_modules=[k.split(".")[1] for k in KINDS])
    folder = save_adapter(tiny_model_dir, tmp_path_factory.mktemp("probe"), config)
    rows = [
        {"module": f"base_model.model.model.layers.{layer}.{kind}", "layer_index": layer, "mean_gates": [1, gate, 0]}
        for layer in range(4)
        for kind, gate in zip(KINDS, (0, layer / 3, 1), strict=True)
    ]
    (folder / "routing.jsonl").write_text(json.dumps({"step": 1, "modules": rows}) + "\n")
    return folder


@pytest.fixture(scope="module")
def file(no_weights_dir, probe, tmp_path_factory):
    """By use: the first kind least, the last one most, the middle one from one to the other."""
    output = tmp_path_factory.mktemp("allocation") / "allocation.json"
    words = ["--base_model", str(no_weights_dir), "--method", "usage", "--adapter", str(probe), "--budget", str(BUDGET)]
    assert main(["allocate", *words, "--per_module", "true", "--output", str(output)]) == 0
    return output


TARGETS = ",".join(kind.split(".")[1] for kind in KINDS)


def test_every_linear_has_its_own_score(tiny_model_dir, tiny_model, no_weights_dir, probe):
    result = allocate(
        AllocateOptions(str(tiny_model_dir), "alphalora", BUDGET, target_modules=TARGETS, per_module=True)
    )
    assert len(result.modules) == 12
    for each in result.modules:
        exponent = power_law_exponent(eigenvalues(tiny_model.get_submodule(each.module).weight))
        assert each.score == pytest.approx(exponent, rel=1e-9)
    layers = allocate(AllocateOptions(str(tiny_model_dir), "alphalora", BUDGET, target_modules=TARGETS))
    assert result.scores == layers.scores
    assert (layers.num_experts_pattern, layers.modules) == (None, [])

    relative = allocate(AllocateOptions(str(no_weights_dir), "redundancy", BUDGET, adapter=str(probe), per_module=True))
    scores = defaultdict(list)
    for each in relative.modules:
        scores[each.module.rpartition(".")[2]].append(each.score)
    assert {kind: sum(own) / len(own) for kind, own in scores.items()} == pytest.approx(dict.fromkeys(scores, 1))
    assert sum(each.num_experts for each in relative.modules) == BUDGET * len(KINDS)


def test_the_file_and_the_terminal_output(file, no_weights_dir, probe, capsys):
    written = json.loads(file.read_text())
    numbers = {row["module"]: row["num_experts"] for row in written["modules"]}
    assert (len(numbers), sum(numbers.values()), sum(written["num_experts"])) == (12, BUDGET * 3, BUDGET)
    of_kind = [[numbers[f"model.layers.{layer}.{kind}"] for layer in range(4)] for kind in KINDS]
    assert max(of_kind[0]) < min(of_kind[2])
    assert sorted(of_kind[1]) == of_kind[1]
    assert of_kind[1][0] < of_kind[1][3]
    assert written["why"].startswith("Linears that spread")
    assert written["num_experts_pattern"]
    words = ["--base_model", str(no_weights_dir), "--method", "usage", "--adapter", str(probe), "--budget", str(BUDGET)]
    assert main(["allocate", *words, "--per_module", "true", "--shuffle", "5"]) == 0
    printed = capsys.readouterr().out
    assert f"{BUDGET * 3} experts of linears in all. At r 8 they have " in printed
    assert "shuffled over the linears of each name, by seed 5" in " ".join(printed.split())
    assert all(kind.split(".")[1] in printed for kind in KINDS)
    assert "Pass --output FILE" in printed


# ---------------------------------------------------------------------- where the file goes


def experts_in(folder):
    """Experts by linear of an adapter, from its tensors."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        return {
            key.removeprefix("base_model.model.").removesuffix(".mola_A"): tensors.get_slice(key).get_shape()[0]
            for key in tensors.keys()  # noqa: SIM118
            if key.endswith(".mola_A")
        }


def test_the_file_is_a_value_of_num_experts(file, tiny_model_dir, no_weights_dir, tmp_path):
    written = json.loads(file.read_text())
    numbers = {row["module"]: row["num_experts"] for row in written["modules"]}
    config = MolaConfig(num_experts=str(file), target_modules=TARGETS.split(","))
    assert config.num_experts_pattern == written["num_experts_pattern"]
    folder = save_adapter(tiny_model_dir, tmp_path / "adapter", config)
    assert experts_in(folder) == numbers
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert (saved["num_experts"], saved["num_experts_pattern"]) == (
        config_numbers(written),
        written["num_experts_pattern"],
    )

    shapes = read_base(str(no_weights_dir), TARGETS).linears
    costs = plan(PlanOptions(str(no_weights_dir), str(file), target_modules=TARGETS))
    wanted = sum(
        plan_allocation([each], [numbers[each.name]] * 4, [1] * 4, [8] * 4).trainable_parameters for each in shapes
    )
    assert costs.trainable_parameters == wanted

    data, run = tmp_path / "data.json", tmp_path / "run"
    data.write_text(json.dumps([{"instruction": "q", "input": "", "output": "a"}] * 2))
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        f"num_experts: {file}\nmax_steps: 1\nwarmup_steps: 0\ndtype: float32\ntarget_modules: {TARGETS}\n"
    )
    words = ["--base_model", str(tiny_model_dir), "--data", str(data), "--output", str(run), "--r", "2"]
    assert main(["train", "--config", str(recipe), *words]) == 0
    assert experts_in(run) == numbers


def config_numbers(written):
    """As a configuration has them: one where all are the same."""
    numbers = written["num_experts"]
    return numbers[0] if len(set(numbers)) == 1 else numbers


def test_both_a_file_and_a_pattern(file, no_weights_dir):
    pattern = json.loads(file.read_text())["num_experts_pattern"]
    assert MolaConfig(num_experts=str(file), num_experts_pattern=pattern).num_experts_pattern == pattern
    with pytest.raises(MolaError, match="`num_experts_pattern` must not differ .*got {'q_proj': 2} beside .*Leave it"):
        MolaConfig(num_experts=str(file), num_experts_pattern={"q_proj": 2})
    words = {"target_modules": TARGETS, "num_experts_pattern": '{"q_proj": 2}'}
    with pytest.raises(MolaError, match="must not differ"):
        plan(PlanOptions(str(no_weights_dir), str(file), **words))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [([1], "must map names .* in '.*wrong.json'"), ({"q": 0}, "got 0 for 'q' in '.*wrong.json'")],
)
def test_a_file_with_a_wrong_pattern(pattern, message, tmp_path):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({"num_experts": [2, 2], "num_experts_pattern": pattern}))
    with pytest.raises(MolaError, match=message):
        MolaConfig(num_experts=str(path))


def test_reallocate_refuses_a_pattern(file, probe, tiny_model_dir, tiny_model, tmp_path):
    with pytest.raises(MolaError, match="`num_experts` must have one number per layer: .*without --per_module"):
        reallocate(ReallocateOptions(str(probe), str(file), str(tmp_path / "new")))
    written = json.loads(file.read_text())
    same, other = (
        MolaConfig(num_experts=e, target_modules=TARGETS.split(",")) for e in (str(file), written["num_experts"])
    )
    same, other = (save_adapter(tiny_model_dir, tmp_path / n, c) for n, c in (("same", same), ("other", other)))
    settings = checked_settings({"num_experts": str(file)})
    assert continued_config(tiny_model, str(same), settings).num_experts_pattern
    with pytest.raises(MolaError, match="`num_experts` is .* leave it out, or start"):
        continued_config(tiny_model, str(other), settings)


# ---------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "uniform", "per_module": True}, "`per_module` .* has no effect with `method` 'uniform'"),
        ({"method": "redundancy", "per_module": True, "budget": 3}, "`budget` must be at least 4, which 4 layers"),
    ],
)
def test_wrong_options(changes, message, no_weights_dir, probe):
    adapter = {"adapter": str(probe)} if changes["method"] == "redundancy" else {}
    with pytest.raises(MolaError, match=message):
        allocate(AllocateOptions(**{"base_model": str(no_weights_dir), "budget": BUDGET, **adapter, **changes}))


def test_use_must_cover_every_linear(no_weights_dir, probe, tmp_path):
    """Without one linear of a layer there is a number for the layer, but not for the linear."""
    rows = json.loads((probe / "routing.jsonl").read_text())["modules"]
    path = tmp_path / "inspect.json"
    path.write_text(json.dumps({"usage": {"all": rows[1:]}}))
    words = {"adapter": str(probe), "inspection": str(path)}
    assert allocate(AllocateOptions(str(no_weights_dir), "usage", BUDGET, **words)).num_experts
    with pytest.raises(MolaError, match="exactly the adapted linears .*'model.layers.0.self_attn.q_proj'"):
        allocate(AllocateOptions(str(no_weights_dir), "usage", BUDGET, per_module=True, **words))
