"""What PEFT and Transformers users know works with mola too."""

import json

import accelerate
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mola
from mola import MolaConfig, MolaError, MolaLinear
from tests.damage import change_tensors
from tests.versions import needs

from .models import clone, random_config, tiny_llama, token_batch


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


@pytest.fixture(scope="module")
def inputs():
    batch = token_batch(padding=2)
    del batch["labels"]
    return batch


def logits(model, inputs):
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture
def saved(base, inputs, tmp_path):
    """An adapter on disk and the logits of the model it was saved from."""
    torch.manual_seed(5)
    model = get_peft_model(clone(base), random_config(lora_alpha=32, top_k=2))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model, inputs)


def test_a_new_adapter_changes_nothing(base, inputs, monkeypatch):
    model = get_peft_model(clone(base), MolaConfig(num_experts="2468", task_type="CAUSAL_LM"))
    torch.testing.assert_close(logits(model, inputs), logits(base, inputs), atol=1e-6, rtol=1e-5)
    # Another library than torch's makes other last bits.
    monkeypatch.setattr("mola.tuner.kernels.gemm.onednn_is_faster", lambda: False)
    assert torch.equal(logits(model, inputs), logits(base, inputs))


@pytest.mark.parametrize("given", [{"number_experts": [2, 2]}, {"top_k": [4]}], ids=str)
def test_lists_beside_a_saved_adapter_are_refused(base, saved, given):
    """As the research code wants them; PEFT drops them, or lets the file win."""
    with pytest.raises(MolaError, match="cannot be overridden when loading a saved adapter"):
        PeftModel.from_pretrained(base, saved[0], **given)


def test_peft_model_from_pretrained(base, inputs, saved):
    folder, expected = saved
    model = PeftModel.from_pretrained(clone(base), folder)
    assert torch.equal(logits(model, inputs), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_many_experts_everywhere_load_again(base, inputs, tmp_path):
    """One integer above 256 is taken for digits, so the list stays a list."""
    config = MolaConfig(num_experts="300,", r=1, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(clone(base), config)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(clone(base), tmp_path / "adapter")
    assert again.peft_config["default"].num_experts == [300] * 4
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_low_cpu_mem_usage_rounds_nothing(base, inputs, tmp_path):
    """On a base in half precision, whose dtype PEFT casts to once more after loading."""
    torch.manual_seed(5)
    half = clone(base).bfloat16()
    get_peft_model(clone(half), random_config()).save_pretrained(tmp_path)
    models = [PeftModel.from_pretrained(clone(half), tmp_path, low_cpu_mem_usage=low) for low in (False, True)]
    states = [{name: each for name, each in model.state_dict().items() if "mola_" in name} for model in models]
    assert {each.dtype for each in states[1].values()} == {torch.float32}
    assert all(torch.equal(each, states[1][name]) for name, each in states[0].items())
    assert torch.equal(*(logits(model, inputs) for model in models))


def test_load_adapter_of_transformers(base, inputs, saved):
    folder, expected = saved
    model = clone(base)
    model.load_adapter(str(folder))
    assert torch.equal(logits(model, inputs), expected)
    with pytest.warns(UserWarning, match="multiple adapters"):  # PEFT says so for every method
        model.load_adapter(str(folder), adapter_name="second")
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_frozen_adapters_stay_frozen_on_a_base_in_half_precision(low, base, inputs, saved):
    """PEFT casts experts to float32, and a parameter that is made anew is a trainable one."""
    folder, _ = saved
    model = PeftModel.from_pretrained(clone(base).bfloat16(), folder, low_cpu_mem_usage=low)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {p.dtype for name, p in model.named_parameters() if ".mola_" in name} == {torch.float32}
    model = get_peft_model(clone(base).bfloat16(), random_config())
    model.load_adapter(folder, "second", low_cpu_mem_usage=low)
    model.add_adapter("third", random_config(num_experts=3))
    trained = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"default"}
    model.set_adapter("second")
    trained = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"second"}


@needs("transformers", "5.16", "its positions ask for an autocast that this device has not")
def test_shapes_on_the_meta_device_are_those_of_the_base(base, inputs):
    model = get_peft_model(clone(base), random_config()).to("meta")
    ids = inputs["input_ids"].to("meta")
    for mode in (model.train, model.eval):
        mode()
        assert model(input_ids=ids).logits.shape == (*ids.shape, base.config.vocab_size)


