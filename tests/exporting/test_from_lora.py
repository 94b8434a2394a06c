"""`mola convert --from lora`: LoRA adapters become experts, exactly; routers fresh or fitted."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mola.exporting.convert import ConvertOptions, convert
from mola.exporting.routers import solve_router
from mola.models.prompts import template_for
from tests.damage import WEIGHTS, change_tensors, cut_off
from tests.exporting.conftest import load, logits
from tests.grids import slow


def flags(model_dir, output, *more):
    return ["--from", "lora", "--base_model", model_dir, "--output", output, *more]


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 9, "use_rslora": True},
        {"r": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 3}},
    ],
)
def test_one_adapter_in_every_expert_is_that_lora(tiny_model_dir, lora, tmp_path, run, settings):
    source = lora("a", **settings)
    run("convert", source, *flags(tiny_model_dir, tmp_path / "out", "--num_experts", "2345", "--noise", 0))
    mixture = load(tiny_model_dir, tmp_path / "out")
    torch.testing.assert_close(logits(mixture), logits(load(tiny_model_dir, source)), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["num_experts"] == [2, 3, 4, 5]
    assert config["top_k"] == 2


def test_a_common_scale_is_kept_bit_for_bit(tiny_model_dir, lora, tmp_path, run):
    sources = [lora("a", r=2, lora_alpha=4, seed=0), lora("b", r=3, lora_alpha=6, seed=1)]
    run("convert", *sources, *flags(tiny_model_dir, tmp_path / "out", "--num_experts", "2,"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for expert, source in enumerate(sources):
        theirs = load_file(f"{source}/adapter_model.safetensors")
        name = "base_model.model.model.layers.1.mlp.down_proj"
        A, B = theirs[f"{name}.lora_A.weight"], theirs[f"{name}.lora_B.weight"]
        assert torch.equal(ours[f"{name}.mola_A"][expert, : len(A)], A)
        assert torch.equal(ours[f"{name}.mola_B"][expert, : len(A)], B.t())
        assert not ours[f"{name}.mola_B"][expert, len(A) :].any()
        assert ours[f"{name}.mola_A"][expert, len(A) :].all()  # or it could not be trained


def test_different_scales_targets_and_ranks_are_exact(tiny_model_dir, lora, tmp_path, run):
    """Each expert alone is its adapter: gates are put to it by hand."""
    sources = [
        lora("a", r=2, lora_alpha=5, seed=0),
        lora("b", r=3, lora_alpha=3, seed=1, target_modules=["q_proj", "up_proj"]),
    ]
    printed = run("convert", *sources, *flags(tiny_model_dir, tmp_path / "out", "--num_experts", "2,", "--top_k", 1))
    assert "does not adapt 4 linears" in printed
    for expert, source in enumerate(sources):
        mixture = load(tiny_model_dir, tmp_path / "out")
        for name, module in mixture.named_modules():
            if name.endswith("_proj") and hasattr(module, "mola_A"):
                for part in (module.mola_A["default"], module.mola_B["default"]):
                    part.data[:] = part.data[expert].clone()
        torch.testing.assert_close(logits(mixture), logits(load(tiny_model_dir, source)), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_the_frozen_weights_of_an_adapted_head_are_left_out(tiny_model_dir, lora, tmp_path, run):
    source = lora("a", target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(f"{source}/adapter_model.safetensors")
    run("convert", source, *flags(tiny_model_dir, tmp_path / "out", "--num_experts", "2,", "--noise", 0))
    expected = logits(load(tiny_model_dir, source))
    torch.testing.assert_close(logits(load(tiny_model_dir, tmp_path / "out")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("turned", [False, *slow(True)])
def test_negative_scales(turned, tiny_model_dir, lora, tmp_path, run):
    sources = [lora("a", lora_alpha=-8), lora("b", lora_alpha=4, seed=1)][:: -1 if turned else 1]
    run("convert", *sources, *flags(tiny_model_dir, tmp_path / "out", "--num_experts", "2,"))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    scale = 4 / 8
    for expert, source in enumerate(sources):
        own = load_file(f"{source}/adapter_model.safetensors")
        name = "base_model.model.model.layers.1.mlp.down_proj"
        update = own[f"{name}.lora_B.weight"] @ own[f"{name}.lora_A.weight"] * (-1 if "/a" in source[-2:] else scale)
        found = tensors[f"{name}.mola_B"][expert].t() @ tensors[f"{name}.mola_A"][expert] * scale
        torch.testing.assert_close(found, update)


def test_copies_are_noised_by_a_seed(tiny_model_dir, lora, tmp_path):
    source = lora("a", r=2)
    found = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        options = ConvertOptions(
            source, str(tmp_path / name), "lora", None, str(tiny_model_dir), num_experts="3,", seed=seed
        )
        assert convert(options).num_experts["model.layers.0.self_attn.q_proj"] == 3
        found[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.mola_A"
    assert all(torch.equal(found["one"][name], found["again"][name]) for name in found["one"])
    first, copies = found["one"][key][0], found["one"][key][1:]
    assert torch.equal(first, found["other"][key][0])
    assert not torch.equal(copies, found["other"][key][1:])
    relative = (copies - first).std() / first.std()
    assert 0.05 < relative < 0.2


def test_fitted_routers_choose_the_own_adapter(tiny_model_dir, lora, tmp_path, run):
    """Two kinds of rows that share no word: each token's first choice is the expert of its own adapter."""
    data = []
    for number, (question, output) in enumerate((("aaa aa a", "aaaa"), ("zzz zz z", "zzzz"))):
        path = tmp_path / f"{number}.json"
        rows = [{"id": str(i), "instruction": question * (1 + i % 3), "input": "", "output": output} for i in range(30)]
        path.write_text(json.dumps(rows))
        data.append(path)
    sources = [lora("a", r=2, seed=0), lora("b", r=2, seed=1)]
    more = ["--num_experts", "3,", "--top_k", 1, "--data", *data, "--task", "sample", "--split", "train"]
    printed = run("convert", *sources, *flags(tiny_model_dir, tmp_path / "out", *more, "--dtype", "float32"))
    share = float(printed.split("correct first choice for ")[1].split("%")[0])
    # The prompt around the question is the same in both.
    assert share > 55
    assert load(tiny_model_dir, tmp_path / "out").peft_config["default"].top_k == 1


