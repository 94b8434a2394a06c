"""`mola allocate`: exact budgets, what each method measures, files that `num_experts` takes."""

import itertools
import json
import math
import re
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PersimmonConfig, PersimmonForCausalLM

from mola import MolaConfig
from mola.allocation.allocate import AllocateOptions, allocate
from mola.allocation.measured import effective_experts, eigenvalues, power_law_exponent
from mola.allocation.probe import read_routing_records
from mola.allocation.rounding import experts_from_scores
from mola.architecture.notation import SHAPES, resolve_per_layer
from mola.cli import main
from mola.errors import MolaError
from tests.damage import change_tensors
from tests.grids import slow

LINEARS = ("self_attn.q_proj", "mlp.up_proj")


# ---------------------------------------------------------------------- rounding


@st.composite
def cases(draw):
    scores = draw(st.lists(st.integers(0, 60), min_size=1, max_size=80).filter(any))
    low = draw(st.integers(1, 4))
    high = draw(st.integers(low, low + 12))
    budget = draw(st.integers(low * len(scores), high * len(scores)))
    return scores, budget, low, draw(st.sampled_from([high, None]))


@given(cases(), st.integers(1, 10**6))
def test_numbers_of_experts(case, factor):
    scores, budget, low, high = case
    experts = experts_from_scores(scores, budget, low, high)
    assert sum(experts) == budget
    assert min(experts) >= low
    assert high is None or max(experts) <= high
    ranked = sorted(zip(scores, experts, strict=True))
    # More for a larger score, or as much; equal scores differ by one at most.
    for (score, number), (larger, other) in itertools.pairwise(ranked):
        assert number <= other or score == larger
    for score in set(scores):
        equal = [number for other, number in zip(scores, experts, strict=True) if other == score]
        assert max(equal) - min(equal) <= 1
        assert equal == sorted(equal), "the higher layers get the rest"
    assert experts_from_scores([score * factor for score in scores], budget, low, high) == experts


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=40).filter(any), st.integers(0, 200))
def test_any_scores(scores, more):
    experts = experts_from_scores(scores, len(scores) + more)
    assert sum(experts) == len(scores) + more
    order = sorted(range(len(scores)), key=lambda layer: scores[layer])
    assert all(experts[low] <= experts[high] for low, high in itertools.pairwise(order) if scores[low] < scores[high])


def test_shares_by_hand():
    assert experts_from_scores([1, 1, 2], 8) == [2, 2, 4]
    assert experts_from_scores([1, 1, 1], 8) == [2, 3, 3]
    # The others pay for a bound in their proportion: 18 is left for 4 and 5.
    assert experts_from_scores([1, 40, 50], 20, min_experts=2) == [2, 8, 10]
    assert experts_from_scores([0, 1, 1], 7, max_experts=3) == [1, 3, 3]
    assert experts_from_scores([0, 0, 1], 9, max_experts=4) == [2, 3, 4]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_at_its_own_budget_is_the_shape(shape):
    wanted = resolve_per_layer(shape, 30, "num_experts")
    assert experts_from_scores(wanted, sum(wanted)) == wanted


@pytest.mark.parametrize("scores", [[], [0, 0], [-1, 2], [math.nan, 1], [math.inf, 1]])
def test_unusable_scores_are_refused(scores):
    with pytest.raises(MolaError, match="scores must be"):
        experts_from_scores(scores, 10)


# ---------------------------------------------------------------------- the methods


def save_probe(base, folder, **settings):
    torch.manual_seed(0)
    settings = {"num_experts": 3, "r": 2, "init_lora_weights": False} | settings
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), MolaConfig(**settings)).save_pretrained(folder)
    return folder


def records(gates):
    """`modules` of a line of routing.jsonl, from layer -> mean gates of its linears."""
    return [
        {"module": f"base_model.model.model.layers.{layer}.{name}", "layer_index": layer, "mean_gates": values}
        for layer, rows in enumerate(gates)
        for name, values in zip(LINEARS, rows, strict=True)
    ]


GATES = [
    [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]],
    [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]],
    [[1 / 3] * 3, [1 / 3] * 3],
    [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]],
]


