"""Adapters of MoE-PEFT: what is read gives MoE-PEFT's outputs, what cannot be expressed is refused."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaForCausalLM

from mola import MolaError, load_model
from mola.checkpoints.adapter_folder import read_tensors
from mola.checkpoints.moe_peft import read_moe_peft
from mola.cli import main
from mola.exporting.convert import ConvertOptions, convert
from mola.models.adapters import check_adapter
from tests.checkpoints.moe_peft_reference import LLAMA_SIZES, Llama, make_settings, make_tensors, write
from tests.grids import slow

LINEARS = [f"model.layers.{layer}.{name}" for layer in range(4) for name in LLAMA_SIZES]
Q = "mola.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base_weights(tiny_model_dir):
    return LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def base_logits(tiny_model_dir):
    return logits(tiny_model_dir)


def token_ids():
    return torch.randint(2, 258, (2, 11), generator=torch.Generator().manual_seed(3))


def convert_moe_peft(source, base_model, output):
    return convert(ConvertOptions(str(source), str(output), source_format="moe_peft", base_model=str(base_model)))


@torch.no_grad()
def logits(base_model, adapter=None):
    """In float64, so that a difference is one of the formula: random layers enlarge float32's rounding to 1e-5."""
    model = load_model(base_model, adapter, dtype="float32", device="cpu").double()
    return model(input_ids=token_ids()).logits


# ---------------------------------------------------------------------- outputs


@torch.no_grad()
def test_the_plain_llama_computes_what_transformers_computes(tiny_model_dir, base_weights):
    torch.testing.assert_close(
        Llama(base_weights, (4, 2)).logits(token_ids()), logits(tiny_model_dir), atol=1e-5, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 3, "top_k": 2, "r": 2, "target_modules": ["q_proj", "down_proj"]},
        {"num_experts": 1, "top_k": 1, "task_type": None, "routing_strategy": ...},
        {"use_rslora": True, "use_dora": True, "r": 5, "lora_alpha": 4, "task_type": "QUESTION_ANS"},
    ],
    ids=str,
)
def test_converted_adapter_gives_the_logits_of_moe_peft(tmp_path, tiny_model_dir, base_weights, base_logits, changes):
    settings = make_settings(**changes)
    tensors = make_tensors(settings)
    write(tmp_path / "theirs", settings, tensors)
    convert_moe_peft(tmp_path / "theirs", tiny_model_dir, tmp_path / "ours")
    expected = Llama(base_weights, (4, 2), settings, tensors).logits(token_ids())
    found = logits(tiny_model_dir, tmp_path / "ours")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # The experts matter, and so does how they are weighted: the comparison above could have failed.
    assert (found - base_logits).abs().max() > 0.1
    if not changes:
        other = Llama(base_weights, (4, 2), {**settings, "lora_alpha": settings["lora_alpha"] * 1.01}, tensors)
        assert (found - other.logits(token_ids())).abs().max() > 1e-4


# ---------------------------------------------------------------------- tensors and settings


