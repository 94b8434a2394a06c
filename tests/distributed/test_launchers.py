"""The commands of docs/distributed.md as a user types them, and the configurations in recipes/accelerate."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from mola import MolaError
from mola._process import is_own_module
from mola.training.sharding import check_sharding
from tests.waiting import PATIENCE, wait_until

from .conftest import ROOT, assert_same_run, free_port, record
from .forks import number_of_lines
from .test_ddp import ROUTER_LOSSES
from .test_fsdp import TOLERANCE

RECIPES = ROOT / "recipes" / "accelerate"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
ACCELERATE = ["-m", "accelerate.commands.launch", f"--config_file={RECIPES / 'ddp_cpu.yaml'}"]


def start(launcher, arguments):
    # No thread count: it is the launcher's to choose.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    port = [f"--master_port={free_port()}"] if launcher is TORCHRUN else []
    command = [sys.executable, *launcher, *port, "-m", "mola.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process):
    output = process.communicate(timeout=PATIENCE)[0]
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate launch"])
def test_stopped_through_the_launcher_and_resumed(processes, flags, tmp_path, launcher):
    options = {**ROUTER_LOSSES, "num_train_epochs": 15}
    processes.mola(flags(tmp_path / "whole", **options))
    folder = tmp_path / "part"
    arguments = [word for word in flags(folder, **options) if not word.startswith("--r=")]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("r: 4\n", encoding="utf-8")  # torchrun takes `--r` for one of its own flags
    arguments.append(f"--config={recipe}")
    process = start(launcher, arguments)
    try:
        wait_until(lambda: number_of_lines(str(folder / "metrics.jsonl")) >= 5, process)
        process.send_signal(signal.SIGTERM)
        code, output = finish(process)
    finally:
        process.kill()
    assert code != 0
    assert record(folder)["status"] == "interrupted", output
    assert 0 < record(folder)["steps"] < 60
    code, output = finish(start(launcher, [*arguments, "--resume_from_checkpoint=last"]))
    assert code == 0, output
    assert record(folder)["processes"] == 2
    assert output.count("The adapter is in") == 1
    assert_same_run(folder, tmp_path / "whole", 0.0)


def test_a_process_of_a_launcher_is_known_as_the_command():
    """So it waits passively and keeps its memory, as `mola` does."""
    assert is_own_module([sys.executable, "-u", "-m", "mola.cli", "train"])
    assert not is_own_module([sys.executable, "-m", "pytest", "mola.cli"])


def environment_of(name):
    """What `accelerate launch` sets for a configuration."""
    arguments = launch_command_parser().parse_args(["--config_file", str(RECIPES / name), "-m", "mola.cli", "train"])
    arguments, *_ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    return arguments, {name: value for name, value in environment.items() if os.environ.get(name) != value}


@pytest.mark.parametrize("name", [path.name for path in sorted(RECIPES.glob("*.yaml"))])
def test_configurations_are_read_by_accelerate(name):
    config = load_config_from_file(str(RECIPES / name))
    kind = {"fsdp2.yaml": "FSDP", "zero3.yaml": "DEEPSPEED"}.get(name, "MULTI_GPU")
    assert str(config.distributed_type.value) == kind
    assert config.num_processes == 2
    first, *_ = (RECIPES / name).read_text(encoding="utf-8").splitlines()
    assert first.startswith(f"# accelerate launch --config_file recipes/accelerate/{name} -m mola.cli train")


def test_zero3_configuration_is_the_one_meant():
    arguments, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(RECIPES / "zero3.yaml"), "-m", "mola.cli", "train"])
    )
    assert arguments.use_deepspeed
    assert (arguments.zero_stage, arguments.zero3_save_16bit_model) == (3, True)


def test_deepspeed_does_not_round_routers(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    options = SimpleNamespace(fsdp=None, deepspeed=None, bf16=True, fp16=False)
    with pytest.raises(MolaError, match="`dtype` must be float32 with DeepSpeed"):
        check_sharding(options, None)
    options.bf16 = False
    check_sharding(options, None)


@pytest.mark.slow
def test_fsdp_configuration_shards(processes, flags, tmp_path):
    """Without any flag of mola: the launcher's variables are enough."""
    arguments, environment = environment_of("fsdp2.yaml")
    assert arguments.use_fsdp
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    processes.mola(flags(tmp_path / "two", **ROUTER_LOSSES), shard=True, environment=environment)
    assert (tmp_path / "two" / "checkpoint-4" / "pytorch_model_fsdp.bin").is_file()
    processes.mola(flags(tmp_path / "one", gradient_accumulation_steps=2, **ROUTER_LOSSES), processes=1)
    assert_same_run(tmp_path / "two", tmp_path / "one", TOLERANCE)
