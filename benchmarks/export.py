"""`python -m benchmarks.export`: how closely plain LoRAs of several ranks, made in several ways, match a mixture.

    python -m benchmarks.export --adapter runs/quickstart --task sample --data runs/quickstart/data/dataset.hf \\
        --test runs/quickstart/data/test.json --text general.txt --test_text LICENSE --output export.json

Every row is one `mola convert --to lora` in a process of its own, so that its time and peak memory can be measured.
Rows that the output file already has are not made again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.errors import in_one_line
from mola.errors import MolaError
from mola.files.atomic import atomic_write_json
from mola.files.environment import machine_description, software_versions
from mola.files.terminal import make_table_console
from mola.options.fields import find_difference, option
from mola.options.parsing import parse

_PROJECT = Path(__file__).resolve().parents[1]
# The options of `mola convert` for each way. DATA and TEXT stand for the options with the given files.
_WAYS = {
    "mean": ["--method", "mean"],
    "usage": ["--method", "usage"],
    "data": ["DATA"],
    "data and text": ["DATA", "TEXT"],
}


@dataclass
class ExportOptions:
    """Options of `python -m benchmarks.export`."""

    adapter: str = field(metadata={"help": "Run folder of the mixture."})
    task: str = field(metadata={"help": "Task of the data and tests."})
    data: str = field(metadata={"help": "Data to fit to; a tenth of them is held out for measuring."})
    test: str = field(metadata={"help": "Test file."})
    test_text: str = field(metadata={"help": "Text for measuring only; nothing is fitted to it."})
    output: str = field(metadata={"help": "Result file (JSON); rows that it lacks are added."})
    text: str | None = option(None, "General text to fit to in addition to the data, for the ways that use text.")
    base_model: str = option(str(_PROJECT / ".cache" / "SmolLM2-135M-Instruct"), "Base model.")
    ranks: list[int] = field(default_factory=lambda: [8, 16, 32, 64], metadata={"help": "Ranks."})
    ways: list[str] = field(
        default_factory=lambda: list(_WAYS), metadata={"help": f"Ways to make the LoRA, some of: {', '.join(_WAYS)}."}
    )
    dtype: str = option("auto", "Dtype of the base model.")


def measure(options: ExportOptions) -> dict[str, Any]:
    """Make the rows that the output file does not have."""
    path = Path(options.output)
    document = json.loads(path.read_text()) if path.is_file() else {"settings": asdict(options), "rows": []}
    compared = asdict(options).keys() - {"output", "ways", "ranks"}
    if name := find_difference(document["settings"], asdict(options), sorted(compared)):
        raise MolaError(
            f"`output` has rows with a different `{name}`: {document['settings'].get(name)!r}, now "
            f"{getattr(options, name)!r}. Pass a different file."
        )
    if wrong := set(options.ways) - _WAYS.keys():
        raise MolaError(f"`ways` must be some of {', '.join(_WAYS)}: got {', '.join(wrong)}.")
    needing = [way for way in options.ways if "TEXT" in _WAYS[way]]
    if needing and not options.text and options.ways != list(_WAYS):  # by default, ways without their text are skipped
        raise MolaError(f"`ways` ({', '.join(needing)}) need `text`: got none. Pass a text file.")
    made_with = {"machine": machine_description(), "versions": software_versions()}
    done = {(row["way"], row["rank"]) for row in document["rows"]}
    for way, rank in product(options.ways, options.ranks):
        if (way, rank) not in done and (options.text or "TEXT" not in _WAYS[way]):
            document["rows"].append({"way": way, "rank": rank, **_row(options, way, rank), **made_with})
            atomic_write_json(path, document)
            Console(stderr=True).print(f"{way}, rank {rank}: {document['rows'][-1]['seconds']}")
    return document


def _row(options: ExportOptions, way: str, rank: int) -> dict[str, Any]:
    files = {
        "DATA": ["--data", options.data, "--task", options.task],
        "TEXT": ["--text", str(options.text)],
    }
    words = [word for each in _WAYS[way] for word in files.get(each, [each])]
    # The means need no data, but they are measured on the same held-out rows as the fitted LoRAs.
    words += [] if "DATA" in _WAYS[way] else files["DATA"]
    words += ["--r", str(rank), "--base_model", options.base_model, "--dtype", options.dtype]
    with tempfile.TemporaryDirectory() as name:
        lora = Path(name) / "lora"
        tests = ["--test", options.test, "--test_text", options.test_text]
        seconds, peak = _run(["convert", options.adapter, "--to", "lora", *words, *tests, "--output", str(lora)])
        report = json.loads((lora / "export.json").read_text())
    keys = ("explained_by_kind", "divergence", "loss", "accuracy", "differences", "rows", "seconds")
    return {key: report[key] for key in keys} | {"wall": seconds, "peak_gb": peak}


def _run(words: list[str]) -> tuple[float, float]:
    """Seconds and peak gigabytes of memory of one `mola` command."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "mola", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise MolaError(f"`mola {' '.join(words)}` failed with status {status}.")
    return round(time.perf_counter() - start, 1), round(usage.ru_maxrss / 1e6, 2)


def table(document: dict[str, Any]) -> Table:
    """A table with one line for every row of the results."""
    head = ("way", "rank", "accuracy", "less mixture (95 %)", "KL, test", "KL, held out", "KL, other text")
    found = Table(*head, "loss, other text", "explained", "fitting, s", "peak, GB")
    for row in document["rows"]:
        less, kl, seconds = row["differences"]["lora"], row["divergence"], row["seconds"]
        low, high = less["questions_95"]
        shares = row["explained_by_kind"].values()
        found.add_row(
            row["way"],
            str(row["rank"]),
            f"{row['accuracy']['lora']['accuracy']:.1%}",
            f"{less['value']:+.1%} ({low:+.1%} to {high:+.1%})",
            *(f"{kl[kind]:.4f}" for kind in ("test answer", "answer", "other text")),
            f"{row['loss']['other text']['lora']:.3f}",
            f"{min(shares):.1%} to {max(shares):.1%}",
            f"{seconds['fitting']:.1f}",
            f"{row['peak_gb']:.1f}",
        )
    return found


@in_one_line("benchmarks.export")
def main(words: list[str] | None = None) -> int:
    """Run the command."""
    options = parse(ExportOptions, sys.argv[1:] if words is None else words, prog="python -m benchmarks.export")
    document = measure(options)
    console = make_table_console()
    for name in ("base", "mixture"):
        row = document["rows"][0]
        loss = row["loss"]["other text"][name]
        console.print(f"{name}: {row['accuracy'][name]['accuracy']:.1%}, loss on the other text {loss:.3f}")
    console.print(table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
