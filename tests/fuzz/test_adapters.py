"""Adapter folders: settings, weights as safetensors and as pickles, in mola's format and in three others."""

import copy
import json
import shutil
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save
from transformers import AutoModelForCausalLM, AutoTokenizer

from mola.checkpoints.moe_peft import read_moe_peft
from mola.checkpoints.published import read_published
from mola.checkpoints.tensors import read_tensors
from mola.exporting import from_lora, other_formats, to_lora
from mola.exporting import merge as merging
from mola.exporting.convert import ConvertOptions, convert
from mola.exporting.lora_files import read_lora
from mola.exporting.merge import MergeOptions, merge
from mola.models import loading
from mola.models.adapters import attach, check_adapter
from mola.models.meta import model_on_meta
from mola.models.tokenizer import load_tokenizer
from mola.reporting.adapter_weights import read_adapter_weights
from mola.tuner import MolaConfig
from tests.checkpoints.moe_peft_reference import LLAMA_SIZES, make_settings, make_tensors
from tests.fuzz.checking import fuzz, survives
from tests.fuzz.documents import JSON_TEXTS, broken, changed, files, written

SIZES = {"self_attn.q_proj": (32, 32)}
LINEARS = [f"model.layers.{layer}.{name}" for layer in range(4) for name in LLAMA_SIZES]
SETTINGS = make_settings(["q_proj"], num_experts=2, top_k=1, r=2)
TENSORS = {key: value.detach() for key, value in make_tensors(SETTINGS, 4, SIZES).items()}
PUBLISHED_SETTINGS = {"peft_type": "LORA", "r": [2] * 4, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none"}
PUBLISHED_SETTINGS |= {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "base_model_name_or_path": "a/b"}


def _published_name(key):
    name = key.replace("mola.layers", "base_model.model.model.layers").replace("moe_gate", "router.router")
    head, _, tail = name.partition(".experts.")
    return f"{head}.lora_{tail[7]}_{tail[0]}.weight" if tail else name


PUBLISHED = {_published_name(key): value for key, value in TENSORS.items()}
OWN_SETTINGS = MolaConfig(r=2, num_experts=[2, 2, 2, 2], top_k=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
OWN_SETTINGS = OWN_SETTINGS.to_dict() | {"peft_type": "MOLA"}
OWN = {
    f"base_model.model.model.layers.{layer}.self_attn.q_proj.mola_{part}": torch.ones(shape)
    for layer in range(4)
    for part, shape in (("A", (2, 2, 32)), ("B", (2, 2, 32)), ("router", (2, 32)))
}
ONE_EXPERT = {key: value[:1] for key, value in OWN.items() if not key.endswith("router")}
LORA_SETTINGS = LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 3}).to_dict()
LORA_SETTINGS = json.loads(json.dumps(LORA_SETTINGS, default=sorted)) | {"peft_type": "LORA"}
LORA = {
    f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight": torch.ones(shape)
    for layer in range(4)
    for part, shape in (("A", (3 if layer == 1 else 2, 32)), ("B", (32, 3 if layer == 1 else 2)))
}


def other_tensors():
    """Tensors that a file can hold and an adapter cannot use."""
    yield torch.tensor(1.0)
    yield torch.zeros(0, 2)
    yield torch.zeros(3, 5)
    yield torch.zeros(2, 32, dtype=torch.int64)
    yield torch.zeros(2, 32, dtype=torch.bool)
    yield torch.zeros(2, 32, dtype=torch.complex64)
    yield torch.zeros(2, 32, dtype=torch.float64)
    yield torch.full((2, 32), float("nan"), dtype=torch.bfloat16)
    yield torch.zeros(2, 32).to(torch.float8_e4m3fn)


def unusual_tensors():
    """More that only a pickle can hold."""
    yield from other_tensors()
    yield torch.zeros(1).expand(10**6, 10**6)
    yield torch.zeros(2, 32, device="meta")
    yield torch.zeros(2, 32).to_sparse()
    yield [torch.zeros(2)]
    yield "text"
    yield None


@st.composite
def tensor_dicts(draw, tensors, others):
    """`tensors` with some missing, renamed, added or replaced."""
    tensors = dict(tensors)
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from(sorted(tensors)))
        kind = draw(st.sampled_from(["remove", "rename", "replace", "add"]))
        value = tensors[key]
        if kind in ("remove", "rename"):
            del tensors[key]
        if kind != "remove":
            new = draw(st.sampled_from([key + "x", key.replace("0", "7"), key.replace("0", "9" * 30), "", "\0", "a"]))
            other = draw(st.sampled_from(others))
            tensors[key if kind == "replace" else new] = value if kind == "rename" else other
    return tensors


OTHERS, UNUSUAL = list(other_tensors()), list(unusual_tensors())


