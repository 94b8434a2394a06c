"""Allocations from a few samples: what the scores are, and that they cost little and change nothing."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from mola.allocation.allocate import AllocateOptions, allocate
from mola.allocation.base import read_base
from mola.allocation.measured import layer_scores
from mola.allocation.on_data import activation_scores, encoded_samples, gradient_scores, load_for_scores
from mola.cli import main
from mola.data.prepare import PrepareOptions, prepare
from mola.errors import MolaError

TARGETS = "q_proj,v_proj,down_proj"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on-data") / "data"
    prepare(PrepareOptions("sample", str(folder), train_size=10, validation_size=2, test_size=2))
    return str(folder / "dataset.hf")


@pytest.fixture(scope="module")
def base(tiny_model_dir):
    return read_base(str(tiny_model_dir), TARGETS)


@pytest.fixture(scope="module")
def samples(base, data):
    return encoded_samples(base, data, "sample", None, "train", 4)


def test_samples_need_no_task(base, data, samples):
    assert list(encoded_samples(base, data, None, "alpaca_short", "train", 4)) == list(samples)


def weight_gradients(model, base, samples):
    """Squared norms of the weights' gradients, sample by sample, as autograd has them."""
    found = {linear.name: 0.0 for linear in base.linears}
    for sample in samples:
        weights = {name: model.get_submodule(name).weight.requires_grad_(True) for name in found}
        ids, labels = (torch.tensor([sample[name]]) for name in ("input_ids", "labels"))
        gradients = torch.autograd.grad(model(input_ids=ids, labels=labels).loss, list(weights.values()))
        for name, gradient in zip(found, gradients, strict=True):
            found[name] += float(gradient.double().square().sum()) / len(samples)
    return found


def test_gradients_are_those_of_the_weights(base, samples, tiny_model_dir):
    scores = layer_scores(gradient_scores(base, samples, load_for_scores(base, "cpu")), base.num_layers)
    norms = weight_gradients(LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), base, samples)
    for layer, score in enumerate(scores):
        relative = []
        for kind in TARGETS.split(","):
            of_kind = [value for name, value in norms.items() if name.endswith(kind)]
            (own,) = [
                norms[each.name] for each in base.linears if each.name.endswith(kind) and each.layer_index == layer
            ]
            relative.append(own / (sum(of_kind) / len(of_kind)))
        assert score == pytest.approx(sum(relative) / len(relative), rel=1e-3)
    assert sum(scores) / len(scores) == pytest.approx(1)


def test_linears_that_run_several_times_count_all_calls_with_gradients(base, samples, tiny_model_dir):
    def repeat(model):
        """As layers that recur, the first time without gradients."""
        mlp = model.model.layers[1].mlp
        once = mlp.forward

        def forward(x):
            with torch.no_grad():
                once(x)
            return once(once(x))

        mlp.forward = forward
        return model

    found = {each.module: each.score for each in gradient_scores(base, samples, repeat(load_for_scores(base, "cpu")))}
    model = repeat(LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32))
    norms = {
        name: value for name, value in weight_gradients(model, base, samples).items() if name.endswith("down_proj")
    }
    for name, value in norms.items():
        assert found[name] == pytest.approx(value * len(norms) / sum(norms.values()), rel=1e-3)


def test_samples_use_the_chosen_template(base, samples, data, tiny_tokenizer):
    asked = encoded_samples(base, data, "sample", "alpaca", "train", 4)
    for short, long in zip(samples, asked, strict=True):
        texts = [tiny_tokenizer.decode(each["input_ids"]) for each in (short, long)]
        assert ["Below is an instruction" in text for text in texts] == [False, True]


@pytest.mark.parametrize(("count", "length"), [(8, None), (1, 20)], ids=["many tokens", "few tokens"])
def test_activations_count_the_strongest_directions(count, length, base, data):
    """Of the first 1,024 tokens, and of fewer tokens than there are features."""
    samples = encoded_samples(base, data, "sample", None, "train", count)
    samples = [{name: sample[name][:length] for name in ("input_ids", "labels")} for sample in samples]
    model = load_for_scores(base, "cpu")
    seen = {linear.name: [] for linear in base.linears}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, rows=rows: rows.append(x[0][0]))
        for name, rows in seen.items()
    ]
    with torch.no_grad():
        for sample in samples:
            model(input_ids=torch.tensor([sample["input_ids"]]))
    for handle in handles:
        handle.remove()
    shares = {}
    for name, rows in seen.items():
        assert (len(torch.cat(rows)) > 1024) is (length is None)
        x = torch.cat(rows)[:1024].double()
        values = torch.linalg.svdvals(x - x.mean(0)) ** 2
        shares[name] = values / values.sum()
    least = torch.cat(list(shares.values())).sort(descending=True).values[8 * len(shares) - 1]
    for layer, score in enumerate(layer_scores(activation_scores(base, samples, model), base.num_layers)):
        counts = [
            int((shares[each.name] >= least * (1 - 1e-9)).sum()) for each in base.linears if each.layer_index == layer
        ]
        assert score == pytest.approx(sum(counts) / len(counts), abs=0.5)


@pytest.mark.parametrize("method", ["gradient", "activation"])
def test_the_budget_is_exact_and_the_file_says_how(method, tiny_model_dir, data, tmp_path):
    output = tmp_path / "allocation.json"
    words = {"budget": 14, "data": data, "task": "sample", "limit": 3, "output": str(output)}
    result = allocate(AllocateOptions(str(tiny_model_dir), method, target_modules=TARGETS, **words))
    assert sum(result.num_experts) == 14
    written = json.loads(output.read_text())
    assert written["num_experts"] == result.num_experts
    assert written["settings"]["limit"] == 3
    ranked = sorted(range(4), key=lambda layer: result.scores[layer])
    assert [result.num_experts[layer] for layer in ranked] == sorted(result.num_experts)
    again = allocate(AllocateOptions(str(tiny_model_dir), method, target_modules=TARGETS, **words, overwrite=True))
    assert again.scores == result.scores


def test_the_command_measures_the_chosen_samples(tiny_model_dir, base, data, tmp_path):
    """Its scores are those of the same split, number and prompts, and of no other."""
    asked = {"template": "alpaca", "split": "validation", "limit": 1}
    words = {"base_model": tiny_model_dir, "target_modules": TARGETS, "data": data, "task": "sample", **asked}
    output = tmp_path / "allocation.json"
    flags = [f"--{name}={value}" for name, value in words.items()]
    assert main(["allocate", "--method=gradient", "--budget=14", *flags, f"--output={output}"]) == 0
    found = [row["score"] for row in json.loads(output.read_text())["layers"]]
    model = load_for_scores(base, "cpu")

    def scores(**changes):
        samples = encoded_samples(base, data, "sample", **{**asked, **changes})
        return layer_scores(gradient_scores(base, samples, model), base.num_layers)

    assert found == scores()
    for name in asked:
        assert found != pytest.approx(scores(**{name: getattr(AllocateOptions, name)}), rel=1e-3), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "gradient"}, "`method` gradient needs samples: pass --data FILE"),
        ({"method": "gradient", "data": "x.json", "task": "sample", "limit": 0}, "`limit` must be at least 1: got 0"),
        ({"method": "2468", "data": "x.json"}, "`data` \\('x.json'\\) has no effect with `method` '2468'"),
        ({"method": "gradient", "data": "missing.json", "task": "sample"}, "missing.json"),
    ],
)
def test_wrong_options_are_refused(words, message, no_weights_dir):
    with pytest.raises(MolaError, match=message):
        allocate(AllocateOptions(str(no_weights_dir), budget=14, **words))