def test_routers_are_fitted_in_the_prompts_of_the_adapters(tiny_model_dir, lora, tmp_path, run, monkeypatch, caplog):
    path = tmp_path / "data.json"
    row = {"instruction": "Why?", "input": "", "output": "So."}
    path.write_text(json.dumps([{"id": str(number), **row} for number in range(4)]))
    sources = [lora("a", r=2), lora("b", r=2, seed=1)]
    seen = []
    monkeypatch.setattr("mola.models.prompts.template_for", lambda *how: seen.append(how) or template_for(*how))
    more = ["--num_experts", "3,", "--data", path, path, "--task", "sample", "--split", "train", "--dtype", "float32"]
    for trained, expected in ((("meta", "meta"), "meta"), (("meta", "vigogne"), "alpaca_short")):
        for source, template in zip(sources, trained, strict=True):
            (Path(source) / "prompts.json").write_text(json.dumps({"template": template}))
        seen.clear()
        run("convert", *sources, *flags(tiny_model_dir, tmp_path / expected, *more))
        used = sources if expected == "meta" else [None, None]  # the folders whose own chat template would be used
        assert [(name, source) for name, _, source in seen] == [(expected, source) for source in used]
        assert ("were trained with different prompt" in caplog.text) is (expected == "alpaca_short")


