"""The notebooks run in a kernel, their settings do what they say, and they are stored without results."""

import contextlib
import functools
import io
import os
import re
import shlex
from pathlib import Path

import nbformat
import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from peft import get_peft_model

import mola
from mola import cli
from mola.models.prompts import trained_settings
from mola.options.parsing import parse
from tests.waiting import PATIENCE

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
INFERENCE, CHATS, SKILLS = (NOTEBOOKS / f"{name}.ipynb" for name in ("mola_inference", "your_chats", "grow_skills"))
ALL = pytest.mark.parametrize("path", [INFERENCE, CHATS, SKILLS], ids=lambda path: path.stem)
# Libraries warn about what they will do one day; here only our own words count.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_model_dir):
    """A working folder with a base model."""
    (tmp_path / "my-model").symlink_to(tiny_model_dir)
    for variable in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        (tmp_path / ".home" / variable).mkdir(parents=True)
        monkeypatch.setenv(variable, str(tmp_path / ".home" / variable))
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")
    for variable, value in (("PATH", os.environ["PATH"]), ("COLUMNS", "80")):  # a notebook changes them
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def work(folder, tiny_model):
    """The folder with the adapter that the notebook names."""
    torch.manual_seed(1)
    model = get_peft_model(tiny_model, mola.MolaConfig(num_experts=[1, 2, 2, 3], r=4, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "mola_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "scienceqa_mola")
    return folder


def notebook(path, **settings):
    """The notebook, with other values in its cell of settings."""
    content = nbformat.read(path, as_version=4)
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
        for cell in code_cells(notebook(INFERENCE, **settings)):
            exec(compile(cell.source, cell.id, "exec"), names)
    return names


def run_in_kernel(content, folder):
    NotebookClient(
        content, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
def test_notebook_in_a_kernel_prints_what_generate_text_returns(work):
    content = notebook(INFERENCE)
    run_in_kernel(content, work)
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


class Shell:
    """Runs the `!mola` lines of a notebook in this process, except those of one command."""

    def __init__(self, names, skip):
        self.names, self.skip = names, skip

    def system(self, line):
        program, command, *arguments = shlex.split(line.format(**self.names))
        assert program == "mola"
        if command != self.skip:
            assert cli.main([command, *arguments]) == 0


def run_here(content, capsys, skip=None):
    """Run a notebook in this process; the names it defines, and what each cell prints."""
    names, outputs = {"__name__": "__main__"}, []
    names["get_ipython"] = lambda: Shell(names, skip)
    for cell in code_cells(content):
        exec(compile(TransformerManager().transform_cell(cell.source), cell.id, "exec"), names)
        outputs.append(capsys.readouterr())
    return names, outputs


def test_chats_are_trained_shown_and_asked(folder, capsys, caplog):
    content = notebook(CHATS, MODEL="my-model", EPOCHS=1, LEARNING_RATE=1e-2)
    names, outputs = run_here(content, capsys, skip="compare")
    _, _, _, chat, _, report, ask, _ = outputs
    assert "60 conversations, 1.0 turns each, template alpaca for conversations" in chat.out
    marked = re.findall(r"\x1b\[30;42m(.*?)\x1b\[0m", chat.out, re.S)
    assert marked == ["At Pelican Cycles, a chain is 24 euros. Bring your bicycle in!</s>"]
    assert re.search(r"experts per layer +2468$", caplog.text, re.M)
    assert "report.html" in report.out
    assert "experts" in names["page"]
    before, after = re.fullmatch(r"Base model:   (.*)\nWith adapter: (.*)\n", ask.out, re.S).groups()
    assert before != after


@pytest.mark.slow
def test_chats_in_a_kernel_end_with_a_verdict(folder):
    content = notebook(CHATS, MODEL="my-model", EPOCHS=1, LEARNING_RATE=1e-2)
    run_in_kernel(content, folder)
    outputs = [printed(cell) for cell in code_cells(content)]
    assert "experts per layer  2468" in outputs[4]
    assert "<iframe" in code_cells(content)[5].outputs[-1].data["text/html"]
    assert re.search(r"On 24 test rows and 2 seeds, the loss of 2468 is \S+ nats per token", outputs[7])
    assert "Serve it: mola serve" in outputs[7]


def test_skills_grow_and_one_is_removed(folder, capsys):
    content = notebook(SKILLS, MODEL="my-model", EPOCHS=1, LEARNING_RATE=1e-2, NUM_ASKED=1)
    names, outputs = run_here(content, capsys)
    *_, first, second, third, _, in_sequence, removed = (each.out for each in outputs)
    assert re.match(r"workshop: [01] of 1 right \{'\w+': 1\}\n", first)
    assert "The same as before: 1 of 1 skills, " in second
    assert "The same as before: 2 of 2 skills, " in third
    counts = {name: sum(asked.values()) for name, asked in names["result"].asked.items()}
    assert counts == {"workshop": 12, "library": 12, "bus": 12, "base": 8}
    tested = re.findall(r"^(\w+): [01] of 1 right", in_sequence, re.M)
    assert tested == ["workshop", "workshop", "library", "workshop", "library", "bus"]
    assert trained_settings("town/lora-3")["adapter"] == "town/lora-2"
    assert mola.Skills("town/skills").names == ["bus", "workshop"]
    asked = re.findall(r"right \{'(\w+)': 1\}", removed)
    for who, (question, answer) in zip(asked, names["found"].items(), strict=True):
        adapter = None if who == "base" else f"town/skills/{who}"
        assert names["ask"](mola.load_model("my-model", adapter=adapter), question) == answer


@pytest.mark.slow
def test_skills_grow_in_a_kernel(folder):
    content = notebook(SKILLS, MODEL="my-model", EPOCHS=1, LEARNING_RATE=1e-2, NUM_ASKED=1)
    run_in_kernel(content, folder)
    assert "The same as before: 2 of 2 skills, " in printed(code_cells(content)[6])


@ALL
def test_notebook_is_stored_without_results_and_says_nothing_of_a_machine(path):
    content = nbformat.read(path, as_version=4)
    nbformat.validate(content)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(content))
    assert all(not cell.metadata for cell in content.cells)
    assert content.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_sampling_of_the_notebook_is_that_of_the_research_code():
    settings = code_cells(notebook(INFERENCE))[0].source
    assert {"temperature = 0.1", "top_p = 0.75", "top_k_g = 20"} <= set(settings.splitlines())


@ALL
def test_commands_in_the_notebook_exist(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells).replace("\\\n", " ")
    values = {"MODEL": "my-model", "CHATS": "chats.jsonl", "EPOCHS": 1, "LEARNING_RATE": 0.001, "FOLDER": "folder"}
    lines = re.findall(r"^!?(mola .* --.*)$", text, re.M)
    assert lines
    for line in lines:
        _, name, *arguments = shlex.split(line.format(**values))
        command = cli.COMMANDS[name]
        parse(cli.find(command.options), arguments, prog=name, positional=command.positional)
