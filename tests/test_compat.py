"""`mola._compat`: every entry is needed by the lowest versions that mola takes, and does what it is for on these."""

import copy
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from transformers import LlamaForCausalLM, TrainingArguments

from mola import MolaConfig, _compat

from .versions import has

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Function, package, the first version that needs it no more.
ENTRIES = [
    ("gguf_arguments", "transformers", "5.17"),
    ("own_tokenizers", "transformers", "5.16"),  # or earlier
    ("has_activation_checkpointing", "transformers", "5.21"),
    ("share_checkpointing", "transformers", "5.21"),
    ("set_adapter_to_infer", "peft", "0.19"),
    ("cache_argument", "transformers", "5.24"),
    ("generation_reads_cache_keyword", "peft", "0.22"),  # not before
    ("has_load_hook", "peft", "0.21"),
    ("ties_saved_modules", "peft", "0.19"),
]


def lowest(package):
    (found,) = [each for each in map(Requirement, PROJECT["dependencies"]) if each.name == package]
    return min(Version(each.version) for each in found.specifier if each.operator == ">=")


@pytest.mark.parametrize(("name", "package", "version"), ENTRIES)
def test_an_entry_goes_when_the_lowest_version_needs_it_no_more(name, package, version):
    assert lowest(package) < Version(version), f"remove `{name}` from mola._compat, and use the library itself"
    assert callable(getattr(_compat, name))


def test_every_entry_is_listed_here():
    functions = re.findall(r"^def (\w+)", (ROOT / "src/mola/_compat.py").read_text(), re.M)
    assert functions == [name for name, _, _ in ENTRIES]


def test_what_this_version_is_taken_for():
    assert _compat.has_activation_checkpointing() == has("transformers", "5.21")
    assert ("quantization_config" in _compat.gguf_arguments("x.gguf")) == hasattr(transformers, "GgufConfig")
    assert _compat.cache_argument(LlamaForCausalLM) == ("cache" if has("transformers", "5.24") else "past_key_values")
    assert _compat.has_load_hook(BaseTuner) == has("peft", "0.21")
    assert _compat.ties_saved_modules(BaseTuner) == has("peft", "0.19")


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_either_name_switches_checkpointing_on(name, tmp_path):
    arguments = SimpleNamespace(activation_checkpointing=None, gradient_checkpointing=False)
    arguments.gradient_checkpointing_kwargs = {"use_reentrant": False}
    setattr(arguments, name, True)
    before = dict(vars(arguments))
    _compat.share_checkpointing(arguments)
    if hasattr(TrainingArguments, "activation_checkpointing_kwargs"):
        assert vars(arguments) == before
    else:
        assert arguments.activation_checkpointing
        assert arguments.gradient_checkpointing
        assert arguments.activation_checkpointing_kwargs == {"use_reentrant": False}


def test_an_adapter_is_set_without_gradients(tiny_model):
    config = MolaConfig(num_experts=2, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(tiny_model), config)
    model.add_adapter("second", config)
    _compat.set_adapter_to_infer(model, "second")
    assert model.active_adapter == "second"
    assert not any(parameter.requires_grad for parameter in model.parameters())
