"""Errors of libraries that are no bugs: real ones, of this machine's memory and files."""

import contextlib
import errno
import json
import resource
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mola.cli import main
from mola.errors import MolaError
from mola.files.failures import explain_out_of_memory, explain_write_errors, memory_error_reason, write_error_reason
from mola.training.advice import memory_advice
from mola.training.checkpoints import newest_complete
from mola.training.options import TrainOptions


def error_of(action):
    with pytest.raises(Exception) as caught:
        action()
    return caught.value


def test_errors_about_memory_are_known():
    assert memory_error_reason(error_of(lambda: torch.empty(1 << 50))) == f"{4 << 20:.1f} GiB could not be allocated"
    assert memory_error_reason(error_of(lambda: bytearray(1 << 50))) == "no memory left"
    gpu = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB."
    assert memory_error_reason(torch.OutOfMemoryError(gpu)) == "CUDA out of memory. Tried to allocate 2.50 GiB"


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError("a"), Exception("a")]
)
def test_other_errors_pass_unchanged(error):
    assert memory_error_reason(error) is None
    assert write_error_reason(error) is None
    with pytest.raises(type(error)), explain_out_of_memory("Buy some."), explain_write_errors("`output`"):
        raise error


@pytest.mark.parametrize(("path", "reason"), [("/dev/full", "No space left on device"), ("/no/such/place", None)])
def test_errors_of_tokenizers_are_known(path, reason, tiny_tokenizer):
    assert write_error_reason(error_of(lambda: tiny_tokenizer.backend_tokenizer.save(path))) == reason


def test_errors_about_files_are_known(tmp_path):
    assert write_error_reason(FileNotFoundError(errno.ENOENT, "no such file")) is None
    full = error_of(lambda: Path("/dev/full").write_text("x"))
    assert write_error_reason(full) == "No space left on device"
    message = r"^`output` cannot be written: No space left on device\. Free some space"
    with pytest.raises(MolaError, match=message), explain_write_errors("`output`"):
        raise full
    assert write_error_reason(PermissionError(errno.EACCES, "no", "/a")) == "Permission denied: /a"


@pytest.fixture
def at_most():
    """Limit the size of files, or the memory of this process, until the end of the test."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the memory in use is read from /proc, which Linux has")
    before = {kind: resource.getrlimit(kind) for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS)}

    def limit(kind, size):
        resource.setrlimit(kind, (size, before[kind][1]))

    yield limit
    for kind, values in before.items():
        resource.setrlimit(kind, values)


@pytest.mark.parametrize(
    ("save", "size"),
    # torch has another error for the last of its 41 kB
    [(lambda tensors, path: save_file(tensors, path), 10_000), (torch.save, 10_000), (torch.save, 40_700)],
)
def test_errors_of_libraries_that_cannot_write_a_whole_file_are_known(save, size, tmp_path, at_most):
    at_most(resource.RLIMIT_FSIZE, size)
    assert write_error_reason(error_of(lambda: save({"a": torch.zeros(10_000)}, tmp_path / "file")))


def test_advice_keeps_the_effective_batch(tmp_path):
    def advice(**settings):
        return memory_advice(TrainOptions(base_model="a/b", output_dir=str(tmp_path), use_cpu=True, **settings))

    text = advice(per_device_train_batch_size=8, gradient_accumulation_steps=3, dtype="float32")
    assert "--batch_size 4 --gradient_accumulation_steps 6" in text
    assert "--activation_checkpointing" in text
    assert "--dtype bfloat16" in text
    assert "--gradient_accumulation_steps 15" in advice(per_device_train_batch_size=5, gradient_accumulation_steps=3)
    text = advice(per_device_train_batch_size=1, activation_checkpointing=True, dtype="bfloat16")
    assert text.startswith("Pass a lower --cutoff_len (512)")


def test_training_without_enough_memory_says_what_to_do(tiny_model_dir, tmp_path, at_most, capsys):
    """The address space is limited to 300 MiB more than is in use; the logits of a batch need 480 MB."""
    rows = [{"instruction": "a" * 900, "input": "", "output": "b"}] * 1024
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    flags = {"base_model": tiny_model_dir, "data": tmp_path / "rows.json", "output_dir": tmp_path / "run"}
    flags |= {"dtype": "float32", "r": 2, "num_experts": 2, "template": "meta", "cutoff_len": 1000, "use_cpu": "true"}
    flags |= {
        "per_device_train_batch_size": 512,
        "eval_strategy": "no",
        "disable_tqdm": "true",
        "max_steps": 1,
        "warmup_steps": 0,
    }
    with contextlib.suppress(ImportError):
        import numba  # noqa: F401  # first imported under the limit it stays broken for the rest of the process
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    at_most(resource.RLIMIT_AS, used + (300 << 20))
    assert main(["train", *(f"--{name}={value}" for name, value in flags.items())]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("mola train: error: out of memory: ")
    assert "--batch_size 256 --gradient_accumulation_steps " in message
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "failed"
    assert record["error"].startswith("out of memory")
    assert newest_complete(tmp_path / "run") is None