def test_a_tensor_parallel_base_is_refused(base):
    """As Transformers marks its linears; nothing of shapes would tell."""
    model = clone(base)
    model.model.layers[1].self_attn.o_proj._hf_tp_plan = "rowwise"
    with pytest.raises(MolaError, match="must not be tensor-parallel: the weight of 'model.layers.1.self_attn.o_proj'"):
        get_peft_model(model, random_config())


def test_a_start_from_weights_that_cannot_be_unpacked_is_refused(base):
    model = clone(base)
    linear = model.model.layers[0].self_attn.q_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(MolaError, match="'principal' needs the base's weights: those of .*q_proj', a Linear"):
        get_peft_model(model, random_config(init_lora_weights="principal", num_experts=2, r=2))
    alone = get_peft_model(model, random_config(num_experts=1, top_k=1, target_modules=["q_proj"]))
    with pytest.raises(MolaError, match="Merging needs a plain floating-point base weight"):
        alone.merge_and_unload()


def test_routers_are_in_float32_whatever_the_default_is(base):
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = get_peft_model(clone(base).bfloat16(), random_config(), autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for name, p in model.named_parameters() if "mola_router" in name} == {torch.float32}


@pytest.mark.parametrize("num_experts", [1, 2])
def test_an_offloaded_base_is_refused(num_experts, inputs, tmp_path):
    """Accelerate brings the weights of modules that are called; experts had none, or random ones."""
    tiny_llama().save_pretrained(tmp_path / "base")
    parts = [
        "model.embed_tokens",
        "model.norm",
        "lm_head",
        "model.rotary_emb",
        *(f"model.layers.{i}" for i in range(3)),
    ]
    places = dict.fromkeys(parts, "cpu") | {"model.layers.3": "disk"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "off")
    settings = {"num_experts": num_experts, "top_k": 1}
    with pytest.raises(MolaError, match="the base model must not be offloaded: the weights of 'model.layers.3"):
        get_peft_model(base, random_config(**settings))
    adapted = get_peft_model(tiny_llama(), random_config(**settings)).eval()
    adapted = accelerate.cpu_offload(adapted, execution_device="cpu")
    with pytest.raises(MolaError, match="the experts are not in memory: the model was offloaded"):
        adapted(input_ids=inputs["input_ids"])


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_the_same_name_with_one_expert_leaves_no_router(tmp_path):
    """As when a cell of a notebook is run again with another number."""
    base = tiny_llama()
    get_peft_model(base, random_config(num_experts=4))
    get_peft_model(base, random_config(num_experts=1, top_k=1)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_configuration_that_is_written_before_the_weights_has_no_digest(base, tmp_path):
    """As Transformers' `save_pretrained` does it: the file that lies there will be another."""
    model = get_peft_model(clone(base), random_config())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["weights_sha256"]
    model.peft_config["default"].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["weights_sha256"] is None


def test_inject_adapter_in_model(base, inputs):
    model = inject_adapter_in_model(random_config(), clone(base))
    assert not torch.equal(logits(model, inputs), logits(base, inputs))
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(".mola_" in name for name in trained)
    assert len(trained) == 4 * 7 * 3


def test_two_adapters_at_once(base, inputs):
    model = get_peft_model(clone(base), random_config(), adapter_name="one")
    model.add_adapter("two", random_config(num_experts=3, top_k=1, r=2))
    with_one = logits(model, inputs)
    model.set_adapter("two")
    with_two = logits(model, inputs)
    assert not torch.equal(with_one, with_two)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(name.endswith(".two") for name in trainable)
    model.set_adapter("one")
    assert torch.equal(logits(model, inputs), with_one)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model, inputs)
    assert not torch.equal(both, with_one)
    assert not torch.equal(both, with_two)
    layer = next(module for module in model.modules() if isinstance(module, MolaLinear))
    x, sums = torch.randn(3, layer.in_features), []
    for names in (["one"], ["two"], ["one", "two"]):
        model.base_model.set_adapter(names)
        sums.append(layer(x) - layer.base_layer(x))
    torch.testing.assert_close(sums[0] + sums[1], sums[2], atol=1e-5, rtol=1e-5)