@pytest.fixture(scope="module")
def probe(tiny_model_dir, tmp_path_factory):
    folder = save_probe(tiny_model_dir, tmp_path_factory.mktemp("probe"))
    lines = [{"step": 1, "modules": records([GATES[0]] * 4)}, {"step": 2, "modules": records(GATES)}]
    (folder / "routing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_short_last_interval_is_not_used(probe, tmp_path):
    def lines(*tokens):
        found = [{"modules": [{**row, "num_tokens": number} for row in records(GATES)]} for number in tokens]
        found[-1]["modules"] = [{**row, "mean_gates": [0.9, 0.1, 0.0]} for row in found[-1]["modules"]]
        (tmp_path / "routing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
        return read_routing_records(str(tmp_path), None)[0][0]["mean_gates"]

    assert lines(100, 90) == [0.9, 0.1, 0.0]
    assert lines(100, 10) == GATES[0][0]
    assert lines(10) == [0.9, 0.1, 0.0]


def test_an_incomplete_last_line_is_ignored(tmp_path):
    line = json.dumps({"modules": records(GATES)})
    (tmp_path / "routing.jsonl").write_text(f"{line}\n{line[:90]}")
    assert read_routing_records(str(tmp_path), None)[0][0]["mean_gates"] == GATES[0][0]
    (tmp_path / "routing.jsonl").write_text(line[:90])
    with pytest.raises(MolaError, match=r"routing\.jsonl must hold the mean gates"):
        read_routing_records(str(tmp_path), None)


def options(base, method, budget=16, **more):
    return AllocateOptions(
        str(base), method, budget, **{key: str(v) if key == "adapter" else v for key, v in more.items()}
    )


def test_shapes_keep_their_proportions(no_weights_dir):
    assert allocate(options(no_weights_dir, "inverted_triangle", 20)).num_experts == [2, 4, 6, 8]
    assert allocate(options(no_weights_dir, "2468", 40)).num_experts == [4, 8, 12, 16]
    assert allocate(options(no_weights_dir, "Hourglass", 10)).num_experts == [4, 1, 1, 4]
    assert allocate(options(no_weights_dir, "13", 8)).num_experts == [1, 1, 3, 3]
    uniform = allocate(options(no_weights_dir, "uniform", 18))
    assert (uniform.num_experts, uniform.scores) == ([4, 4, 5, 5], [1.0] * 4)
    assert allocate(options(no_weights_dir, "2468", 20, max_experts=6)).num_experts == [3, 5, 6, 6]


def test_alphalora_is_the_mean_exponent_of_a_layer(tiny_model_dir, tiny_model):
    result = allocate(options(tiny_model_dir, "alphalora", target_modules="q_proj,down_proj"))
    for layer, score in zip(tiny_model.model.layers, result.scores, strict=True):
        weights = (layer.self_attn.q_proj.weight, layer.mlp.down_proj.weight)
        assert score == pytest.approx(sum(power_law_exponent(eigenvalues(weight)) for weight in weights) / 2, rel=1e-9)
    assert result.num_experts == experts_from_scores([score**2.5 for score in result.scores], 16)
    strong = allocate(options(tiny_model_dir, "alphalora", target_modules="q_proj,down_proj", beta=40))
    assert strong.scores == result.scores
    assert max(strong.num_experts) > max(result.num_experts)
    assert allocate(options(tiny_model_dir, "alphalora", beta=0)).num_experts == [4, 4, 4, 4]


def test_weights_in_several_files_and_in_other_formats(tiny_model_dir, tiny_model, tmp_path):
    expected = allocate(options(tiny_model_dir, "alphalora")).scores
    tiny_model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert allocate(options(tmp_path / "shards", "alphalora")).scores == expected


def test_files_without_the_prefix_and_transposed_weights(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2))
    model.save_pretrained(tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "headless")
    whole = allocate(options(tmp_path / "whole", "alphalora"))
    assert whole.scores == allocate(options(tmp_path / "headless", "alphalora")).scores
    weight = model.transformer.h[0].attn.c_attn.weight
    assert whole.scores[0] == pytest.approx(power_law_exponent(eigenvalues(weight)), rel=1e-6)


def test_a_model_without_safetensors_is_loaded(tiny_model_dir, tiny_model, tmp_path, caplog):
    for file in tiny_model_dir.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    torch.save(tiny_model.state_dict(), tmp_path / "pytorch_model.bin")
    with caplog.at_level("INFO", logger="mola"):
        found = allocate(options(tmp_path, "alphalora", device="cpu")).scores
    assert "the whole model is loaded" in caplog.text
    assert found == allocate(options(tiny_model_dir, "alphalora")).scores


@pytest.mark.parametrize(
    ("settings", "scalings"),
    [
        ({}, [1, 1, 1, 1]),
        ({"alpha_pattern": {r"layers\.0\..*": 64}, "lora_alpha": 8}, [8, 1, 1, 1]),
        ({"use_rslora": True, "r": [2, 2, 8, 8]}, [2, 2, 1, 1]),
    ],
    ids=["plain", "alpha_pattern", "use_rslora"],
)
def test_redundancy_is_the_distance_relative_to_other_layers(
    no_weights_dir, tiny_model_dir, tmp_path, settings, scalings
):
    probe = save_probe(tiny_model_dir, tmp_path / "probe", **settings)
    scores = allocate(options(no_weights_dir, "redundancy", adapter=probe)).scores
    tensors = load_file(probe / "adapter_model.safetensors")
    distances = {}
    for key in tensors:
        if key.endswith(".mola_A"):
            stacks = tensors[key].double(), tensors[key.replace("mola_A", "mola_B")].double()
            updates = torch.einsum("erI,erO->eOI", *stacks)
            pairs = [(updates[i] - updates[j]).norm().item() for i in range(3) for j in range(i)]
            _, layer, name = re.fullmatch(r"(.*)\.layers\.(\d)\.(.*)\.mola_A", key).groups()
            distances[name, int(layer)] = scalings[int(layer)] * sum(pairs) / len(pairs)
    kinds = {name for name, _ in distances}
    usual = {kind: sum(distances[kind, layer] for layer in range(4)) / 4 for kind in kinds}
    expected = [sum(distances[kind, layer] / usual[kind] for kind in kinds) / len(kinds) for layer in range(4)]
    assert scores == pytest.approx(expected, rel=1e-5)
    assert sum(scores) == pytest.approx(4)


def test_layers_with_like_experts_get_fewer(no_weights_dir, probe, tmp_path):
    shutil.copytree(probe, tmp_path / "alike")

    def make_alike(tensors):
        for key, tensor in tensors.items():
            if ".layers.1." in key and "router" not in key:
                tensors[key] = tensor[:1] + 0.05 * tensor

    change_tensors(tmp_path / "alike", make_alike)
    before = allocate(options(no_weights_dir, "redundancy", adapter=probe))
    after = allocate(options(no_weights_dir, "redundancy", adapter=tmp_path / "alike"))
    assert before.num_experts == [4, 4, 4, 4]
    assert after.scores[1] < before.scores[1] / 2
    assert after.num_experts == [5, 1, 5, 5]


def test_usage_counts_effective_experts(no_weights_dir, probe, tmp_path):
    result = allocate(options(no_weights_dir, "usage", adapter=probe))
    assert result.scores == pytest.approx([1, 2, 3, 1.5])
    assert result.num_experts == [2, 4, 7, 3]
    inspection = tmp_path / "inspect.json"
    inspection.write_text(json.dumps({"usage": {"all": records(GATES[::-1]), "prompt": []}}))
    assert allocate(options(no_weights_dir, "usage", inspection=str(inspection))).scores == result.scores[::-1]
    both = allocate(options(no_weights_dir, "usage", inspection=str(inspection), adapter=probe))
    assert both.scores == result.scores[::-1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9).filter(any))
