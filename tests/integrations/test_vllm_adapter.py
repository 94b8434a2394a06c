"""An adapter for vLLM: parts as in the model that mola loads, and what is refused. Needs no vLLM."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from mola import MolaConfig, load_model
from mola.errors import MolaError
from mola.integrations.vllm_server import TRIED, check_version
from mola.integrations.vllm_server.parts import read_adapter
from mola.tuner import MolaLinear
from tests.conftest import save_adapter
from tests.versions import needs


def settings(**more):
    return {"num_experts": "1246", "r": 3, "lora_alpha": 5, "use_rslora": True, "task_type": "CAUSAL_LM", **more}


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    config = MolaConfig(**settings(num_experts_pattern={"up_proj": 3}, top_k=2, init_lora_weights=False))
    return save_adapter(tiny_model_dir, tmp_path_factory.mktemp("vllm") / "adapter", config)


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")


def read(base, folder):
    return read_adapter(str(folder), str(base))


def test_parts_are_those_of_the_loaded_model(tiny_model_dir, folder):
    parts = read(tiny_model_dir, folder).parts
    model = load_model(tiny_model_dir, folder, dtype="float32", device="cpu").base_model.model
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MolaLinear)}
    assert parts.keys() == layers.keys()
    assert len(layers) == 28
    for name, layer in layers.items():
        part = parts[name]
        own = layer.settings["default"]
        assert part.settings == (own.num_experts, own.r, own.top_k, own.scaling, own.router)
        assert torch.equal(part.experts_A, layer.mola_A["default"])
        assert torch.equal(part.experts_B, layer.mola_B["default"])
        assert (part.router is None) == (own.num_experts == 1)
        if part.router is not None:
            assert torch.equal(part.router, layer.mola_router["default"])


def test_digest_is_of_settings_and_not_of_weights(tiny_model_dir, folder, copied):
    first = read(tiny_model_dir, folder).digest
    tensors = load_file(copied / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copied / "adapter_model.safetensors")
    change(copied, weights_sha256=None)
    assert read(tiny_model_dir, copied).digest == first
    change(copied, lora_alpha=6)
    assert read(tiny_model_dir, copied).digest != first


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` must be empty.*lm_head.*mola serve"),
        ({"trainable_token_indices": [1, 2]}, "`trainable_token_indices` must be empty"),
        pytest.param(
            {"bias": "mola_only"},
            "`bias` must be 'none'.*'mola_only'",
            marks=needs("peft", "0.21", "it saves no biases of other methods"),
        ),
    ],
)
def test_what_is_more_than_a_mixture_of_linears_is_refused(more, message, tiny_model_dir, tmp_path):
    save_adapter(tiny_model_dir, tmp_path / "more", MolaConfig(**settings(**more)))
    with pytest.raises(MolaError, match=message):
        read(tiny_model_dir, tmp_path / "more")


def test_stacked_experts_are_refused(tiny_model_dir, copied):
    change(copied, target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(MolaError, match="`target_parameters` must be empty"):
        read(tiny_model_dir, copied)


def test_plain_lora_is_an_error(tiny_model_dir, tmp_path):
    save_adapter(tiny_model_dir, tmp_path / "lora", LoraConfig(r=2, task_type="CAUSAL_LM"))
    with pytest.raises(MolaError, match="of type 'LORA'. For a LoRA leave the load format out"):
        read(tiny_model_dir, tmp_path / "lora")


def damage(folder):
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def lose_a_tensor(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path)
    change(folder, weights_sha256=None)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage, "is not the file that was saved"),
        (lose_a_tensor, "1 of 78 tensors are missing"),
        (lambda folder: change(folder, base_model_type="gpt2"), "of type 'llama', `base_model_type`.*'gpt2'"),
        (lambda folder: change(folder, num_experts=2), "does not fit the model"),
    ],
)
def test_files_are_checked_as_mola_checks_them(harm, message, tiny_model_dir, copied):
    harm(copied)
    with pytest.raises(MolaError, match=message):
        read(tiny_model_dir, copied)


@pytest.mark.parametrize("version", ["0.31.9", "0.320"])
def test_versions_that_were_not_tried_are_refused(version):
    check_version(f"{TRIED}.4+cpu")
    with pytest.raises(MolaError, match=rf"`vllm` must be 0.32.\*.*this is {version}"):
        check_version(version)


def test_registering_imports_nothing_of_mola_and_survives_another_vllm(tmp_path):
    """In every process of vLLM, whatever it serves."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("", encoding="utf-8")  # one without load formats
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import mola_vllm; mola_vllm.register(); mola_vllm.register()\n"
        "print([name for name in ('mola', 'peft', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "does not support the load format 'mola'" in done.stderr
