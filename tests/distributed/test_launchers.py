"""The commands of docs/guides/distributed.md as a user types them, and the configurations in recipes/accelerate."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch.distributed.run
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mola import MolaError, TrainOptions, train
from mola.cli import main
from tests.waiting import PATIENCE, wait_until

from ..ports import free_port
from .conftest import ROOT, assert_same_run, record
from .forks import number_of_lines
from .test_ddp import ROUTER_LOSSES
from .test_fsdp import TOLERANCE

RECIPES = ROOT / "recipes" / "accelerate"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
ACCELERATE = ["-m", "accelerate.commands.launch", f"--config_file={RECIPES / 'ddp_cpu.yaml'}"]


NPROC = ["--nproc=2"]  # `mola train` itself starts torchrun


def start(launcher, arguments):
    # No thread count: it is the launcher's to choose.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    port = [f"--master_port={free_port()}"] if launcher is TORCHRUN else []
    command = [sys.executable, *launcher, *port, "-m", "mola.cli", *arguments]
    if launcher is NPROC:
        command = [sys.executable, "-m", "mola", *arguments, *NPROC]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process):
    output = process.communicate(timeout=PATIENCE)[0]
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE, NPROC], ids=["torchrun", "accelerate launch", "nproc"])
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
    assert code == 130 if launcher is NPROC else code != 0
    assert record(folder)["status"] == "interrupted", output
    assert 0 < record(folder)["steps"] < 60
    code, output = finish(start(launcher, [*arguments, "--resume_from_checkpoint=last"]))
    assert code == 0, output
    assert record(folder)["processes"] == 2
    assert output.count("The adapter is in") == 1
    assert_same_run(folder, tmp_path / "whole", 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("is_early", [True, False], ids=["while it starts", "while it trains"])
def test_killed_process_ends_the_launcher_and_the_run_goes_on(processes, flags, tmp_path, is_early):
    options = {**ROUTER_LOSSES, "num_train_epochs": 15}
    processes.mola(flags(tmp_path / "whole", **options))
    folder = tmp_path / "part"
    arguments = [word for word in flags(folder, **options) if not word.startswith("--r=")]
    (tmp_path / "recipe.yaml").write_text("r: 4\n", encoding="utf-8")
    arguments.append(f"--config={tmp_path / 'recipe.yaml'}")
    process = start(TORCHRUN, arguments)
    try:
        of_launcher = psutil.Process(process.pid)
        workers = wait_until(lambda: len(found := of_launcher.children()) == 2 and found, process)
        if not is_early:
            wait_until((folder / "checkpoint-8" / "trainer_state.json").exists, process)
        workers[1].kill()
        code, output = finish(process)
    finally:
        process.kill()
    assert code != 0
    more = "--overwrite" if is_early else "--resume_from_checkpoint=last"
    code, output = finish(start(TORCHRUN, [*arguments, more]))
    assert code == 0, output
    assert_same_run(folder, tmp_path / "whole", 0.0)


def environment_of(name):
    """What `accelerate launch` sets for a configuration."""
    arguments = launch_command_parser().parse_args(["--config_file", str(RECIPES / name), "-m", "mola.cli", "train"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    return arguments, {name: value for name, value in environment.items() if os.environ.get(name) != value}


@pytest.mark.parametrize("name", [path.name for path in sorted(RECIPES.glob("*.yaml"))])
def test_configurations_are_read_by_accelerate(name):
    config = load_config_from_file(str(RECIPES / name))
    kind = {"fsdp2.yaml": "FSDP", "zero2.yaml": "DEEPSPEED", "zero3.yaml": "DEEPSPEED"}.get(name, "MULTI_GPU")
    assert str(config.distributed_type.value) == kind
    assert config.num_processes == 2
    first, *_ = (RECIPES / name).read_text(encoding="utf-8").splitlines()
    assert first.startswith(f"# accelerate launch --config_file recipes/accelerate/{name} -m mola.cli train")


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


# ---------------------------------------------------------------------- mola train --nproc


@pytest.fixture
def torchrun_gets(monkeypatch):
    """Arguments that torchrun gets from `mola train --nproc`, in place of starting processes; it may raise an error."""
    given = []

    def keep(arguments):
        given.append(arguments)
        if keep.error is not None:
            raise keep.error

    keep.error, keep.given = None, given
    monkeypatch.setattr(torch.distributed.run, "run", keep)
    for name in ("MOLA_NPROC", "OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "1")  # so that the test's end restores them
    monkeypatch.delenv("OMP_NUM_THREADS")
    return keep


def test_nproc_hands_all_other_flags_to_torchrun(torchrun_gets, flags, tmp_path):
    arguments = flags(tmp_path / "run")
    assert main([*arguments, "--nproc", "2"]) == 0
    (given,) = torchrun_gets.given
    assert (given.nproc_per_node, given.standalone, given.module, given.training_script) == ("2", True, True, "mola")
    assert given.training_script_args == [*arguments, "--nproc", "2"]
    assert os.environ["MOLA_NPROC"] == "2"
    assert int(os.environ["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("nproc: 3\n", encoding="utf-8")
    assert main([*arguments, f"--config={recipe}"]) == 0
    assert torchrun_gets.given[1].nproc_per_node == "3"


@pytest.mark.parametrize(("of_process", "of_command"), [(2, 2), (1, 1), (-9, 137), (130, 130)])
def test_exit_code_of_the_first_process_that_failed(torchrun_gets, flags, tmp_path, of_process, of_command):
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=of_process, error_file="")
    torchrun_gets.error = ChildFailedError("mola", {1: failure})
    assert main([*flags(tmp_path / "run"), "--nproc=2"]) == of_command
    torchrun_gets.error = SignalException("stopped", signal.SIGINT)
    assert main([*flags(tmp_path / "run"), "--nproc=2"]) == 130


def test_wrong_options_are_an_error_before_processes_start(torchrun_gets, flags, tmp_path, capsys):
    assert main([*flags(tmp_path / "run"), "--nproc=2", "--nosuch=1"]) == 2
    assert main([*flags(tmp_path / "run", data="nowhere.json"), "--nproc=2"]) == 2
    assert main([*flags(tmp_path / "run"), "--nproc=0"]) == 2
    assert "`nproc` must be at least 1: got 0" in capsys.readouterr().err
    assert not torchrun_gets.given


def test_nproc_is_refused_in_a_process_of_a_launcher_and_in_python(torchrun_gets, flags, tmp_path, capsys, monkeypatch):
    message = "`nproc` starts processes for the command `mola train` alone: got 2"
    with pytest.raises(MolaError, match=message):
        train(TrainOptions(output_dir=str(tmp_path), nproc=2, use_cpu=True))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main([*flags(tmp_path / "run"), "--nproc=2"]) == 2
    assert message in capsys.readouterr().err
    assert not torchrun_gets.given