@st.composite
def lying_headers(draw, tensors):
    """Bytes of a safetensors file whose header was changed, and whose length may be another."""
    content = save({key: value.contiguous() for key, value in tensors.items()})
    size = struct.unpack("<Q", content[:8])[0]
    header = written(draw(changed(json.loads(content[8 : 8 + size]))), JSON_TEXTS).encode("utf-8", "surrogatepass")
    lie = draw(st.sampled_from([0, 0, 0, 1, -1, 2**40, 2**63]))
    return struct.pack("<Q", max(0, len(header) + lie)) + header + content[8 + size :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture
def skeleton(tiny_model_dir, monkeypatch):
    """The base model without weights, which commands copy: building it is most of their time."""
    model = model_on_meta(str(tiny_model_dir))
    for module in (from_lora, loading, merging, other_formats, to_lora):
        monkeypatch.setattr(module, "model_on_meta", lambda *arguments, **options: copy.deepcopy(model))
    return model


@pytest.fixture
def loaded(tiny_model_dir, tiny_model, monkeypatch):
    """The same for the model with its weights, and its tokenizer."""
    tokenizer = load_tokenizer(tiny_model_dir)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **options: copy.deepcopy(tiny_model))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **options: tokenizer)


def fill(data, folder, settings, tensors, *, may_pickle=True):
    """Write an adapter that is wrong somewhere, or not."""
    for name in ("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"):
        (folder / name).unlink(missing_ok=True)
    valid = st.just(json.dumps(settings).encode())
    (folder / "adapter_config.json").write_bytes(data.draw(valid | files(settings)))
    kinds = ["tensors", "header", "bytes", "none"] + ["pickle", "pickle bytes"] * may_pickle
    kind = data.draw(st.sampled_from(kinds))
    weights = folder / "adapter_model.safetensors"
    if kind == "tensors":
        found = data.draw(tensor_dicts(tensors, OTHERS))
        weights.write_bytes(save({key: value.clone() for key, value in found.items()}))
    elif kind == "header":
        weights.write_bytes(data.draw(lying_headers(tensors)))
    elif kind == "bytes":
        weights.write_bytes(data.draw(broken(save(tensors)) | st.binary(max_size=40)))
    elif kind.startswith("pickle"):
        path = folder / "adapter_model.bin"
        torch.save(
            data.draw(tensor_dicts(tensors, UNUSUAL)), path, _use_new_zipfile_serialization=data.draw(st.booleans())
        )
        if kind == "pickle bytes":
            path.write_bytes(data.draw(broken(path.read_bytes())))


@fuzz
@given(data=st.data())
def test_own_adapter(folder, data):
    fill(data, folder, OWN_SETTINGS, OWN)
    survives(check_adapter, folder)
    survives(read_tensors, folder)
    survives(read_adapter_weights, folder)


@fuzz
@given(data=st.data())
def test_published_adapter(folder, data):
    fill(data, folder, PUBLISHED_SETTINGS, PUBLISHED)
    survives(read_published, folder, 1)


@fuzz
@given(data=st.data())
def test_moe_peft_adapter(folder, data):
    fill(data, folder, SETTINGS, TENSORS)
    survives(read_moe_peft, folder, LINEARS, 4)


@fuzz
@given(data=st.data())
def test_lora(folder, skeleton, data):
    fill(data, folder, LORA_SETTINGS, LORA)
    survives(read_lora, folder, copy.deepcopy(skeleton))


WAYS = {
    "from published": ("published", None, PUBLISHED_SETTINGS, PUBLISHED, {"top_k": "1"}),
    "from moe_peft": ("moe_peft", None, SETTINGS, TENSORS, {}),
    "from lora": ("lora", None, LORA_SETTINGS, LORA, {"top_k": "1", "num_experts": "2,"}),
    "to published": (None, "published", OWN_SETTINGS, OWN, {}),
    "to lora": (None, "lora", OWN_SETTINGS, OWN, {"rank": 2}),
}


def converted(folder, base, way):
    source, target, _, _, own = WAYS[way]
    shutil.rmtree(folder / "out", ignore_errors=True)
    base = None if target == "published" else str(base)
    return convert(ConvertOptions([str(folder)], str(folder / "out"), source, target, base, **own))


@pytest.mark.parametrize("way", WAYS)
@fuzz
@given(data=st.data())
def test_conversion(folder, tiny_model_dir, skeleton, way, data):
    fill(data, folder, *WAYS[way][2:4])
    survives(converted, folder, tiny_model_dir, way)


@pytest.mark.parametrize("way", WAYS)
def test_conversion_of_what_is_whole(folder, tiny_model_dir, skeleton, way):
    """Else none of the damaged ones gets far."""
    _, _, settings, tensors, _ = WAYS[way]
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "adapter_model.bin").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(save(tensors))
    converted(folder, tiny_model_dir, way)
    assert (folder / "out" / "adapter_config.json").is_file()


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # what PEFT says about settings without an effect
@pytest.mark.parametrize("kind", ["lora", "one expert"])
@fuzz
@given(data=st.data())
def test_merge(folder, tiny_model_dir, skeleton, loaded, kind, data):
    fill(data, folder, *((LORA_SETTINGS, LORA) if kind == "lora" else (OWN_SETTINGS | {"num_experts": 1}, ONE_EXPERT)))

    def run():
        shutil.rmtree(folder / "out", ignore_errors=True)
        return merge(MergeOptions(str(folder), str(tiny_model_dir), str(folder / "out")))

    survives(run)


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")  # a setting that has no effect, says PEFT
@fuzz
@given(data=st.data())
def test_adapter_on_a_model(folder, tiny_model, data):
    fill(data, folder, OWN_SETTINGS, OWN, may_pickle=False)

    def load():
        check_adapter(folder)
        model = attach(copy.deepcopy(tiny_model), "default", str(folder))
        assert model.peft_config

    survives(load)
