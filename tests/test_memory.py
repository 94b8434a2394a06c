"""Freed memory: mola's own programs keep it, others and users who have chosen do as before. Counted in page faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.command import main

from mola._process import KEEP_MEMORY, MALLOC_VARIABLES

try:
    GLIBC = os.confstr("CS_GNU_LIBC_VERSION").startswith("glibc")
except (AttributeError, ValueError, OSError):
    GLIBC = False
pytestmark = pytest.mark.skipif(not GLIBC, reason="glibc's malloc only")

# Blocks as large as a logits tensor, each freed before the next one is made, all written to.
ALLOCATE = """
import resource
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        b"x" * (32 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(1)
print(faults(10))
"""
# A page may be a huge one: of 2 MiB, 16 in a block.
FEW, MANY = 50, 10 * 16


def printed(folder, name, text, *words, **variables):
    """What a program of this name and text prints."""
    (folder / name).write_text(text)
    environment = {key: value for key, value in os.environ.items() if key not in (*MALLOC_VARIABLES, "LD_PRELOAD")}
    command = [sys.executable, str(folder / name), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_own_programs_keep_freed_memory(tmp_path):
    kept, lost = (printed(tmp_path, "mola", lines + ALLOCATE) for lines in ("import mola", ""))
    assert int(kept[0]) < FEW
    assert int(lost[0]) >= MANY


def test_the_environment_does_the_same(tmp_path):
    assert int(printed(tmp_path, "any.py", ALLOCATE, **KEEP_MEMORY)[0]) < FEW


@pytest.mark.parametrize(
    "variables",
    [
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"},
    ],
)
def test_the_choice_of_the_user_stays(tmp_path, variables):
    assert int(printed(tmp_path, "mola", "import mola" + ALLOCATE, **variables)[0]) >= MANY


def test_another_allocator_is_left_alone(tmp_path):
    # It need not exist: the loader says so and goes on.
    lines = "from mola._process import keep_freed_memory\nprint(keep_freed_memory())\n"
    assert printed(tmp_path, "mola", lines, LD_PRELOAD="/nowhere/libjemalloc.so.2") == ["False"]
    assert printed(tmp_path, "mola", lines) == ["True"]


# ------------------------------------------------------------------ the benchmarks

BENCHMARKS = f"""
import subprocess, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from benchmarks.command import main
assert main(sys.argv[1:]) == 0
"""
CHILD = f"""
print(subprocess.run([sys.executable, "-c", {ALLOCATE!r}], capture_output=True, text=True, check=True).stdout)
"""


@pytest.mark.slow
@pytest.mark.parametrize("keeps", [True, False])
def test_benchmarks_keep_freed_memory_if_asked_to(tiny_model_dir, tmp_path, keeps):
    words = ["--suite", "counts", "--model", str(tiny_model_dir), "--seq_len", "12", "--dropout", "0", "--r", "4"]
    words += ["--providers", "mola", "--dtype", "float32", "--output", str(tmp_path / "results.json")]
    program = BENCHMARKS + ALLOCATE + CHILD
    counted = printed(tmp_path, "bench.py", program, *words, "--keep_memory", str(keeps).lower())
    own, started = (int(line) for line in counted if line.isdecimal())
    for faults in (own, started):
        assert faults < FEW if keeps else faults >= MANY


def test_benchmarks_refuse_to_overrule_the_user(tiny_model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")
    output = str(tmp_path / "results.json")
    assert main(["--model", str(tiny_model_dir), "--output", output, "--suite", "counts", "--keep_memory", "true"]) == 2
    assert "`keep_memory` needs glibc's malloc, and none of MALLOC_TRIM_THRESHOLD_, " in capsys.readouterr().err