@hypothesis_settings(max_examples=25, deadline=None)
@given(
    num_layers=st.integers(1, 3),
    num_experts=st.integers(1, 12),
    r=st.integers(1, 3),
    names=st.sets(st.sampled_from(sorted(LLAMA_SIZES)), min_size=1),
    prefix=st.sampled_from(["model.", "model.language_model.", ""]),
)
def test_every_tensor_arrives_unchanged(tmp_path_factory, num_layers, num_experts, r, names, prefix):
    short = [name.rpartition(".")[2] for name in sorted(names)]
    settings = make_settings(short, num_experts=num_experts, top_k=1, r=r)
    tensors = make_tensors(settings, num_layers)
    folder = write(tmp_path_factory.mktemp("theirs"), settings, tensors)
    linears = [f"{prefix}layers.{layer}.{name}" for layer in range(num_layers) for name in LLAMA_SIZES]
    config, found, _, _ = read_moe_peft(folder, [*linears, "lm_head"])
    assert (config.num_experts, config.top_k, config.r) == (num_experts, 1, r)
    assert config.target_modules == set(short)
    back = {}
    for layer in range(num_layers):
        for name in names:
            key, theirs = f"base_model.model.{prefix}layers.{layer}.{name}", f"mola.layers.{layer}.{name}"
            for expert in range(num_experts):
                back[f"{theirs}.experts.{expert}.lora_A.weight"] = found[f"{key}.mola_A"][expert]
                back[f"{theirs}.experts.{expert}.lora_B.weight"] = found[f"{key}.mola_B"][expert].t()
            if num_experts > 1:
                back[f"{theirs}.moe_gate.weight"] = found.pop(f"{key}.mola_router")
            del found[f"{key}.mola_A"], found[f"{key}.mola_B"]
    assert not found
    kept = {key: value for key, value in tensors.items() if num_experts > 1 or "moe_gate" not in key}
    assert back.keys() == kept.keys()
    assert all(torch.equal(back[key], kept[key]) for key in kept)
    assert {(value.dtype, value.requires_grad) for value in back.values()} == {(torch.float32, False)}


def test_experts_keep_half_precision_and_routers_are_float32(tmp_path):
    settings = make_settings()
    tensors = {key: value.detach().bfloat16() for key, value in make_tensors(settings).items()}
    found = read_moe_peft(write(tmp_path / "a", settings, tensors), LINEARS).tensors
    assert {key.rpartition(".")[2]: value.dtype for key, value in found.items()} == {
        "mola_A": torch.bfloat16,
        "mola_B": torch.bfloat16,
        "mola_router": torch.float32,
    }


@pytest.mark.parametrize("r", [1, 3, 10])
def test_rslora_keeps_its_scale(tmp_path, r):
    settings = make_settings(["q_proj"], r=r, lora_alpha=20, use_rslora=True)
    adapter = read_moe_peft(write(tmp_path / "a", settings, make_tensors(settings)), LINEARS)
    assert adapter.config.lora_alpha / r == pytest.approx(20 / math.sqrt(r), rel=1e-15)
    assert "use_rslora" in adapter.notes[0]


