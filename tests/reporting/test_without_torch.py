"""Help, wrong flags, wrong paths, `report` and `doctor` import none of the libraries that take seconds to import."""

import json
import subprocess
import sys
from pathlib import Path

from mola.cli import COMMANDS

SLOW = ("torch", "transformers", "peft", "datasets", "accelerate", "numba", "pandas", "scipy", "pyarrow", "triton")
PROGRAM = """
import contextlib, io, json, sys
sys.argv = ["mola"]
from mola.cli import main

answers = []
for words in json.loads(sys.stdin.read()):
    out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    out.seek(0)
    answers.append([code, out.read() + err.getvalue(), [name for name in %r if name in sys.modules]])
print(json.dumps(answers))
"""


def answers(*calls):
    """Exit code, output, and the slow libraries that are imported by then, of each call."""
    command = [sys.executable, "-c", PROGRAM % (SLOW,)]
    process = subprocess.run(command, input=json.dumps(calls), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_help_and_wrong_flags():
    calls = [["--help"], *([*name.split(), word] for name in COMMANDS for word in ("--help", "--dta=x"))]
    calls += [["train", "--optm", "sgd"], ["train", "--config", "nowhere.yaml"], ["nosuch"]]
    calls += [["skills", "--help"], ["skills", "ad"]]
    for words, (code, text, imported) in zip(calls, answers(*calls), strict=True):
        assert (words, imported) == (words, [])
        assert code == (0 if "--help" in words else 2)
        assert ("usage: mola" if "--help" in words else "error: ") in text
        if "--optm" in words:
            assert "--optim" in text  # an option of TrainingArguments


def test_wrong_paths(tiny_model_dir, tmp_path):
    (tmp_path / "data.json").write_text("[]")
    missing = str(tmp_path / "nowhere")
    train = ["train", "--output", str(tmp_path / "out")]
    given = ["--base_model", str(tiny_model_dir)]
    calls = [
        [*train, "--base_model", missing, "--data", missing],
        [*train, *given, "--data", f"{missing}.json"],
        [*train, *given, "--data", str(tmp_path / "data.json"), "--adapter", missing],
        ["compare", "--output", str(tmp_path / "out"), *given, "--data", f"{missing}.json"],
        ["evaluate", *given, "--task", "sample", "--data", f"{missing}.json"],
        ["generate", missing, "--prompt", "x"],
        ["generate", *given, "--adapter", missing, "--prompt", "x"],
        ["serve", "--base_model", missing],
        ["plan", "--base_model", missing],
        ["train", "--base_model", Path(missing).name, "--data", str(tmp_path / "data.json"), "--output", "out"],
        ["generate", "--base_model", "owner/nowhere", "--prompt", "x"],
        ["allocate", *given, "--method", "gradient", "--budget", "20", "--data", f"{missing}.json"],
        ["reallocate", missing, "--num_experts", "2468", "--output", str(tmp_path / "out")],
        ["convert", missing, "--to", "lora", "--output", str(tmp_path / "out")],
        ["merge", missing, "--output", str(tmp_path / "out")],
        ["inspect", missing, "--data", missing],
        ["report", missing],
        ["doctor", missing],
        ["prepare", "commonsenseqa", "--data", f"{missing}.json", "--output", str(tmp_path / "out")],
    ]
    for words, (code, text, imported) in zip(calls, answers(*calls), strict=True):
        assert (words, code, imported) == (words, 2, [])
        assert Path(missing).name in text
        assert len(text.splitlines()) == 1


def test_report_and_doctor(run_dir):
    calls = [["doctor", str(run_dir)], ["report", str(run_dir), "--overwrite"]]
    (run_dir / "report.html").unlink(missing_ok=True)
    for words, (code, text, imported) in zip(calls, answers(*calls), strict=True):
        assert (words, code, imported) == (words, 0, []), text
    assert (run_dir / "report.html").is_file()
