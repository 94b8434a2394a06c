"""Options that are paths become texts, as records of what was asked for need them."""

from dataclasses import asdict
from pathlib import Path

import pytest

from mola.allocation.options import AllocateOptions
from mola.evaluation.evaluate import EvaluateOptions
from mola.evaluation.lm_eval import LmEvalOptions
from mola.exporting.options import ConvertOptions


@pytest.mark.parametrize(
    "options",
    [
        AllocateOptions(Path("model"), "uniform", 4, output=Path("file")),
        EvaluateOptions(Path("model"), "sample", data="data", output=Path("file")),
        LmEvalOptions(Path("model"), "piqa", output=Path("file")),
        ConvertOptions([Path("one"), Path("two")], Path("folder")),
    ],
    ids=lambda options: type(options).__name__,
)
def test_paths_are_texts(options):
    values = [item for value in asdict(options).values() for item in (value if isinstance(value, list) else [value])]
    assert not any(isinstance(value, Path) for value in values)
    assert {"model", "file"} <= {*map(str, values)} or {"one", "two", "folder"} <= {*map(str, values)}
