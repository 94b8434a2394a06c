import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, VBLoRAConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForCausalLM

from mola import MolaConfig
from mola.errors import MolaError
from mola.models.adapters import attach, check_adapter
from mola.models.devices import resolve_device, resolve_dtype
from mola.models.loading import load_model
from mola.models.quantization import Quantization, check_quantized_base
from tests.damage import change_tensors

IDS = torch.tensor([[0, 5, 80, 33, 60]])


def save_adapter(model_dir, folder, config, seed=1):
    """A trained-looking adapter: every tensor random, so that loading the wrong values shows."""
    torch.manual_seed(seed)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def mola_adapter(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mola-adapter")
    config = MolaConfig(r=2, num_experts=[1, 2, 3, 4], top_k=[1, 1, 2, 2], lora_alpha=4, task_type="CAUSAL_LM")
    return folder, save_adapter(tiny_model_dir, folder, config)


@pytest.fixture(scope="module")
def lora_adapter(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora-adapter")
    return folder, save_adapter(tiny_model_dir, folder, LoraConfig(r=2, task_type="CAUSAL_LM"))


def test_auto_dtype_gives_a_reason_that_names_it():
    for device, allowed in (("cpu", (torch.bfloat16, torch.float32)), ("mps", (torch.float16,))):
        dtype, reason = resolve_dtype("auto", device)
        assert dtype in allowed
        assert str(dtype).removeprefix("torch.") in reason


def test_named_dtypes_are_used_and_others_refused():
    assert resolve_dtype("float16", "cpu")[0] is torch.float16
    with pytest.raises(MolaError, match="fp16"):
        resolve_dtype("fp16", "cpu")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_unknown_device_is_refused(device):
    with pytest.raises(MolaError, match=device):
        resolve_device(device)


def test_base_model_is_ready_for_inference(tiny_model_dir, tiny_model):
    model = load_model(tiny_model_dir, dtype="float32", device="cpu", attn_implementation="eager")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, tiny_model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damage", ["pointer", "cut", "sizes"])
def test_damaged_weights_of_a_base_give_one_error(damage, tiny_model_dir, tmp_path):
    """Weights of a copy without Git LFS, weights that were cut off, and weights of another configuration."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "base")
    weights = folder / "model.safetensors"
    if damage == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    with pytest.raises(MolaError, match="`base_model` cannot be loaded: .*copy the model again"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("kind", ["mola_adapter", "lora_adapter"])
def test_adapter_gives_the_logits_it_was_saved_with(kind, tiny_model_dir, request):
    folder, expected = request.getfixturevalue(kind)
    model = load_model(tiny_model_dir, folder, dtype="float32", device="cpu")
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_base_keeps_exact_float32_routers(tiny_model_dir, mola_adapter):
    folder, _ = mola_adapter
    saved = load_file(folder / "adapter_model.safetensors")
    model = load_model(tiny_model_dir, folder, dtype="bfloat16", device="cpu")
    routers = {
        name.replace(".default", ""): parameter for name, parameter in model.named_parameters() if "mola_router" in name
    }
    assert routers
    for name, parameter in routers.items():
        torch.testing.assert_close(parameter, saved[name], rtol=0, atol=0, check_device=False)
    others = [parameter for name, parameter in model.named_parameters() if "mola_router" not in name]
    assert {parameter.dtype for parameter in others} == {torch.bfloat16}


@pytest.mark.parametrize("names", [("a", "b"), ("lora", "lora_2")])
def test_several_adapters_load_by_name(names, tiny_model_dir, mola_adapter, tmp_path):
    folder, expected = mola_adapter
    config = MolaConfig(r=3, num_experts=2, top_k=1, task_type="CAUSAL_LM")
    expected_second = save_adapter(tiny_model_dir, tmp_path, config, seed=2)
    model = load_model(tiny_model_dir, dict(zip(names, (folder, tmp_path), strict=True)), "float32", "cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        model.set_adapter(names[1])
        torch.testing.assert_close(model(IDS).logits, expected_second, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_fails_leaves_the_base_model_unchanged(tiny_model_dir, mola_adapter, lora_adapter, tmp_path):
    base = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    kinds, attributes, expected = [type(each) for each in base.modules()], set(vars(base)), base(IDS).logits
    for number, (folder, _) in enumerate((mola_adapter, lora_adapter)):
        broken = shutil.copytree(folder, tmp_path / str(number))
        change_tensors(broken, lambda tensors: tensors.pop(sorted(tensors)[0]))
        with pytest.raises(MolaError, match="missing"):
            attach(base, "default", str(broken))
        assert [type(each) for each in base.modules()] == kinds
        assert set(vars(base)) == attributes
        assert torch.equal(base(IDS).logits, expected)
    assert attach(base, "default", str(mola_adapter[0])).active_adapter == "default"


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        VBLoRAConfig(task_type="CAUSAL_LM", r=2, num_vectors=8, vector_length=4, target_modules=["q_proj"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods_of_peft_load(config, tiny_model_dir, tmp_path):
    expected = save_adapter(tiny_model_dir, tmp_path, config)
    found = load_model(tiny_model_dir, tmp_path, "float32", "cpu")(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_adapters_of_two_methods_are_refused_before_weights_load(no_weights_dir, mola_adapter, lora_adapter):
    with pytest.raises(MolaError, match=r"`adapter` must be of one method: got {'a': 'MOLA', 'b': 'LORA'}"):
        load_model(no_weights_dir, {"a": mola_adapter[0], "b": lora_adapter[0]})


def test_names_without_the_prefix_of_peft_are_refused_before_weights_load(no_weights_dir, mola_adapter, tmp_path):
    """Transformers saves such names with `save_pretrained(..., save_peft_format=False)`."""
    folder = shutil.copytree(mola_adapter[0], tmp_path / "adapter")

    def rename(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)

    change_tensors(folder, rename)
    with pytest.raises(MolaError, match="lack 'base_model.model.' in front"):
        load_model(no_weights_dir, folder, "float32", "cpu")


def test_a_lora_of_another_size_is_refused_before_weights_load(no_weights_dir, tmp_path):
    wide = LlamaForCausalLM(AutoConfig.from_pretrained(no_weights_dir, hidden_size=64, intermediate_size=96))
    get_peft_model(wide, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(MolaError, match=r"the adapter does not fit: .*q_proj.*expected \(2, 32\)"):
        load_model(no_weights_dir, tmp_path)


def test_an_adapter_of_another_depth_names_the_model_to_pass(no_weights_dir, tmp_path):
    deep = LlamaForCausalLM(AutoConfig.from_pretrained(no_weights_dir, num_hidden_layers=6))
    get_peft_model(deep, MolaConfig(num_experts="222444", task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "owner/deep"}))
    layers = AutoConfig.from_pretrained(no_weights_dir).num_hidden_layers
    with pytest.raises(MolaError) as error:
        load_model(no_weights_dir, tmp_path)
    assert "was trained on 'owner/deep', and" in str(error.value)
    end = f"(trained on 6 layers, the model has {layers}). Pass --base_model owner/deep."
    assert str(error.value).endswith(f"which the adapter does not fit {end}")


def test_the_first_of_several_adapters_is_active_in_tied_tokens_too(no_weights_dir, tmp_path):
    torch.manual_seed(0)
    tied = LlamaForCausalLM(AutoConfig.from_pretrained(no_weights_dir, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path / "base")
    for name, tokens in (("a", None), ("b", [3, 5])):
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(tmp_path / "base"),
            MolaConfig(num_experts=2, r=2, trainable_token_indices=tokens, task_type="CAUSAL_LM"),
        )
        for key, parameter in model.named_parameters():
            if "trainable_tokens_delta" in key:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / name)
    alone, both = (
        load_model(tmp_path / "base", adapter, "float32", "cpu")
        for adapter in (tmp_path / "a", {name: tmp_path / name for name in "ab"})
    )
    torch.testing.assert_close(both(IDS).logits, alone(IDS).logits)


def test_adapter_of_another_base_model_gives_one_warning(tiny_model_dir, lora_adapter, tmp_path, caplog):
    folder = tmp_path / "adapter"
    shutil.copytree(lora_adapter[0], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "owner/another-model"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, logger="mola"):
        load_model(tiny_model_dir, folder, "float32", "cpu")
        assert len([r for r in caplog.records if "owner/another-model" in r.getMessage()]) == 1
        caplog.clear()
        config["base_model_name_or_path"] = f"/elsewhere/{tiny_model_dir.name}"
        (folder / "adapter_config.json").write_text(json.dumps(config))
        load_model(tiny_model_dir, folder, "float32", "cpu")
    assert not [r for r in caplog.records if "trained on" in r.getMessage()]


def test_without_a_base_model_the_recorded_one_is_loaded(mola_adapter):
    folder, expected = mola_adapter
    with torch.no_grad():
        torch.testing.assert_close(load_model(adapter=folder, dtype="float32", device="cpu")(IDS).logits, expected)


def test_a_different_base_that_does_not_fit_is_named(
    mola_adapter, lora_adapter, small_model_dir, tiny_model_dir, tmp_path
):
    AutoConfig.from_pretrained(tiny_model_dir, hidden_size=16).save_pretrained(tmp_path / "narrow")
    for adapter, other in ((mola_adapter[0], small_model_dir), (lora_adapter[0], tmp_path / "narrow")):
        said = f"^`adapter` '{adapter}' was trained on '{tiny_model_dir}', and `base_model` '{other}' is a different"
        with pytest.raises(MolaError, match=said):
            load_model(other, adapter, "float32", "cpu")


def test_a_base_model_with_an_adapter_in_its_folder_gives_a_warning(
    tiny_model_dir, mola_adapter, lora_adapter, tmp_path, caplog
):
    """Transformers loads both. A second adapter on top is refused."""
    adapter, expected = mola_adapter
    folder = tmp_path / "both"
    shutil.copytree(tiny_model_dir, folder)
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    with caplog.at_level(logging.WARNING):
        model = load_model(folder, dtype="float32", device="cpu")
    assert "holds an adapter too" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(MolaError, match="has one already"):
        load_model(folder, lora_adapter[0], dtype="float32", device="cpu")


def test_folder_without_adapter_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(MolaError, match=r"no adapter_config\.json"):
        load_model(tiny_model_dir, tmp_path)
    with pytest.raises(
        MolaError, match=r"'me/my-adapter', no such folder.*hf download me/my-adapter --local-dir my-adapter"
    ):
        load_model(tiny_model_dir, "me/my-adapter")
    with pytest.raises(MolaError, match=r"no such folder\. Pass the folder that training or `mola convert` wrote\.$"):
        check_adapter(tmp_path / "missing")


def test_adapter_without_weights_is_refused(lora_adapter, tmp_path):
    shutil.copy(lora_adapter[0] / "adapter_config.json", tmp_path)
    with pytest.raises(MolaError, match="holds neither adapter_model.safetensors nor adapter_model.bin"):
        check_adapter(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("{not json", "cannot be read"), ("[]", "must hold an object"), ("{}", "`peft_type` None")]
)
def test_adapter_with_broken_configuration_is_refused(lora_adapter, tmp_path, content, message):
    shutil.copytree(lora_adapter[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(MolaError, match=message):
        check_adapter(tmp_path)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
@pytest.mark.parametrize("kind", ["mola_adapter", "lora_adapter"])
def test_tensors_that_do_not_match_are_refused(kind, change, tiny_model_dir, tmp_path, request):
    shutil.copytree(request.getfixturevalue(kind)[0], tmp_path, dirs_exist_ok=True)

    def leave_out_or_add(tensors):
        name = sorted(tensors)[0]
        tensor = tensors.pop(name)
        if change == "unexpected":
            tensors[name] = tensor
            tensors[name.replace("layers.0", "layers.40")] = tensor.clone()

    change_tensors(tmp_path, leave_out_or_add)
    with pytest.raises(MolaError, match=r"`adapter` does not .*layers\.(0|40)"):
        load_model(tiny_model_dir, tmp_path, "float32", "cpu")


@pytest.mark.parametrize("name", ["", "a.b"])
def test_adapter_names_pytorch_cannot_use_are_refused(name, tiny_model_dir, lora_adapter):
    with pytest.raises(MolaError, match="without dots"):
        load_model(tiny_model_dir, {name: lora_adapter[0]})


def test_bases_of_other_quantisations(monkeypatch, caplog):
    """A method that Transformers does not train is refused; an untested method gives a warning."""
    quantizer = SimpleNamespace(validate_environment=lambda **_: None, is_trainable=False)
    monkeypatch.setattr("mola.models.quantization.AutoHfQuantizer.from_config", lambda *_, **__: quantizer)
    config = SimpleNamespace(quantization_config={"quant_method": "hqq"})
    asked = "my-model", config, Quantization(), torch.device("cpu")
    with pytest.raises(MolaError, match="quantised with hqq, which Transformers cannot train through"):
        check_quantized_base(*asked, training=True)
    check_quantized_base(*asked)
    assert "not tested on base models quantised with hqq" in caplog.text