FAMILIES = {
    "phi": {
        **{f"self_attn.{name}": (32, 32) for name in ("q_proj", "k_proj", "v_proj", "dense")},
        **{"mlp.fc1": (32, 48), "mlp.fc2": (48, 32)},
    },
    "phi3": {
        **{"self_attn.qkv_proj": (32, 96), "self_attn.o_proj": (32, 32)},
        **{"mlp.gate_up_proj": (32, 96), "mlp.down_proj": (48, 32)},
    },
    **{
        family: {
            **{f"self_attn.{name}": (32, 32) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
            **{"mlp.gate_proj": (32, 48), "mlp.up_proj": (32, 48), "mlp.down_proj": (48, 32)},
        }
        for family in ("mistral", "qwen2", "gemma", "gemma2")
    },
}


@pytest.mark.parametrize("family", ["phi", "phi3", "mistral", *slow("qwen2", "gemma", "gemma2")])
def test_names_of_all_families_but_chatglm(tmp_path, family):
    config = AutoConfig.for_model(
        family,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.save_pretrained(tmp_path / "base")
    sizes = FAMILIES[family]
    settings = make_settings([name.rpartition(".")[2] for name in sizes])
    write(tmp_path / "theirs", settings, make_tensors(settings, 2, sizes))
    report = convert_moe_peft(tmp_path / "theirs", tmp_path / "base", tmp_path / "ours")
    assert len(read_tensors(tmp_path / "ours")) == 3 * 2 * len(sizes)
    assert set(report.target_modules) == {name.rpartition(".")[2] for name in sizes}


def test_report_says_what_was_found(tmp_path, tiny_model_dir):
    settings = make_settings(
        ["q_proj", "fc1", "dense"], use_rslora=True, use_dora=True, lora_init="gaussian", num_experts=3, task_type=None
    )
    tensors = make_tensors(settings)
    write(tmp_path / "theirs", settings, tensors)
    report = convert_moe_peft(tmp_path / "theirs", tiny_model_dir, tmp_path / "ours")
    assert (report.num_experts, report.top_k, report.r) == ([3] * 4, [2] * 4, [3] * 4)
    text = str(report)
    for line in (
        "layers            4",
        "experts per layer 3 everywhere",
        "top_k             2 everywhere",
        "r                 3 everywhere",
        "linears           q_proj",
        "note              use_rslora: lora_alpha 7 / sqrt(r)",
        "note              use_dora: ",
        "note              task_type: None is written as CAUSAL_LM",
        "the base model has no dense, fc1;",
        "note              base model: owner/tiny in the source",
        "write them down: lora_init = gaussian",
    ):
        assert line in text, line
    assert "left out" not in text
    saved = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (saved["top_k"], saved["num_experts"], saved["target_modules"]) == (2, 3, ["q_proj"])
    assert saved["task_type"] == "CAUSAL_LM"


def test_report_names_routers_left_out(tmp_path, tiny_model_dir):
    settings = make_settings(["q_proj"], num_experts=1, top_k=1)
    write(tmp_path / "theirs", settings, make_tensors(settings))
    report = convert_moe_peft(tmp_path / "theirs", tiny_model_dir, tmp_path / "ours")
    assert "note              left out: 4 routers" in str(report)
    assert len(read_tensors(tmp_path / "ours")) == 8


# ---------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "MIXLORA"}, "`peft_type` .* must be 'MOLA', got 'MIXLORA'"),
        ({"peft_type": "LORA"}, "PEFT's own format"),
        ({"routing_strategy": "mixlora-dynamic"}, "`routing_strategy` .* must be 'mola', got 'mixlora-dynamic'"),
        ({"bias": "all"}, "`bias` .* must be 'none', got 'all'"),
        ({"top_k": ...}, r"\['top_k'\] missing"),
        ({"router_jitter_noise": 0.0}, r"\['router_jitter_noise'\] unknown.* needs no conversion"),
        ({"r": 0}, "`r` .* got 0"),
        ({"lora_alpha": -1}, "`lora_alpha` must be a number above 0, got -1"),
        ({"lora_dropout": 1.0}, "`lora_dropout` must be a number at least 0 and below 1"),
        ({"task_type": "SEQ_CLS"}, "`task_type` .* got 'SEQ_CLS'. .* classifier cannot be converted"),
        ({"target_modules": ["q_proj"]}, "with experts that it does not name"),
    ],
)
def test_settings_that_can_not_be_expressed_are_refused(tmp_path, changes, message):
    folder = write(tmp_path / "a", make_settings(**changes), make_tensors(make_settings()))
    with pytest.raises(MolaError, match=message):
        read_moe_peft(folder, LINEARS)


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        (f"{Q}.moe_gate", {}, "4 experts and no router"),
        (f"{Q}.experts.2.lora_B", {}, "numbered from 0 without a gap"),
        (f"{Q}.experts", {}, "a router but no experts"),
        (".q_proj.", {}, r"no linears with experts that it does not name, \['q_proj'\] without experts"),
        (None, {"classifier": torch.zeros(2, 32)}, "'classifier' is no key"),
        (None, {f"{Q}.lora_A.weight": torch.zeros(3, 32)}, "is no key of MoE-PEFT's mola format"),
        (None, {"mixlora.layers.0.mlp.moe_gate.weight": torch.zeros(4, 32)}, "is no key of MoE-PEFT's"),
    ],
)
def test_broken_weights_are_refused(tmp_path, remove, add, message):
    settings = make_settings()
    tensors = make_tensors(settings)
    kept = {key: value for key, value in tensors.items() if remove is None or remove not in key}
    assert remove is None or len(kept) < len(tensors)
    folder = write(tmp_path / "a", settings, {**kept, **add})
    with pytest.raises(MolaError, match=message):
        read_moe_peft(folder, LINEARS)


