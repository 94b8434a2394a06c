"""`make bench-gpu`: all of it on a CPU, and what it says where there is no GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from tests.tuner.kernels.native import needs_compiler, needs_fake_devices, needs_triton


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path / "new" / "gpu.json")]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.gpu: error: PyTorch finds no GPU here")
    assert not list(tmp_path.iterdir())


@needs_triton
@pytest.mark.slow
@needs_compiler
@needs_fake_devices
def test_a_dry_run_from_end_to_end(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry_run", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=gpu.PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(output.read_text())
    assert record["dry_run"]
    parts = ["kernels", "waits", "launches", "step", "decode_eager", "layers_0.05", "layers_0.05_torch"]
    assert list(record["parts"]) == parts
    assert all(part["ok"] for part in record["parts"].values())
    assert len(record["parts"]["waits"]["results"]["kernels"]) > 0
    assert record["parts"]["launches"]["results"]
    page = output.with_suffix(".md").read_text()
    assert page in done.stdout  # where DeepSpeed is installed, it writes a line there, too
    assert "no time here means anything" in page
    assert page.count("| mola |") == 3
    assert "| 0.05 | 8 | 8 |" in page


def test_an_earlier_result_is_not_replaced_unasked(tmp_path, capsys):
    (tmp_path / "gpu.json").write_text("{}")
    assert gpu.main(["--dry_run", "--output", str(tmp_path / "gpu.json")]) == 2
    assert "`output` must be a new file" in capsys.readouterr().err


def test_an_interrupted_run_keeps_its_parts(tmp_path, monkeypatch, capsys):
    def parts(job):
        job.run("right", "platform")
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "_all_parts", parts)
    assert gpu.main(["--dry_run", "--output", str(tmp_path / "gpu.json")]) == 130
    assert "- right: ok" in (tmp_path / "gpu.md").read_text()
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_part_had_finished_before_it_failed_is_kept(tmp_path, monkeypatch):
    job = gpu._Job(tmp_path / "gpu.json", dry_run=True, folder=tmp_path)
    (tmp_path / "step.json").write_text(json.dumps({"results": {"step": [{"provider": "mola"}]}}))
    job.suites("step", "--suite", "no_such_suite")
    part = json.loads((tmp_path / "gpu.json").read_text())["parts"]["step"]
    assert not part["ok"]
    assert part["results"] == {"step": [{"provider": "mola"}]}


def test_a_part_that_fails_leaves_the_others_their_turn(tmp_path):
    job = gpu._Job(tmp_path / "gpu.json", dry_run=True, folder=tmp_path)
    assert job.run("wrong", "json.tool", "nosuch") is None
    assert job.run("right", "platform") is not None
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["ok"] for part in record["parts"].values()] == [False, True]
    assert "nosuch" in record["parts"]["wrong"]["error"]
    assert "- wrong: FAILED" in gpu.markdown({**record, "rates": None})
