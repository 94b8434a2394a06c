"""`mola with`: programs that never import mola load its adapters; without it they end in KeyError."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from mola import MolaConfig
from mola.cli import main
from mola.integrations import startup
from tests.grids import slow

MOLA = Path(sys.executable).with_name("mola")
AUTO_PEFT = "from peft import AutoPeftModelForCausalLM as A; import sys, torch; m = A.from_pretrained(sys.argv[1])"
PIPELINE = "import sys; from transformers import pipeline; m = pipeline('text-generation', model=sys.argv[1]).model"
AUTO = "import sys; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(sys.argv[1])"
LOAD_ADAPTER = (
    "import sys; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(sys.argv[2]); "
    "m.load_adapter(sys.argv[1])"
)
TRAINER_FIRST = f"import transformers.trainer; {AUTO_PEFT}"  # which imports PEFT while it is imported itself
SHOW = "; import torch; print(m.eval()(torch.arange(3, 9)[None]).logits.sum().item())"


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = MolaConfig(num_experts="2-4", r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(folder)
    for file in Path(tiny_model_dir).glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def run(*words, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("door", slow(AUTO_PEFT, PIPELINE, AUTO, LOAD_ADAPTER, TRAINER_FIRST))
def test_common_programs_load_an_adapter(door, adapter, tiny_model_dir):
    words = (sys.executable, "-c", door + SHOW, adapter, tiny_model_dir)
    process = run(MOLA, "with", *words)
    assert process.returncode == 0, process.stderr
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), adapter).eval()
    expected = loaded(torch.arange(3, 9)[None]).logits.sum().item()
    assert float(process.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_without_mola_with_the_adapter_is_unknown(adapter):
    process = run(sys.executable, "-c", AUTO_PEFT, adapter)
    assert process.returncode == 1
    assert "KeyError: 'MOLA'" in process.stderr


@pytest.mark.slow
def test_all_processes_of_the_program_have_mola_and_nothing_else_changes(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('the user has one, too')\n", encoding="utf-8")
    child = "import peft, os; print('MOLA' in peft.PeftType.__members__, os.environ.get('OMP_WAIT_POLICY'))"
    parent = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {child!r}]) + 7)"
    process = run(MOLA, "with", sys.executable, "-c", parent, PYTHONPATH=str(tmp_path))
    assert sorted(process.stdout.splitlines()) == ["True None", *["the user has one, too"] * 3]  # of `mola with`, too
    assert process.returncode == 7


def test_without_peft_nothing_more_is_imported():
    code = "import sys; print(sorted({'torch', 'peft', 'mola'} & sys.modules.keys()))"
    assert run(MOLA, "with", sys.executable, "-c", code).stdout == "[]\n"


def test_programs_of_the_same_environment_are_found_by_name():
    process = run(MOLA, "with", "python", "-c", "import sys; print(sys.executable)", PATH="/usr/bin")
    folders = [Path(name).parent.resolve() for name in (process.stdout.strip(), sys.executable)]
    assert folders[0] == folders[1]  # resolved, since `.venv` may be a symbolic link


def test_wrong_program_and_help(capsys):
    assert main(["with", "nosuch"]) == 2
    assert "mola with: error: `mola with` needs the name of a program: there is no 'nosuch'" in capsys.readouterr().err
    assert main(["with"]) == 2
    assert main(["with", "--help"]) == 0
    assert "transformers serve" in capsys.readouterr().out


def test_a_broken_peft_is_still_an_import_error(tmp_path):
    folder = Path(startup.__file__).parent
    code = "import importlib.util\ntry:\n    import peft\nexcept ImportError as error:\n    print(error)"
    process = run(sys.executable, "-S", "-c", f"import sitecustomize\n{code}", PYTHONPATH=str(folder))
    assert "No module named 'peft'" in process.stdout