def test_two_adapters_are_saved_apart(base, inputs, tmp_path):
    model = get_peft_model(clone(base), random_config())
    model.add_adapter("other", random_config(num_experts="3-1"))
    model.set_adapter("other")
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(clone(base), tmp_path / "other")
    assert torch.equal(logits(again, inputs), expected)


def test_disable_adapter(base, inputs):
    model = get_peft_model(clone(base), random_config())
    before = logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(base, inputs))
    assert torch.equal(logits(model, inputs), before)


def test_every_attention_gives_the_same_logits(base, inputs):
    model = get_peft_model(clone(base), random_config())
    found = {}
    for name in ("eager", "sdpa"):
        model.base_model.model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        found[name] = logits(model, inputs)[inputs["attention_mask"].bool()]
    torch.testing.assert_close(found["eager"], found["sdpa"], atol=1e-5, rtol=1e-5)


def test_greedy_generation_with_and_without_cache(base, inputs):
    model = get_peft_model(clone(base), random_config()).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
    cached = model.generate(**prompt, **options)
    assert torch.equal(cached, model.generate(**prompt, **options, use_cache=False))


def test_delete_adapter(base, inputs):
    model = get_peft_model(clone(base), random_config(), adapter_name="one")
    with_one = logits(model, inputs)
    model.add_adapter("two", random_config())
    model.delete_adapter("two")
    assert torch.equal(logits(model, inputs), with_one)
    assert not any(".two" in name for name, _ in model.named_parameters())
    model.add_adapter("two", random_config())
    with pytest.warns(UserWarning, match="Setting active adapter"):
        model.delete_adapter("one")
    assert all("one" not in module.settings for module in model.modules() if isinstance(module, MolaLinear))


def test_unload_gives_the_base_back(base, inputs):
    model = get_peft_model(clone(base), random_config(router_aux_loss_coef=0.1))
    plain = model.unload()
    assert torch.equal(logits(plain, inputs), logits(base, inputs))
    assert not any(isinstance(module, MolaLinear) for module in plain.modules())
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks


def test_modules_to_save(base, inputs, tmp_path):
    model = get_peft_model(clone(base), random_config(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(0.1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(clone(base), tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@needs("peft", "0.21", "it does not save trained biases")
def test_bias_is_saved_together_with_the_routers(tmp_path, inputs):
    base = tiny_llama(attention_bias=True)
    model = get_peft_model(clone(base), random_config(bias="mola_only"))
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias.add_(0.1)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("router" in key for key in tensors) == 28
    again = PeftModel.from_pretrained(clone(base), tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_training_goes_on_after_loading(base, inputs, saved):
    folder, _ = saved
    model = PeftModel.from_pretrained(clone(base), folder, is_trainable=True)
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".mola_" in name)


def test_half_precision_base_keeps_routers_in_float32(base, inputs):
    model = get_peft_model(clone(base).to(torch.bfloat16), random_config(), autocast_adapter_dtype=False)
    dtypes = {name.split(".")[-2]: p.dtype for name, p in model.named_parameters() if ".mola_" in name}
    assert dtypes == {"mola_A": torch.bfloat16, "mola_B": torch.bfloat16, "mola_router": torch.float32}
    assert logits(model, inputs).dtype == torch.bfloat16


# ---------------------------------------------------------------------- what must be refused


def test_merging_a_mixture_is_refused_and_changes_nothing(base, inputs):
    model = get_peft_model(clone(base), random_config(num_experts=[1, 1, 1, 2], top_k=1))
    before = logits(model, inputs)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MolaError, match="cannot be merged.*2 experts"):
            merge()
    assert torch.equal(logits(model, inputs), before)
    assert not any(module.merged for module in model.modules() if isinstance(module, MolaLinear))


@pytest.mark.parametrize("name", ["num_experts", "lora_alpha"])
def test_missing_field_in_the_checkpoint(base, saved, name):
    folder, _ = saved
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    del settings[name]
    path.write_text(json.dumps(settings))
    with pytest.raises(MolaError, match=rf"\b{name}\b"):
        PeftModel.from_pretrained(clone(base), folder)
    with pytest.raises(MolaError, match=rf"\b{name}\b"):
        clone(base).load_adapter(str(folder))


def test_unknown_field_in_the_checkpoint(base, saved):
    folder, _ = saved
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "router_temperature": 2.0}))
    with pytest.raises(MolaError, match="router_temperature"):
        PeftModel.from_pretrained(clone(base), folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_experts", 3, "shape"),
        ("num_experts", [2, 2, 4], "3 entries"),
        ("r", 8, "shape"),
        ("top_k", 5, "top_k"),
        ("target_modules", ["q_proj"], "unknown"),
        ("target_modules", ["q_proj", "qproj"], "qproj"),
    ],
)
def test_wrong_field_in_the_checkpoint(base, saved, name, value, message):
    folder, _ = saved
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(MolaError, match=message):
        PeftModel.from_pretrained(clone(base), folder)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_wrong_tensors_in_the_checkpoint(base, saved, change):
    folder, _ = saved

    def leave_out_or_add(tensors):
        key = next(key for key in tensors if key.endswith("mola_router"))
        router = tensors.pop(key) if change == "missing" else tensors[key].clone()
        if change == "unknown":
            tensors[key.replace("layers.0", "layers.9")] = router

    change_tensors(folder, leave_out_or_add)
    with pytest.raises(MolaError, match=change):
        PeftModel.from_pretrained(clone(base), folder)