def test_effective_experts_are_between_one_and_all(gates):
    assert 1 - 1e-9 <= effective_experts(gates) <= len(gates) + 1e-9


def test_layers_without_adapted_linears(tiny_model_dir, no_weights_dir, tmp_path):
    """They have 1 expert, which does not count for the budget."""
    folder = save_probe(tiny_model_dir, tmp_path / "upper", layers_to_transform=[2, 3])
    result = allocate(options(no_weights_dir, "redundancy", 9, adapter=folder))
    assert result.num_experts in ([1, 1, 4, 5], [1, 1, 5, 4])
    assert result.scores[:2] == [None, None]
    target = r".*layers\.[12]\.mlp\.up_proj"
    assert allocate(options(no_weights_dir, "1234", 10, target_modules=target)).num_experts == [1, 4, 6, 1]
    rows = [{"module": f"layers.{layer}.x", "layer_index": layer, "mean_gates": [1, 1]} for layer in (2, 3)]
    (folder / "routing.jsonl").write_text(json.dumps({"modules": rows}))
    assert allocate(options(no_weights_dir, "usage", 9, adapter=folder)).num_experts == [1, 1, 4, 5]


# ---------------------------------------------------------------------- from the command to training


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "data.json"
    rows = [{"instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(4)]
    file.write_text(json.dumps(rows))
    return file


@pytest.mark.parametrize("method", ["2468", *slow("alphalora", "usage")])
def test_the_file_trains(method, tiny_model_dir, probe, data, tmp_path, capsys):
    file, run = tmp_path / "new" / "allocation.json", tmp_path / "run"
    more = ["--adapter", str(probe)] if method in ("redundancy", "usage") else []
    command = ["allocate", "--base_model", str(tiny_model_dir), "--method", method, "--budget", "11", *more]
    assert main([*command, "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    assert f"mola train --base_model {tiny_model_dir} --num_experts {file}" in printed
    written = json.loads(file.read_text())
    numbers = written["num_experts"]
    assert (sum(numbers), len(numbers)) == (11, 4)
    assert (written["method"], written["budget"], written["base_model"]) == (method, 11, str(tiny_model_dir))
    assert [row["num_experts"] for row in written["layers"]] == numbers
    assert [row["layer_index"] for row in written["layers"]] == [0, 1, 2, 3]
    assert all(row["score"] > 0 for row in written["layers"])
    assert written["why"].endswith(".")
    assert {"settings", "versions"} <= written.keys()
    assert main([*command, "--output", str(file)]) == 2
    assert "`output` must be a new file" in capsys.readouterr().err
    assert main([*command, "--output", str(file), "--overwrite"]) == 0
    capsys.readouterr()
    base = ["--base_model", str(tiny_model_dir), "--num_experts", str(file)]
    assert main(["plan", *base, "--json", "-"]) == 0
    assert [layer["num_experts"] for layer in json.loads(capsys.readouterr().out)["layers"]] == numbers
    settings = ["--data", str(data), "--output", str(run), "--max_steps", "1", "--warmup_steps", "0"]
    assert main(["train", *base, *settings, "--dtype", "float32", "--disable_tqdm", "true"]) == 0
    assert json.loads((run / "adapter_config.json").read_text())["num_experts"] == numbers


def test_the_printed_flags_cover_one_layer_and_chosen_linears(no_weights_dir, small_model_dir, capsys):
    assert main(["allocate", "--base_model", str(no_weights_dir), "--method", "2468", "--budget", "20"]) == 0
    assert "--num_experts 2,4,6,8" in capsys.readouterr().out
    command = ["allocate", "--base_model", str(small_model_dir), "--method", "uniform", "--budget", "12"]
    assert main([*command, "--target_modules", "q_proj"]) == 0
    assert "--num_experts 12, --target_modules q_proj --data DATA" in capsys.readouterr().out


def test_a_probe_of_a_model_that_has_no_default_linears(tmp_path, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
    base = tmp_path / "base"
    PersimmonForCausalLM(PersimmonConfig(vocab_size=64, **sizes)).save_pretrained(base)
    with pytest.raises(MolaError, match="`target_modules` must be given"):
        allocate(options(base, "uniform", 9))
    adapter = save_probe(base, tmp_path / "probe", target_modules=["query_key_value"])
    words = ["--base_model", str(base), "--method", "redundancy", "--adapter", str(adapter), "--budget", "9"]
    assert main(["allocate", *words]) == 0
    assert "--target_modules query_key_value --data DATA" in capsys.readouterr().out
    rows = [
        {"module": f"model.layers.{layer}.self_attn.query_key_value", "layer_index": layer, "mean_gates": [0.5, 0.5]}
        for layer in range(3)
    ]
    (tmp_path / "inspect.json").write_text(json.dumps({"usage": {"all": rows}}))
    asked = options(base, "usage", 9, inspection=str(tmp_path / "inspect.json"), target_modules="query_key_value")
    assert allocate(asked).num_experts == [3, 3, 3]


# ---------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "circle"}, "`method` must be one of"),
        ({"method": "24682"}, "more digits than"),
        ({"budget": 3}, "`budget` must be at least 4, which 4 layers with `min_experts` 1 allow: got 3"),
        ({"max_experts": 3}, "between 4 and 12, which 4 layers with `min_experts` 1 and `max_experts` 3 allow: got 16"),
        ({"min_experts": 0}, "`min_experts` must be at least 1"),
        ({"min_experts": 3, "max_experts": 2}, "`max_experts` must be at least `min_experts`"),
        ({"method": "redundancy"}, "pass --adapter"),
        ({"method": "usage"}, "pass --adapter or --inspection"),
        ({"method": "usage", "adapter": "x", "target_modules": "q_proj"}, "`target_modules`"),
        ({"beta": -1.0, "method": "alphalora"}, "`beta` must be a number of at least 0"),
        ({"target_modules": "q_prj"}, "did you mean 'q_proj'"),
        ({"method": "alphalora", "max_experts": 2}, "between 4 and 8"),
        ({"device": "auto"}, "`device` .'auto'. has no effect with `method` '2468'"),
        ({"method": "usage", "inspection": "nosuch.json"}, "`inspection` cannot be read: 'nosuch.json'"),
    ],
)
def test_wrong_options_are_refused_before_weights_load(no_weights_dir, changes, message):
    with pytest.raises(MolaError, match=message):
        allocate(AllocateOptions(**{"base_model": str(no_weights_dir), "method": "2468", "budget": 16} | changes))


def test_unusable_probes_are_refused(tiny_model_dir, no_weights_dir, probe, tmp_path):
    def refused(message, method="redundancy", **more):
        with pytest.raises(MolaError, match=message):
            allocate(options(no_weights_dir, method, **more))

    one = save_probe(tiny_model_dir, tmp_path / "one", num_experts=[1, 2, 2, 2], top_k=1)
    refused("at least 2 experts in every layer: .* has one in layer 0", adapter=one)
    untrained = save_probe(tiny_model_dir, tmp_path / "untrained", init_lora_weights=True)
    refused("all equal or zero", adapter=untrained)
    lora = tmp_path / "lora"
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig()).save_pretrained(lora)
    refused("of type LORA", adapter=lora)
    refused("no such folder", adapter=tmp_path / "nosuch")
    refused("must hold routing.jsonl", method="usage", adapter=untrained)
    refused("between 4 and 8", adapter=probe, max_experts=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must hold the mean gates"),
        ('{"usage": {"all": [{"module": "x", "layer_index": 0, "mean_gates": [0, 0]}]}}', "mean_gates"),
        (json.dumps({"usage": {"all": records(GATES[:3])}}), "it lacks 3"),
        (json.dumps({"usage": {"all": records([*GATES, GATES[0]])}}), "names layer 4"),
    ],
)
def test_unusable_inspections_are_refused(no_weights_dir, tmp_path, content, message):
    (tmp_path / "inspect.json").write_text(content)
    with pytest.raises(MolaError, match=message):
        allocate(options(no_weights_dir, "usage", inspection=str(tmp_path / "inspect.json")))


def test_alphalora_needs_plain_weights(tiny_model_dir, tmp_path):
    base = shutil.copytree(tiny_model_dir, tmp_path / "packed")
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(settings | {"quantization_config": packed}), encoding="utf-8")
    with pytest.raises(MolaError, match="plain weights"):
        allocate(AllocateOptions(str(base), "alphalora", 16))