def test_chatglm_names_are_refused_with_the_reason(tmp_path):
    sizes = {"self_attn.qkv_proj": (32, 96), "self_attn.dense": (32, 32)}
    settings = make_settings(["qkv_proj", "dense"])
    folder = write(tmp_path / "a", settings, make_tensors(settings, 4, sizes))
    linears = [f"transformer.encoder.layers.{layer}.self_attention.query_key_value" for layer in range(4)]
    with pytest.raises(MolaError, match=r"one linear 'layers.0.self_attn.qkv_proj'.* none.*ChatGLM"):
        read_moe_peft(folder, linears)


def test_a_name_found_twice_is_refused(tmp_path):
    settings = make_settings(["q_proj"])
    folder = write(tmp_path / "a", settings, make_tensors(settings))
    with pytest.raises(MolaError, match="2 of them .*vision.layers.0.self_attn.q_proj"):
        read_moe_peft(folder, [*LINEARS, "vision.layers.0.self_attn.q_proj"])


def test_other_base_models_are_refused_before_writing(tmp_path, tiny_model_dir):
    settings = make_settings()
    config = json.loads((tiny_model_dir / "config.json").read_text())
    source = write(tmp_path / "theirs", settings, make_tensors(settings))
    fewer = write(tmp_path / "fewer", make_settings(num_experts=3), make_tensors(settings))
    with pytest.raises(MolaError, match="does not fit the model: .* has shape"):
        convert_moe_peft(fewer, tiny_model_dir, tmp_path / "ours")
    for name, changes, message in (
        ("wider", {"intermediate_size": 64}, "does not fit the model: .*mlp.* has shape"),
        ("deeper", {"num_hidden_layers": 5}, r"tensors are missing .*layers\.4"),
        ("flatter", {"num_hidden_layers": 3}, "must have one linear 'layers.3"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(MolaError, match=message):
            convert_moe_peft(source, tmp_path / name, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


# ---------------------------------------------------------------------- unconverted, given as adapter


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        (["evaluate", "--task", "sample", "--data", "data.json"], {}),
        (["generate", "--instruction", "Name a metal."], {"routing_strategy": ..., "use_rslora": True}),
        (["train", "--task", "sample", "--data", "data.json", "--output"], {}),
    ],
    ids=["evaluate", "generate", "train"],
)
def test_an_unconverted_adapter_gives_the_command_that_converts_it(
    tmp_path, tiny_model_dir, capsys, monkeypatch, command, changes
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text("[]")
    settings = make_settings(["q_proj"], **changes)
    folder = write(tmp_path / "my theirs", settings, make_tensors(settings))
    command = [*command, str(tmp_path / "run")] if command[-1] == "--output" else command
    assert main([*command, "--base_model", str(tiny_model_dir), "--adapter", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"mola convert '{folder}' --from moe_peft --base_model MODEL --output NEW_FOLDER" in error
    assert "Loading weights" not in error


def test_an_unconverted_adapter_of_the_research_code_gives_the_command(tmp_path):
    write(tmp_path / "published", {"peft_type": "LORA", "r": [2, 2]}, {})
    with pytest.raises(MolaError, match=r"research code, .* --from published .* --top_k K"):
        check_adapter(tmp_path / "published")


@pytest.mark.parametrize("settings", [{"peft_type": "LORA", "r": 8}, {"peft_type": "MOLA", "r": [2], "top_k": 2}])
def test_adapters_that_peft_loads_need_no_conversion(tmp_path, settings):
    assert check_adapter(write(tmp_path / "a", settings, {})) == settings


def test_a_converted_adapter_needs_no_conversion(tmp_path, tiny_model_dir):
    settings = make_settings(["q_proj"])
    write(tmp_path / "theirs", settings, make_tensors(settings))
    convert_moe_peft(tmp_path / "theirs", tiny_model_dir, tmp_path / "ours")
    assert check_adapter(tmp_path / "ours")["peft_type"] == "MOLA"
    with pytest.raises(MolaError, match="needs no conversion"):
        convert_moe_peft(tmp_path / "ours", tiny_model_dir, tmp_path / "again")