def test_other_base_model_is_refused(saved, inputs):
    folder, _ = saved
    with pytest.raises(MolaError, match="5 layers"):
        PeftModel.from_pretrained(tiny_llama(num_layers=5), folder)


def test_mixing_with_another_method_is_refused(base):
    model = get_peft_model(clone(base), random_config())
    with pytest.raises(ValueError, match="PeftType.MOLA"):  # PEFT's own
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.base_model.peft_config["other"] = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(MolaError, match="all adapters of this model must be of one kind"):
        model.base_model.inject_adapter(model.base_model.model, "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_porj"]}, "q_porj.*q_proj"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"num_experts": [2, 2, 2]}, "3 entries.*4 layers"),
        ({"num_experts": 2, "top_k": 3}, "top_k"),
        ({"router_aux_loss_reduction": "sum"}, "router_aux_loss_reduction"),
        ({"router": "soft"}, r"`router` must be one of \['top_k_softmax'\], got 'soft'"),
        ({"target_modules": [" q_proj"]}, "' q_proj' .did you mean 'q_proj'"),
        ({"bias": "lora_only"}, "bias"),
        ({"init_lora_weights": "zero"}, "`init_lora_weights` must be one of"),
        ({"target_modules": 7}, "`target_modules` must be a list of names: got 7"),
        ({"target_modules": []}, "`target_modules` must not be empty unless"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "need `target_modules` as a list of names"),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, r"non-empty list of layer numbers: got \[\]"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, -1]},
            r"non-empty list of layer numbers: got \[0, -1\]",
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 30]}, "there is no layer 30. Correct"),
        ({"layers_pattern": "layers"}, "`layers_pattern` is only used together with `layers_to_transform`"),
        ({"task_type": "POETRY"}, "`task_type` is invalid"),
    ],
)
def test_wrong_settings_are_refused(base, options, message):
    model = clone(base)
    with pytest.raises(MolaError, match=message):
        get_peft_model(model, random_config(**options))
    assert not any(isinstance(module, MolaLinear) for module in model.modules())


@pytest.mark.parametrize("name", ["r", "num_experts", "top_k"])
def test_wrong_notation_is_refused_before_there_is_a_model(name):
    with pytest.raises(MolaError, match=f"`{name}`"):
        MolaConfig(**{name: "2x4"})


