"""Every reader against every nasty file: pipes, loops, other encodings, deep nesting, code, lies about sizes."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from mola import MolaError
from mola.allocation.probe import routing_records
from mola.architecture.notation import resolve_per_layer
from mola.checkpoints.moe_peft import read_moe_peft
from mola.checkpoints.published import read_published
from mola.checkpoints.tensors import read_tensors
from mola.cli import main
from mola.data.read import read_rows, split_names
from mola.data.tasks import load_task
from mola.evaluation.evaluate import EvaluateOptions
from mola.evaluation.resuming import AnswersFile
from mola.models.adapters import check_adapter
from mola.models.base_model import load_config
from mola.models.plan import PlanOptions
from mola.options.parsing import parse, read_recipe
from mola.reporting.load_run import gather, read_losses
from mola.studies.comparison.record import read_results
from mola.studies.continual_learning.record import RECORD_FILE, read_record
from mola.studies.train_and_test import evaluate_once
from mola.training.checkpoints import find_checkpoint
from tests.fuzz.checking import survives
from tests.fuzz.corpus import NASTY, TEXTS, Harmful, put, safetensors_files


def _test_result(path):
    return evaluate_once(EvaluateOptions(base_model="m", data="d", task="sample", output=str(path)), "ab")


def _adapter(path):
    (path.parent / "adapter_model.safetensors").write_bytes(save({"a": torch.ones(2)}))
    return check_adapter(path.parent)


def _published(path):
    (path.parent / "adapter_model.safetensors").write_bytes(save({"a": torch.ones(2)}))
    return read_published(path.parent, 1)


def _moe_peft(path):
    return read_moe_peft(path.parent, ["model.layers.0.self_attn.q_proj"], 1)


def _foreign_weights(path):
    settings = {"peft_type": "MOLA", "num_experts": 2, "top_k": 1, "r": 2, "lora_alpha": 4, "lora_dropout": 0}
    (path.parent / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    return read_moe_peft(path.parent, ["model.layers.0.self_attn.q_proj"], 1)


def _run(path):
    for name in ("run", "before", "after", "inspect"):
        if not path.name.startswith(name):
            (path.parent / f"{name}.json").unlink(missing_ok=True)
    if path.name != "run.json":
        (path.parent / "run.json").write_text('{"settings": {"base_model": "m", "data": "d"}}')
    return gather(str(path.parent))


READERS = {
    "task": ("task.yaml", load_task),
    "recipe": ("recipe.yaml", lambda path: read_recipe(str(path))),
    "recipe of a command": ("recipe.yaml", lambda path: parse(PlanOptions, ["--config", str(path)], prog="mola")),
    "json data": ("rows.json", read_rows),
    "json lines data": ("rows.jsonl", read_rows),
    "csv data": ("rows.csv", read_rows),
    "parquet data": ("rows.parquet", read_rows),
    "gzip data": ("rows.json.gz", read_rows),
    "gzip lines": ("rows.jsonl.gz", read_rows),
    "saved dataset": ("dataset_dict.json", lambda path: split_names(path.parent)),
    "state of a saved dataset": ("state.json", lambda path: read_rows(path.parent)),
    "allocation": ("experts.json", lambda path: resolve_per_layer(str(path), 4, "num_experts")),
    "adapter settings": ("adapter_config.json", _adapter),
    "published settings": ("adapter_config.json", _published),
    "foreign settings": ("adapter_config.json", _moe_peft),
    "adapter weights": ("adapter_model.safetensors", lambda path: read_tensors(path.parent)),
    "adapter pickle": ("adapter_model.bin", lambda path: read_tensors(path.parent)),
    "foreign weights": ("adapter_model.bin", _foreign_weights),
    "journal": ("out.json.partial.jsonl", lambda path: AnswersFile(path.with_name("out.json"), {}).read()),
    "record of a comparison": ("compare.json", read_results),
    "record of a sequence": (RECORD_FILE, lambda path: read_record(path.parent, False)),
    "result of a test": ("test.json", _test_result),
    "inspection": ("inspect.json", lambda path: routing_records(None, str(path))),
    "telemetry": ("routing.jsonl", lambda path: routing_records(str(path.parent), None)),
    "loss curve": ("metrics.jsonl", read_losses),
    "run record": ("run.json", _run),
    "result in a report": ("after.json", _run),
    "inspection in a report": ("inspect.json", _run),
    "telemetry in a report": ("routing.jsonl", _run),
    "losses in a report": ("metrics.jsonl", _run),
    "base model": ("config.json", lambda path: load_config(str(path.parent))),
}


@pytest.mark.parametrize("nasty", [*NASTY, *TEXTS])
def test_every_reader(tmp_path, nasty):
    if nasty == "unreadable" and os.geteuid() == 0:
        pytest.skip("root may read every file")
    for number, (name, reader) in enumerate(READERS.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        put(nasty, folder / name)
        survives(reader, folder / name)
        assert not (folder / "harm").exists()


@pytest.mark.parametrize("nasty", [name for name in NASTY if name not in ("unreadable", "cr lines", "byte order mark")])
@pytest.mark.parametrize(
    "words",
    [["plan", "--base_model", "m", "--config"], ["prepare", "--output_dir", "out", "--data"], ["prepare", "--task"]],
)
def test_commands_end_in_one_line(tmp_path, capsys, monkeypatch, nasty, words):
    monkeypatch.chdir(tmp_path)
    put(nasty, tmp_path / "file.yaml")
    assert survives(main, [*words, "file.yaml"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content"), safetensors_files(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_safetensors(tmp_path, name, content):
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    assert isinstance(survives(read_tensors, tmp_path), dict if name == "good" else MolaError)


@pytest.mark.parametrize("is_zip", [True, False])
def test_no_code_of_a_pickle_runs(tmp_path, is_zip):
    content = {"base_model.model.layers.0.q.lora_A_0.weight": Harmful(tmp_path / "harm")}
    torch.save(content, tmp_path / "adapter_model.bin", _use_new_zipfile_serialization=is_zip)
    assert isinstance(survives(read_tensors, tmp_path), MolaError)
    assert not (tmp_path / "harm").exists()


def test_a_tensor_that_claims_more_than_the_file_holds(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "adapter_model.bin")
    assert isinstance(survives(read_tensors, tmp_path), MolaError)


@pytest.mark.parametrize("size", [10, 50, 100, -8, -1])
def test_cut_parquet(tmp_path, size):
    pq.write_table(pa.table({"a": ["x"] * 100}), tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:size])
    assert isinstance(survives(read_rows, tmp_path / "rows.parquet"), MolaError)


def test_many_keys_take_no_long(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("filters: {" + ", ".join(f"a{number}: 1" for number in range(5_000)) + "}\n")
    survives(read_recipe, str(path))


@pytest.mark.parametrize("name", ["checkpoint-²", "checkpoint-1", "checkpoint-99999999999999999999999"])
def test_folders_that_look_like_checkpoints(tmp_path, name):
    (tmp_path / name).mkdir()
    assert isinstance(survives(find_checkpoint, tmp_path, "last"), MolaError)


@pytest.mark.parametrize("name", ["n" * 5000, "a\0b", "~nobody-of-this-name/x", "\ud800"])
@pytest.mark.parametrize("option", ["base_model", "adapter", "data", "task", "output", "config"])
def test_names_that_no_file_can_have(tmp_path, capsys, option, name):
    words = {"base_model": "m/x/y", "task": "sample", "data": str(tmp_path / "x.json"), "output": str(tmp_path / "o")}
    words[option] = name
    assert survives(main, ["evaluate", *(f"--{key}={value}" for key, value in words.items())]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_line_beyond_measure_in_a_compressed_file(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    survives(read_rows, path)
