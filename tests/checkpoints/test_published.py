"""The research code's format: what is read, what is written, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mola import MolaConfig, MolaError
from mola.checkpoints.published import read_published, read_tensors, to_published
from mola.exporting.convert import ConvertOptions, convert

CASE = Path(__file__).parents[1] / "golden" / "case_a"
Q, V = "self_attn.q_proj", "self_attn.v_proj"
SIZES = {Q: (6, 5), V: (6, 3), "mlp.down_proj": (4, 6)}


def adapter(num_experts, r=2, modules=(Q, V), dtype=torch.float32, **options):
    """A random adapter of mola: configuration and tensors."""
    generator = torch.Generator().manual_seed(sum(num_experts))
    ranks = [r] * len(num_experts) if isinstance(r, int) else r
    tensors = {}
    for layer, (experts, rank) in enumerate(zip(num_experts, ranks, strict=True)):
        for name in modules:
            key = f"base_model.model.model.layers.{layer}.{name}"
            n_in, n_out = SIZES[name]
            tensors[f"{key}.mola_A"] = torch.randn(experts, rank, n_in, generator=generator).to(dtype)
            tensors[f"{key}.mola_B"] = torch.randn(experts, rank, n_out, generator=generator).to(dtype)
            if experts > 1:
                tensors[f"{key}.mola_router"] = torch.randn(experts, n_in, generator=generator)
    names = [name.rpartition(".")[2] for name in modules]
    return MolaConfig(**{"num_experts": num_experts, "r": r, "target_modules": names, "top_k": 1, **options}), tensors


def write(folder, settings_, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings_))
    torch.save(tensors, folder / "adapter_model.bin")
    return folder


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


@pytest.fixture
def case(tmp_path):
    """A copy of the golden adapter to break: settings, tensors and a function that writes them."""
    values = json.loads((CASE / "adapter_config.json").read_text())
    return values, read_tensors(CASE), lambda s, t: write(tmp_path / "broken", s, t)


def test_golden_adapter_there_and_back_is_unchanged():
    config, tensors = read_published(CASE, 2)
    found_settings, found = to_published(config, tensors)
    assert_equal(found, read_tensors(CASE))
    expected = json.loads((CASE / "adapter_config.json").read_text())
    expected["target_modules"].sort()
    # Whether it was made for inference is not in what read_published gives; the format always says yes.
    assert found_settings == expected


@settings(max_examples=25, deadline=None)
@given(
    layers=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4),
    modules=st.sets(st.sampled_from(sorted(SIZES)), min_size=1),
    alpha=st.sampled_from([1, 16, 2.5]),
)
def test_any_adapter_there_and_back_is_unchanged(tmp_path_factory, layers, modules, alpha):
    num_experts, r = map(list, zip(*layers, strict=True))
    config, tensors = adapter(num_experts, r, sorted(modules), lora_alpha=alpha, lora_dropout=0.1)
    read_config, read = read_published(write(tmp_path_factory.mktemp("there"), *to_published(config, tensors)), 1)
    assert_equal(read, tensors)
    for name in ("num_experts", "r", "lora_alpha", "lora_dropout", "target_modules", "top_k"):
        assert getattr(read_config, name) == getattr(config, name), name


def test_written_keys_shapes_and_values():
    config, tensors = adapter([1, 3], modules=(Q,))
    values, written = to_published(config, tensors)
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj."
    parts = {0: [0], 1: [0, 1, 2]}
    assert set(written) == {
        prefix.format(layer) + name
        for layer, experts in parts.items()
        for name in ["router.router.weight", *(f"lora_{part}_{e}.weight" for part in "AB" for e in experts)]
    }
    first, second = prefix.format(0), prefix.format(1)
    assert torch.equal(written[first + "router.router.weight"], torch.zeros(1, 6))
    assert torch.equal(written[second + "lora_A_2.weight"], tensors[second + "mola_A"][2])
    assert torch.equal(written[second + "lora_B_2.weight"], tensors[second + "mola_B"][2].t())
    assert values["r"] == [2, 2]
    assert values["peft_type"] == "LORA"


def test_half_precision_is_written_as_float32():
    config, tensors = adapter([2], dtype=torch.bfloat16)
    _, written = to_published(config, tensors)
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    key = "base_model.model.model.layers.0.self_attn.q_proj."
    assert torch.equal(written[key + "lora_A_1.weight"], tensors[key + "mola_A"][1].float())


def test_one_number_for_all_layers_is_written_as_a_list():
    config, tensors = adapter([2, 2, 2])
    config.num_experts, config.r = 2, 2
    assert to_published(config, tensors)[0]["r"] == [2, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "all"}, "`bias` cannot be expressed"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` cannot be expressed"),
        ({"layers_to_transform": 0}, "`layers_to_transform` cannot be expressed"),
        ({"exclude_modules": ["lm_head"]}, "`exclude_modules` cannot be expressed"),
        ({"target_modules": r".*\.(q|v)_proj"}, "`target_modules` must be a list"),
        ({"target_modules": ["q_proj"]}, r"plain names, \['q_proj', 'v_proj'\]"),
        ({"num_experts": [2, 2]}, r"`num_experts` 2 .*needs tensors .*'A': \(2, 2\)"),
        ({"r": [2, 3]}, r"`r` 3 needs tensors"),
        ({"num_experts": [2, 1]}, "`num_experts` 1 and `r` 2 needs tensors"),
        ({"router": "soft"}, "`router` cannot be expressed.*got 'soft'"),
    ],
)
def test_what_the_format_cannot_express_is_refused(options, message):
    afterwards = {"num_experts", "r", "router"}
    config, tensors = adapter([2, 3], **{name: v for name, v in options.items() if name not in afterwards})
    for name in options.keys() & afterwards:
        setattr(config, name, options[name])
    with pytest.raises(MolaError, match=message):
        to_published(config, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.self_attn.v_proj": None}, r"layer 1 has \['q_proj'\]"),
        ({"model.layers.0.": None}, "layer 0 has"),
        ({"lm_head.weight": torch.zeros(2)}, "'lm_head.weight' cannot be expressed"),
        ({"base_model.model.model.layers.0.attn.q_proj.mola_A": torch.zeros(2)}, "attn.q_proj.mola_A' cannot be"),
    ],
)
def test_tensors_outside_the_format_are_refused(change, message):
    config, tensors = adapter([2, 2])
    for key, value in change.items():
        if value is None:
            tensors = {name: tensor for name, tensor in tensors.items() if key not in name}
        else:
            tensors[key] = value
    with pytest.raises(MolaError, match=message):
        to_published(config, tensors)


def test_float64_is_refused_instead_of_rounded():
    with pytest.raises(MolaError, match=r"float64.*lose digits"):
        to_published(*adapter([2], dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("r", 4, "`r` .* must be a list"),
        ("bias", "lora_only", "`bias` .* must be 'none', got 'lora_only'"),
        ("peft_type", "MOLA", "`peft_type` .* must be 'LORA'"),
        ("modules_to_save", ["lm_head"], "`modules_to_save`"),
        ("layers_to_transform", [0, 1], "`layers_to_transform`"),
    ],
)
def test_settings_without_a_counterpart_are_refused(case, name, value, message):
    values, tensors, save = case
    with pytest.raises(MolaError, match=message):
        read_published(save({**values, name: value}, tensors), 2)


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("layers.1.self_attn.q_proj.lora_A_1.weight", "numbered from 0 without a gap"),
        ("layers.1.self_attn.q_proj.router.router.weight", "3 experts and no router"),
        ("layers.2.", "layers \\[2\\] have no tensors"),
        ("layers.1.self_attn.q_proj.lora_", "a router but no experts"),
    ],
)
def test_missing_tensors_are_reported(case, suffix, message):
    values, tensors, save = case
    kept = {key: tensor for key, tensor in tensors.items() if suffix not in key}
    assert len(kept) < len(tensors)
    with pytest.raises(MolaError, match=message):
        read_published(save(values, kept), 2)


def test_ranks_and_names_that_the_model_does_not_have_are_left_out(case):
    values, tensors, save = case
    longer = values | {"r": values["r"] * 2, "target_modules": [" q_proj", *values["target_modules"], "foo_proj"]}
    config, found = read_published(save(longer, tensors), 2)
    expected, state_dict = read_published(CASE, 2)
    assert (config.r, set(config.target_modules)) == (expected.r, set(expected.target_modules))
    assert_equal(found, state_dict)
    with pytest.raises(MolaError, match="3 numbers, experts in 4 layers"):
        read_published(save(values | {"r": values["r"][:3]}, tensors), 2)


def test_what_is_left_out_is_reported_and_missing_tensors_are_refused(case, tmp_path):
    values, tensors, save = case
    longer = values | {"r": values["r"] * 2, "target_modules": [*values["target_modules"], "foo_proj"]}
    options = {"source_format": "published", "base_model": str(CASE.parent / "base_tiny"), "top_k": "2"}
    report = str(convert(ConvertOptions([str(save(longer, tensors))], str(tmp_path / "out"), **options)))
    assert "r: the file has 8 numbers, of which the first 4 count" in report
    assert "the base model has no 'foo_proj'" in report
    kept = {key: tensor for key, tensor in tensors.items() if ".v_proj." not in key}
    with pytest.raises(MolaError, match="names v_proj, but the file holds no tensors of it"):
        convert(ConvertOptions([str(save(values, kept))], str(tmp_path / "none"), **options))


def test_a_target_name_without_a_list_is_one_name(case, tmp_path):
    values, tensors, save = case
    kept = {key: tensor for key, tensor in tensors.items() if ".q_proj." in key}
    source = save(values | {"target_modules": "q_proj"}, kept)
    options = {"source_format": "published", "base_model": str(CASE.parent / "base_tiny"), "top_k": "2"}
    report = str(convert(ConvertOptions([str(source)], str(tmp_path / "out"), **options)))
    assert "the base model has no" not in report


def test_names_without_the_prefix_of_peft_get_it(case):
    values, tensors, save = case
    bare = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    assert_equal(read_published(save(values, bare), 2)[1], read_published(save(values, tensors), 2)[1])
    with pytest.raises(MolaError, match="twice, with and without 'base_model.model.'"):
        read_published(save(values, tensors | bare), 2)


def test_targets_by_whole_names_are_written_as_plain_ones():
    """As "all-linear" is saved."""
    config, tensors = adapter([2, 3])
    config.target_modules = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in (Q, V)]
    assert to_published(config, tensors)[0]["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [("llama", 5, None), ("gemma2", 5, "the type gemma2"), ("llama", 3, "grouped-query attention")],
)
def test_a_base_model_that_the_research_code_cannot_compute_is_reported(kind, values, said, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, V, (6, values))
    config, tensors = adapter([2, 2], base_model_type=kind)
    source = tmp_path / kind
    config.save_pretrained(source)
    save_file(tensors, source / "adapter_model.safetensors", {"format": "pt"})
    report = str(convert(ConvertOptions([str(source)], str(tmp_path / f"{kind}-out"), target_format="published")))
    assert ("cannot run a model" in report) == (said is not None)
    assert said is None or f"cannot run a model with {said}" in report


@pytest.mark.parametrize("name", ["lora_alpha", "target_modules", "r"])
def test_missing_settings_are_named(case, name):
    values, tensors, save = case
    del values[name]
    with pytest.raises(MolaError, match=rf"lacks \['{name}'\]"):
        read_published(save(values, tensors), 2)


def test_experts_outside_the_decoder_layers_are_refused(case):
    values, tensors, save = case
    outside = {key.replace("layers.0.self_attn", "head"): tensor for key, tensor in tensors.items()}
    with pytest.raises(MolaError, match="head.q_proj' is in no decoder layer"):
        read_published(save(values, outside), 2)


def test_a_router_for_other_features_than_the_experts_is_refused():
    config, tensors = adapter([2])
    key = next(key for key in tensors if key.endswith("q_proj.mola_router"))
    tensors[key] = torch.zeros(2, 9)
    with pytest.raises(MolaError, match="a router for 9 features and experts for 6"):
        to_published(config, tensors)


def test_unknown_keys_are_refused(case):
    values, tensors, save = case
    tensors["base_model.model.lm_head.weight"] = torch.zeros(1)
    with pytest.raises(MolaError, match="is no key of the research code's format"):
        read_published(save(values, tensors), 2)


def test_two_files_of_weights_are_refused(tmp_path):
    shutil.copytree(CASE, tmp_path / "both")
    (tmp_path / "both" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(MolaError, match="they may differ"):
        read_published(tmp_path / "both", 2)


def test_a_file_of_safetensors_is_read(tmp_path):
    expected = {"a": torch.arange(6.0).view(2, 3)}
    save_file(expected, tmp_path / "adapter_model.safetensors")
    assert_equal(read_tensors(tmp_path), expected)


def test_tensors_that_share_memory_in_a_pickle_are_separated(tmp_path):
    whole = torch.arange(6.0).view(2, 3)
    torch.save({"whole": whole, "turned": whole.t()}, tmp_path / "adapter_model.bin")
    found = read_tensors(tmp_path)
    save_file(found, tmp_path / "again.safetensors")  # refuses memory that is shared or in another order
    assert torch.equal(found["turned"], whole.t())


def test_a_file_that_is_no_dict_of_tensors_is_refused(tmp_path):
    torch.save({"weights": [1, 2]}, tmp_path / "adapter_model.bin")
    with pytest.raises(MolaError, match="flat dict of tensors"):
        read_tensors(tmp_path)


def test_a_pickle_that_would_run_code_is_refused(case, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("yes",))

    values, tensors, save = case
    folder = save(values, {**tensors, "more": Harmful()})
    with pytest.raises(MolaError, match="cannot be read as tensors"):
        read_published(folder, 2)
    assert not (tmp_path / "ran").exists()


def test_tensors_saved_on_a_gpu_load_on_the_cpu(case, monkeypatch):
    """The file says where its tensors were; a machine without that device reads them all the same."""
    values, tensors, save = case
    with monkeypatch.context() as patch:
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:7")
        folder = save(values, tensors)
    with pytest.raises(RuntimeError, match=r"(?i)cuda"):
        torch.load(folder / "adapter_model.bin", weights_only=True)
    found = read_tensors(folder)
    assert {tensor.device.type for tensor in found.values()} == {"cpu"}
    assert_equal(found, tensors)
    assert {tensor.device.type for tensor in read_published(folder, 2)[1].values()} == {"cpu"}