LIMITS = {  # what is still right, what is wrong
    "lora_alpha": ([0.5, 1000], [0, -1, True, "16", float("nan"), float("inf")]),
    "lora_dropout": ([0, 0.99], [-0.01, 1, 1.5]),
    "router_aux_loss_coef": ([0, 1, 50], [-0.5, float("inf")]),
    "router_z_loss_coef": ([0, 1, 50], [-0.5, None]),
    "router_jitter_noise": ([0, 0.99], [-0.01, 1, 1.5]),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_of_numbers(name):
    right, wrong = LIMITS[name]
    for value in right:
        assert getattr(MolaConfig(**{name: value}), name) == value
    for value in wrong:
        with pytest.raises(MolaError, match=f"`{name}` must be a number"):
            MolaConfig(**{name: value})


def test_unknown_keyword_is_refused():
    with pytest.raises(MolaError, match="nexperts"):
        MolaConfig(nexperts=4)


# ---------------------------------------------------------------------- the configuration


def test_one_configuration_serves_models_of_any_depth():
    config = MolaConfig(num_experts="2468", task_type="CAUSAL_LM")
    for num_layers in (4, 8):
        model = get_peft_model(tiny_llama(num_layers=num_layers), config)
        assert len(model.peft_config["default"].num_experts) == num_layers
    assert config.num_experts == "2468"
    assert config.target_modules is None


@pytest.mark.parametrize(("num_layers", "experts"), [(1, 5), (2, [3, 7]), (3, [2, 4, 7]), (4, [2, 4, 6, 8])])
def test_the_default_fits_a_model_of_any_depth(num_layers, experts, tmp_path):
    model = get_peft_model(tiny_llama(num_layers=num_layers), MolaConfig(init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_experts"] == experts
    loaded = PeftModel.from_pretrained(tiny_llama(num_layers=num_layers), tmp_path).eval()
    ids = token_batch()["input_ids"]
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_number_set_after_construction_is_no_default():
    config = MolaConfig()
    config.num_experts = 3
    assert get_peft_model(tiny_llama(num_layers=2), config).peft_config["default"].num_experts == 3


@pytest.mark.parametrize(
    ("field", "default", "value"),
    [("layer_replication", None, [[0, 4], [2, 4]]), ("shared_a", False, True), ("sparsegen_lambda", 0.0, 0.5)],
)
def test_a_saved_field_of_an_earlier_version_loads_at_its_default(base, saved, field, default, value):
    folder, _ = saved
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, field: default}))
    PeftModel.from_pretrained(clone(base), folder)
    path.write_text(json.dumps({**settings, field: value}))
    with pytest.raises(MolaError, match=f"no fields {field}"):
        PeftModel.from_pretrained(clone(base), folder)


def test_configuration_round_trip(tmp_path):
    config = MolaConfig(num_experts="hourglass", r=4, router_aux_loss_coef=1e-3, target_modules=["v_proj", "q_proj"])
    config.save_pretrained(tmp_path)
    again = MolaConfig.from_pretrained(tmp_path)
    assert again.to_dict() == {**config.to_dict(), "peft_type": again.peft_type}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOLA"


def test_experts_follow_the_layer_index(base):
    model = get_peft_model(clone(base), MolaConfig(num_experts=[1, 2, 3, 4], top_k=1, r=[1, 2, 3, 4]))
    for name, module in model.named_modules():
        if isinstance(module, MolaLinear):
            index = int(name.split("layers.")[1].split(".")[0])
            assert module.num_experts["default"] == index + 1
            assert module.mola_A["default"].shape[:2] == (index + 1, index + 1)


def test_layers_without_a_target_are_passed_over(base):
    options = {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*", "layers_to_transform": range(1, 3)}
    model = get_peft_model(clone(base), MolaConfig(num_experts="2-4", **options))
    assert [name.split("layers.")[1][0] for name, each in model.named_modules() if isinstance(each, MolaLinear)] == [
        "2"
    ]


def test_no_layers_in_a_saved_adapter_are_all(base, tmp_path):
    """As PEFT takes it."""
    get_peft_model(clone(base), random_config(target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_to_transform": [], "layers_pattern": "layers"}))
    model = PeftModel.from_pretrained(clone(base), tmp_path)
    assert sum(isinstance(module, MolaLinear) for module in model.modules()) == 4


@pytest.mark.parametrize("targets", ["q_proj", ["q_proj"]])
def test_one_name_is_one_module_per_layer(base, targets):
    model = get_peft_model(clone(base), MolaConfig(num_experts=2, target_modules=targets, task_type="CAUSAL_LM"))
    names = [name for name, module in model.named_modules() if isinstance(module, MolaLinear)]
    assert [name.rpartition(".")[2] for name in names] == ["q_proj"] * 4


def test_registering_twice_is_harmless():
    from mola.tuner import add_peft_type, register

    assert add_peft_type("MOLA") is add_peft_type("MOLA")
    register(mola.MolaConfig, mola.MolaModel)
    assert mola.MolaConfig().peft_type in list(type(mola.MolaConfig().peft_type))
    with pytest.raises(MolaError, match=r"already has a method named 'MOLA' \(mola\..*MolaConfig\)"):
        register(LoraConfig, mola.MolaModel)
