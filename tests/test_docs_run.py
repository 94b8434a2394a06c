"""Every code block of the documentation runs, or `NOT_RUN` says why it does not.

`tests/docs_blocks.py` has the marks. The working folder of a page has `my-model` (tiny, random), `data/sample`, and
what the page names and `tests/docs_supplies.py` makes. Of a bash block

- `mola` commands and `python scripts/...` run in this process, with few steps (`FEW`) and small models (`INSTEAD`);
- `mola serve` runs on a free port until the page ends or starts the next server, and `curl` asks it;
- `export` holds for the page's bash blocks;
- `pip install` and `make` are checked alone: the extras and targets exist.

`tests/test_docs.py` checks the flags of all commands, of lines that do not run too.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import tomllib
import urllib.request
from pathlib import Path

import pytest
import yaml

from mola import cli
from mola.integrations.axolotl_fields import given_settings, new_config
from mola.options.parsing import parse
from mola.serving.serve import ServeOptions, running_server
from mola.studies.comparison.options import CompareOptions
from tests.docs_blocks import PAGES, ROOT, blocks, lines, page_id, write_files
from tests.docs_supplies import prepare_sample, supply
from tests.versions import has
from tests.waiting import PATIENCE

SLOW = ("allocating.md", "comparing.md", "continual.md", "export.md", "from-the-research-code.md", "inspection.md")
SLOW += ("quantization.md", "report.md", "training.md")
_STEPS = ["--max_steps", "2", "--warmup_steps", "0"]
FEW = {"train": _STEPS, "compare": _STEPS, "continual": _STEPS, "evaluate": ["--limit", "4"]}
TINY = ["--base_model", "my-model", "--cutoff_len", "1024"]
INSTEAD = {"Qwen/Qwen3-0.6B": "my-model"}
CHECKED = ("pip", "make")

AXOLOTL, COMPARE = "a file of axolotl, read below", "a part of a file of `mola compare`, read below"
DEMO = "a page that runs until it is closed: tests/serving/demonstration"
FACTORY = "needs LLaMA-Factory: tests/integrations/test_llama_factory.py"
LAUNCHER = "starts several processes: tests/distributed"
LM_EVAL = "reads tasks from the Hub: tests/evaluation/test_lm_eval.py"
PREPARE, SCRIPT = "reads the Hub: tests/data/test_prepare.py", "reads the Hub: tests/research_code/test_preparation.py"
SWIFT = "needs ms-swift: tests/integrations/test_ms_swift.py"
TRANSFORMERS = "needs Transformers' server: tests/serving/test_transformers_server.py"
TRL = "TRL's command: tests/trainers/test_command_line.py"
VLLM = "needs vLLM: tests/integrations/test_vllm.py"
WITH = "another program: tests/integrations/test_with_program.py"
# Page -> how a line of a bash block, or another block, begins -> why it does not run here, and what runs it instead.
NOT_RUN = {
    "docs/get-started/tutorial.md": {"": "tests/test_tutorial.py runs the page"},
    "docs/guides/allocating.md": {"recipes:": COMPARE},
    "docs/guides/axolotl.md": {
        "axolotl train": "needs axolotl: tests/integrations/test_axolotl.py",
        "adapter: mola": AXOLOTL,
    },
    "docs/guides/comparing.md": {"tune:": COMPARE},
    "docs/guides/data.md": {
        "mola prepare scienceqa": PREPARE,
        "mola prepare openorca": PREPARE,
        "from datasets import load_dataset": "reads the Hub",
        "python scripts/preparation": SCRIPT,
    },
    "docs/guides/demo.md": {"mola demo": DEMO},
    "docs/guides/distributed.md": {"": LAUNCHER},
    "docs/guides/export.md": {"python convert_": "programs of llama.cpp"},
    "docs/guides/from-the-research-code.md": {
        "python scripts/preparation_instruction_data.py": SCRIPT,
        "python scripts/mola_training_instruction.py": "reads what that line writes: tests/research_code/training",
    },
    "docs/guides/llama-factory.md": {"python -m": FACTORY, "torchrun": FACTORY},
    "docs/guides/lm-eval.md": {"mola lm-eval runs/first": LM_EVAL, "mola with": LM_EVAL},
    "docs/guides/ms-swift.md": {"swift": SWIFT},
    "docs/guides/other-programs.md": {"mola with": WITH},
    "docs/guides/quantization.md": {
        "mola train --base_model folder": "needs a GGUF file: tests/quantised/test_gguf.py"
    },
    "docs/guides/serving.md": {
        "mkdir": TRANSFORMERS,
        "cp -L": TRANSFORMERS,
        "python serve_mola.py": TRANSFORMERS,
        "curl http://127.0.0.1:8001": TRANSFORMERS,
        "limit_conn_zone": "a file of nginx",
    },
    "docs/guides/skills.md": {"mola lm-eval": LM_EVAL, "mola demo": DEMO},
    "docs/guides/training.md": {
        "mola train --config recipe.yaml --output runs/two": LAUNCHER,
        "mola train --config recipe.yaml --output_dir runs/packed": "too long a row: tests/training/test_packing.py",
    },
    "docs/guides/trl.md": {"python -m": TRL, "accelerate launch": TRL},
    "docs/guides/unsloth.md": {"from unsloth": "needs unsloth and a GPU: tests/integrations/test_unsloth.py"},
    "docs/guides/vllm.md": {"": VLLM},
}
_KINDS = ("", "text")  # formulas, lists of files, outputs


def pages(slow=()):
    found = [page for page in PAGES if any(block.mark == "run" for block in blocks(page))]
    return [
        pytest.param(page, id=page_id(page), marks=[pytest.mark.slow] if page.name in slow else []) for page in found
    ]


def why_not(page, text):
    """The exceptions that are for this line of a page."""
    return {(page_id(page), start) for start in NOT_RUN.get(page_id(page), ()) if text.startswith(start)}


@pytest.fixture(scope="session")
def made(tmp_path_factory, tiny_model_dir):
    """Where supplies are kept."""
    return tmp_path_factory.mktemp("supplies")


@pytest.fixture
def work(tmp_path, monkeypatch, tiny_model_dir):
    """The working folder that every page may assume."""
    (tmp_path / "my-model").symlink_to(tiny_model_dir)
    monkeypatch.chdir(tmp_path)
    prepare_sample(tmp_path / "data" / "sample")
    return tmp_path


class Reader:
    """Runs the blocks of a page one after the other."""

    def __init__(self, page):
        self.page = page
        self.names = {"__name__": "__main__"}
        self.variables = {}
        self.server = contextlib.ExitStack()
        self.url = None

    def run(self, block):
        if block.kind == "python":
            # Empty lines in front: a traceback then shows the line of the page.
            exec(compile("\n" * block.line + block.text, str(self.page), "exec"), self.names)
            return
        for line in lines(block):
            with pytest.MonkeyPatch.context() as patch:
                for name, value in self.variables.items():
                    patch.setenv(name, value)
                if line and not why_not(self.page, shlex.join(line)):
                    assert self.run_line(line, patch) == 0, f"{page_id(self.page)}: {shlex.join(line)}"

    def run_line(self, line, patch):
        """Exit code of a line of a bash block."""
        match [INSTEAD.get(word, word) for word in line]:
            case ["mola", "serve", *words]:
                return self.serve(words)
            case ["mola", name, *words]:
                return cli.main([name, *few(name, words)])
            case ["python", script, *words] if script.startswith("scripts/"):
                return run_script(script, words, patch)
            case ["curl", url, *words]:
                return ask(url.replace("http://127.0.0.1:8000", self.url), [os.path.expandvars(word) for word in words])
            case ["export", *settings]:
                self.variables |= dict(setting.split("=", 1) for setting in settings)
                return 0
            case [program, *_] if program in CHECKED:
                return 0
            case [program, *_]:
                return f"{program} is no program that pages may run"

    def serve(self, words):
        self.server.close()
        options = parse(ServeOptions, words, prog="serve", positional="adapter")
        options.port = 0
        self.url = self.server.enter_context(running_server(options))
        return 0


def few(name, words):
    """The words of a command that take the least time; outputs that the page has made before are removed."""
    if "--config" in words:
        recipe = words.index("--config") + 1
        if not words[recipe].startswith("recipes/"):  # of the page, which sets the steps
            return words
        words = [*words[:recipe], str(ROOT / words[recipe]), *words[recipe + 1 :], *TINY]
    if name in ("convert", "merge", "prepare"):
        shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)
    return [*words, *FEW.get(name, [])]


def run_script(script, words, patch):
    patch.setattr("sys.argv", [script, *words])
    patch.syspath_prepend(ROOT / "scripts")  # as Python does
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return exit.value.code or 0


def ask(url, words):
    """Send what `curl` would send."""
    headers = dict(value.split(": ", 1) for option, value in itertools.pairwise(words) if option == "-H")
    request = urllib.request.Request(url, words[words.index("-d") + 1].encode(), headers)
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        return 0 if response.status == 200 and response.read() else response.status


# Libraries warn about what they will do one day; here only our own words count.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", pages(SLOW))
def test_code_runs(page, work, made):
    if page.name == "trl.md" and importlib.util.find_spec("trl") and not has("trl", "0.27"):
        pytest.skip("needs TRL 0.27: its DPO reads `warnings_issued`, which models of Transformers 5 do not have")
    wanted = [block for block in blocks(page) if block.mark == "run"]
    missing = {block.value for block in wanted if block.value and importlib.util.find_spec(block.value) is None}
    if all(block.value in missing for block in wanted):
        pytest.skip(f"needs {', '.join(missing)}")
    if missing:
        print(f"{page_id(page)}: what needs {', '.join(missing)} is left out")
    write_files(page, work)
    supply(page, work, made)
    reader = Reader(page)
    with contextlib.closing(reader.server):
        for block in wanted:
            if block.value not in missing:
                reader.run(block)


GUIDES = [page for page in PAGES if page.name == "README.md" or page.parent.name in ("get-started", "guides")]


def parts(block):
    """What runs or does not as a whole: the lines of a bash block, or another block, known by its first line."""
    if block.kind == "bash":
        return [shlex.join(line) for line in lines(block) if line]
    return block.text.splitlines()[:1]


def test_every_block_runs_or_says_why_not():
    forgotten, used = [], set()
    for page in GUIDES:
        for block in blocks(page):
            if block.kind in _KINDS or block.mark == "file":
                continue
            for text in parts(block):
                used |= why_not(page, text)
                if not (why_not(page, text) or block.mark == "run" or text.startswith(CHECKED)):
                    forgotten.append(f"{page_id(page)}:{block.line}: {text}")
    assert forgotten == []
    assert {(page, start) for page, starts in NOT_RUN.items() for start in starts} - used == set()
    named = {
        path for starts in NOT_RUN.values() for why in starts.values() for path in re.findall(r"tests/[\w/.]+", why)
    }
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_blocks_without_a_language_have_no_commands():
    texts = [(page_id(page), block) for page in GUIDES for block in blocks(page) if not block.kind]
    assert [
        (page, block.line) for page, block in texts if re.search("^(mola|python|pip|make|curl) ", block.text, re.M)
    ] == []


def test_extras_and_targets_of_pip_and_make_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for page in GUIDES:
        words = [line for block in blocks(page) if block.kind == "bash" for line in lines(block)]
        wanted = [
            re.fullmatch(r"(?:mola-peft|\.)\[(.+)\]", word) for line in words for word in line if line[0] == "pip"
        ]
        assert {extra for match in wanted if match for extra in match[1].split(",")} <= extras.keys(), page_id(page)
        assert {word for line in words for word in line[1:] if line[0] == "make"} <= set(targets), page_id(page)


def test_blocks_that_do_not_run_are_read(work):
    """By Python's compiler, or by what takes the settings."""
    for page in GUIDES:
        files = [yaml.safe_load(block.text) for block in blocks(page) if block.mark == "file" and block.kind == "yaml"]
        for block in [block for block in blocks(page) if block.mark is None]:
            if block.kind == "python":
                compile(block.text, str(page), "exec")
            elif block.kind == "json":
                json.loads(block.text)
            elif block.kind == "yaml" and page.name == "axolotl.md":
                assert new_config(given_settings({"base_model": "my-model", **yaml.safe_load(block.text)}))
            elif block.kind == "yaml":
                study = {"base_model": "my-model", "data": "mine.jsonl", **(files[0] if files else {})}
                Path("study.yaml").write_text(json.dumps({**study, **yaml.safe_load(block.text)}), encoding="utf-8")
                assert parse(CompareOptions, ["--config", "study.yaml", "--output", "out"], prog="compare")