def test_solved_router_is_least_squares_with_the_wanted_margin():
    torch.manual_seed(0)
    data = [torch.randn(40, 5, dtype=torch.float64) + 2 * torch.randn(5, dtype=torch.float64) for _ in range(3)]
    means = torch.stack([x.mean(0) for x in data])
    found = solve_router(sum(x.t() @ x / len(x) for x in data), means)
    logits = means @ found.t()
    lead = torch.stack([row[i] - (row.sum() - row[i]) / 2 for i, row in enumerate(logits)]).mean()
    torch.testing.assert_close(lead, torch.tensor(4.0, dtype=torch.float64))
    # Least squares with the ridge as further rows, one expert after the other.
    x = torch.cat(data) / 40**0.5
    lam = 1e-3 * ((x.t() @ x).diagonal().mean() + (x.t() @ x).diagonal() / 10)
    rows = torch.cat([x, lam.sqrt().diag()])
    for expert in range(3):
        targets = torch.cat([torch.full((40,), 1.0 if i == expert else -1.0) for i in range(3)]).double() / 40**0.5
        wanted = torch.linalg.lstsq(rows, torch.cat([targets, torch.zeros(5, dtype=torch.float64)])[:, None]).solution
        torch.testing.assert_close(found[expert] / found[expert].norm(), wanted[:, 0] / wanted.norm())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "`num_experts` must be given with --from lora"),
        (["--num_experts", "1,"], "`num_experts` must be at least 2, one for each adapter: 'model.layers.0"),
        (["--num_experts", "1234"], "has 1. Raise it, such as --num_experts 2, or leave adapters out"),
        (["--num_experts", "2,", "--top_k", "3"], "top_k"),
        (["--num_experts", "2,", "--noise", "-1"], "`noise` must be at least 0"),
        (["--num_experts", "2,", "--noise", "0.3"], "`noise` (0.3) is for copies"),
        (["--num_experts", "2,", "--r", "4"], "`r` is only for --to lora, got 4"),
        (["--num_experts", "2,", "--task", "sample"], "`task` has no effect without `data`: got 'sample'"),
        (["--num_experts", "2,", "--data", __file__], "one file for each of at least two adapters"),
    ],
)
def test_wrong_options(no_weights_dir, lora, tmp_path, refusal, more, message):
    sources = [lora("a", seed=0), lora("b", seed=1)]
    assert message in refusal("convert", *sources, *flags(no_weights_dir, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_adapters_that_experts_cannot_express(no_weights_dir, lora, tmp_path, refusal):
    source = lora("a")
    path = Path(source, "adapter_config.json")
    settings = json.loads(path.read_text())
    for change, message in (
        ({"use_dora": True}, "`source` must be a plain LoRA: `use_dora` is set"),
        ({"bias": "all"}, "`source` must be a plain LoRA: `bias` is set"),
        ({"modules_to_save": ["lm_head"]}, "`source` must be a plain LoRA: `modules_to_save` is set"),
        ({"trainable_token_indices": [1, 2]}, "`source` must be a plain LoRA: `trainable_token_indices` is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base weight"),
    ):
        path.write_text(json.dumps(settings | change))
        assert message in refusal("convert", source, *flags(no_weights_dir, tmp_path / "out", "--num_experts", "2,"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut_off(folder / WEIGHTS, 0.9), "cannot be read as tensors"),
        (lambda folder: change_tensors(folder, lambda found: next(iter(found.values())).fill_(float("nan"))), "finite"),
    ],
)
def test_damaged_loras(no_weights_dir, lora, tmp_path, refusal, damage, message):
    source = lora("a")
    damage(Path(source))
    words = flags(no_weights_dir, tmp_path / "out", "--num_experts", "2,")
    assert message in refusal("convert", source, *words)
    assert not (tmp_path / "out").exists()


def test_sources_that_do_not_fit(no_weights_dir, mixture, lora, tmp_path, refusal):
    words = flags(no_weights_dir, tmp_path / "out", "--num_experts", "2,")
    assert "`source` must be a LoRA of PEFT" in refusal("convert", mixture, *words)
    source = lora("changed")
    path = Path(source, "adapter_config.json")
    settings = json.loads(path.read_text())
    for change, message in (
        ({"r": 16}, "has shape (8, 32)"),
        ({"target_modules": ["q_proj"]}, "belongs to no adapted linear"),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "is missing"),
        ({"target_modules": ["nothing"]}, "does not fit the base model"),
        ({"lora_alpha": 1e400}, "must adapt linears with a finite scale"),
    ):
        path.write_text(json.dumps(settings | change))
        assert message in refusal("convert", source, *words)
