"""The notebook runs in a kernel, its settings do what they say, and it is stored without results."""

import contextlib
import functools
import io
import re
import shlex
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from peft import get_peft_model

import mola
from mola import cli
from mola.options.parsing import parse
from tests.waiting import PATIENCE

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "mola_inference.ipynb"
# Libraries warn about what they will do one day; here only our own words count.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def work(tmp_path, monkeypatch, tiny_model_dir, tiny_model):
    """A working folder with the base model and the adapter that the notebook names."""
    (tmp_path / "my-model").symlink_to(tiny_model_dir)
    torch.manual_seed(1)
    model = get_peft_model(tiny_model, mola.MolaConfig(num_experts=[1, 2, 2, 3], r=4, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "mola_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "scienceqa_mola")
    for variable in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        (tmp_path / ".home" / variable).mkdir(parents=True)
        monkeypatch.setenv(variable, str(tmp_path / ".home" / variable))
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def notebook(**settings):
    """The notebook, with other values in its cell of settings."""
    content = nbformat.read(NOTEBOOK, as_version=4)
    for name, value in settings.items():
        changed = 0
        for cell in code_cells(content):
            cell.source, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", cell.source, flags=re.M)
            changed += count
        assert changed == 1, name
    return content


def code_cells(content):
    return [cell for cell in content.cells if cell.cell_type == "code"]


def run_cells(**settings):
    """The names the notebook defines, run without a kernel."""
    names = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in code_cells(notebook(**settings)):
            exec(compile(cell.source, cell.id, "exec"), names)
    return names


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
def test_notebook_in_a_kernel_prints_what_generate_text_returns(work):
    content = notebook()
    NotebookClient(
        content, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    ).execute()
    prompt, text = (printed(cell)[:-1] for cell in code_cells(content)[2:4])
    assert "Question: Which of these animals breathes with lungs?" in prompt
    assert "(A) a trout (B) a dolphin (C) a shark" in prompt
    model, tokenizer = mola.load_model("my-model", adapter="scienceqa_mola"), mola.load_tokenizer("my-model")
    settings = {"max_new_tokens": 128, "temperature": 0.1, "top_p": 0.75, "top_k": 20, "seed": 0}
    assert text == mola.generate_text(model, tokenizer, prompt, **settings)
    base = mola.load_model("my-model")
    assert text != mola.generate_text(base, tokenizer, prompt, **settings), "the adapter has to change something"


def test_settings_of_the_notebook_take_effect(work, monkeypatch):
    # In bfloat16 two tokens can be equally probable: then even a single candidate leaves a choice.
    monkeypatch.setattr(mola, "load_model", functools.partial(mola.load_model, dtype="float32"))
    wide = {"temperature": 3.0, "top_p": 1.0, "top_k_g": 200, "max_new_tokens": 12, "seed": 1}
    names = run_cells(**wide)
    sampled = names["text"]
    greedy = mola.generate_text(names["model"], names["tokenizer"], names["prompt"], max_new_tokens=12)
    assert sampled != greedy
    assert run_cells(**wide)["text"] == sampled
    assert run_cells(**{**wide, "seed": 2})["text"] != sampled
    for name, narrow in (("temperature", 1e-4), ("top_p", 1e-6), ("top_k_g", 1)):
        assert run_cells(**{**wide, name: narrow})["text"] == greedy, name
    assert run_cells(**{**wide, "mola_weights": None})["text"] != sampled


def test_notebook_is_stored_without_results_and_says_nothing_of_a_machine():
    content = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(content)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(content))
    assert all(not cell.metadata for cell in content.cells)
    assert content.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    settings = code_cells(content)[0].source
    assert {"temperature = 0.1", "top_p = 0.75", "top_k_g = 20"} <= set(settings.splitlines())


def test_commands_in_the_notebook_exist():
    text = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    (line,) = re.findall(r"^mola .*$", text, re.M)
    _, name, *arguments = shlex.split(line)
    command = cli.COMMANDS[name]
    parse(cli.find(command.options), arguments, prog=name, positional=command.positional)
