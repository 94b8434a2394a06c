"""Ten rows, the command line of a short run on them, and the one line in which wrong input ends."""

import json
from pathlib import Path

import pytest

from mola.cli import main


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    """Ten short prepared rows."""
    path = tmp_path_factory.mktemp("data") / "rows.json"
    rows = [
        {
            "id": f"row-{i}",
            "instruction": "Count " * (1 + i % 3) + str(i),
            "input": "",
            "output": f"Answer: The answer is {'ABC'[i % 3]}.",
            "answer": "ABC"[i % 3],
        }
        for i in range(10)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def flags(tiny_model_dir, rows_file, tmp_path):
    """Command line of a short run in `tmp_path/run`; options given replace or extend it."""

    def build(output_dir: Path | str = tmp_path / "run", **options) -> list[str]:
        settings = {
            "base_model": tiny_model_dir,
            "data": rows_file,
            "output_dir": output_dir,
            "dtype": "float32",
            "template": "meta",
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "save_total_limit": 3,
            "disable_tqdm": "true",
            **options,
        }
        return ["train", *(f"--{name}={value}" for name, value in settings.items() if value is not None)]

    return build


@pytest.fixture
def error_line(capsys):
    """Runs the command, expects wrong input, returns the error line."""

    def run(arguments: list[str]) -> str:
        assert main(arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mola train: error: ")]
        assert len(lines) == 1
        return lines[0]

    return run
