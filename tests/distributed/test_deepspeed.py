"""`mola train` with DeepSpeed ZeRO-2 and ZeRO-3 on CPUs, by the configurations in recipes/accelerate: as with DDP."""

import importlib.util
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mola import MolaError
from mola.cli import main
from mola.training.distributed import check_distributed
from tests.training.runs import read_metrics

from .conftest import assert_same_run, curve, goes_on_from, record, weights_of
from .test_ddp import ROUTER_LOSSES, routing
from .test_launchers import RECIPES, environment_of, finish, start

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed, which the extra `deepspeed` installs"
)
TOLERANCE = 1e-3  # as for FSDP: gradients and their norms are summed in another order
DEEPSPEED = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    """What `accelerate launch` sets for stages 2 and 3, and for 3 with small weights shared out, too.

    ZeRO-3 leaves those below 100,000 values in every process, which are all of the tiny model's.
    """
    found = {stage: {**environment_of(f"zero{stage}.yaml")[1], "DS_ACCELERATOR": "cpu"} for stage in (2, 3)}
    settings = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    sizes = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto")
    steps = dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), "auto")
    path = tmp_path_factory.mktemp("deepspeed") / "all.json"
    path.write_text(json.dumps({"zero_optimization": settings, **sizes, **steps}), encoding="utf-8")
    file = {"ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    return {**found, "3, all": {**DEEPSPEED, **file}}


STAGES = [pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), "3, all"]


@pytest.fixture(scope="module")
def whole(processes, flags, environments, tmp_path_factory):
    """Runs with router losses, dropout, checkpoints: folder and arguments of one by its stage, of DDP by None."""
    made = {}

    def make(stage):
        if stage not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            options = {**ROUTER_LOSSES, "lora_dropout": 0.1, "num_train_epochs": 2, "eval_strategy": "steps"}
            arguments = flags(folder, eval_steps=2, save_strategy="steps", save_steps=2, **options)
            processes.mola(arguments, environment=environments[stage] if stage else {})
            made[stage] = folder, arguments
        return made[stage]

    return make


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_same_run_as_with_ddp_and_the_adapter_is_whole(whole, stage, tiny_model_dir):
    folder, _ = whole(stage)
    plain, _ = whole(None)
    assert_same_run(folder, plain, TOLERANCE)
    assert curve(folder) == pytest.approx(curve(plain), rel=1e-5)
    assert curve(folder, "grad_norm") == pytest.approx(curve(plain, "grad_norm"), rel=1e-4)
    assert [line["tokens"] for line in routing(folder)] == [line["tokens"] for line in routing(plain)]
    assert record(folder)["trainable_parameters"] == record(plain)["trainable_parameters"]
    # It was DeepSpeed: only then its files are there, and with ZeRO-3 weights by process.
    shares = list((folder / "checkpoint-8" / "global_step8").glob("zero_pp_rank_*model_states.pt"))
    assert len(shares) == (0 if stage == 2 else 2)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    loaded = dict(PeftModel.from_pretrained(base, folder).named_parameters())
    saved = weights_of(folder)
    assert len(saved) == sum(".mola_" in name for name in loaded)
    for name, tensor in saved.items():
        assert torch.equal(loaded[f"{name}.default"], tensor), name


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_is_the_same(processes, environments, whole, tmp_path, stage):
    folder, arguments = whole(stage)
    part = shutil.copytree(folder, tmp_path / "part")
    shutil.rmtree(part / "checkpoint-6" / "global_step6")
    arguments = [word.replace(str(folder), str(part)) for word in arguments]
    with goes_on_from(part, "checkpoint-4", removed="checkpoint-8"):
        processes.mola([*arguments, "--resume_from_checkpoint=last"], environment=environments[stage])
    assert "has no optimiser state" in processes.output[0]
    assert "Skipping" not in processes.output[1]
    assert_same_run(part, folder, 0.0)


@needs_deepspeed
@pytest.mark.slow
def test_signal_to_one_process_leaves_a_run_that_goes_on(processes, flags, environments, tmp_path):
    options, more = {**ROUTER_LOSSES, "num_train_epochs": 15}, {"environment": environments["3, all"]}
    processes.mola(flags(tmp_path / "whole", **options), **more)
    folder = tmp_path / "part"
    terminate = {"file": str(folder / "metrics.jsonl"), "lines": 5}
    codes = processes.run(arguments=flags(folder, **options), terminate=terminate, **more)
    assert codes == [130, 130], processes.output
    assert 0 < record(folder)["steps"] < 60
    processes.mola([*flags(folder, **options), "--resume_from_checkpoint=last"], **more)
    assert_same_run(folder, tmp_path / "whole", 0.0)


@needs_deepspeed
@pytest.mark.slow
def test_best_weights_are_saved(processes, flags, environments, tmp_path):
    """A learning rate so high that the last step is not the best."""
    options = {"num_train_epochs": 2, "learning_rate": 3, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    processes.mola(flags(tmp_path, **options, **every), environment=environments["3, all"])
    losses = {line["step"]: line["eval_loss"] for line in read_metrics(tmp_path) if "eval_loss" in line}
    best = tmp_path / f"checkpoint-{min(losses, key=losses.get)}"
    assert record(tmp_path)["best_checkpoint"] == str(best)
    one, two = weights_of(tmp_path), weights_of(best)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_experts": 8, "top_k": 1, **ROUTER_LOSSES}, id="idle experts"),
        pytest.param({"num_experts": "1111"}, id="lora"),
        pytest.param({"activation_checkpointing": "true", **ROUTER_LOSSES}, id="checkpointing"),
        pytest.param({"router_jitter_noise": 1e-9, **ROUTER_LOSSES}, id="plain operators"),
        pytest.param({"router_aux_loss_coef": 0.1, "router_aux_loss_reduction": "layer"}, id="layer"),
        pytest.param({"modules_to_save": "lm_head", **ROUTER_LOSSES}, id="modules to save"),
        pytest.param({"gradient_accumulation_steps": 2, **ROUTER_LOSSES}, id="accumulation"),
    ],
)
def test_same_run_as_with_ddp_with(processes, flags, environments, tmp_path, options):
    processes.mola(flags(tmp_path / "zero", **options), environment=environments["3, all"])
    processes.mola(flags(tmp_path / "ddp", **options))
    assert_same_run(tmp_path / "zero", tmp_path / "ddp", TOLERANCE)


@needs_deepspeed
@pytest.mark.slow
def test_checkpoint_of_another_kind_is_refused(processes, environments, whole):
    for written, now in ((2, 3), (3, 2), (3, None), (None, 3)):
        _, arguments = whole(written)
        arguments = [*arguments, "--resume_from_checkpoint=last"]
        codes = processes.run(arguments=arguments, environment=environments[now] if now else {})
        assert codes == [2, 2], processes.output
        kind = f"DeepSpeed ZeRO-{written} in 2 processes" if written else "one model per process"
        assert f"was written with {kind}" in processes.output[0]


@needs_deepspeed
@pytest.mark.slow
def test_a_run_that_diverges_stops_in_all_processes(processes, flags, environments, tmp_path):
    options = {"learning_rate": 1e30, "warmup_steps": 0, "logging_steps": 100, "eval_strategy": "no"}
    codes = processes.run(arguments=flags(tmp_path, **options), environment=environments["3, all"])
    assert codes == [2, 2], processes.output
    assert all("no longer finite at step 5" in text for text in processes.output), processes.output
    assert all("Traceback" not in text for text in processes.output), processes.output


@needs_deepspeed
@pytest.mark.slow
def test_configuration_by_its_launcher(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launcher = ["-m", "accelerate.commands.launch", f"--config_file={RECIPES / 'zero3.yaml'}"]
    code, output = finish(start(launcher, flags(tmp_path / "run", **ROUTER_LOSSES)))
    assert code == 0, output
    assert next((tmp_path / "run" / "checkpoint-4").glob("global_step4/zero_pp_rank_1*model_states.pt")).is_file()


# ---------------------------------------------------------------------- refused before weights are loaded


def options_with(stage=3, gathers=True, **changes):
    settings = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": gathers}
    plugin = SimpleNamespace(hf_ds_config=HfDeepSpeedConfig({"zero_optimization": settings}))
    given = {"fsdp": None, "deepspeed": None, "bf16": False, "fp16": False, "deepspeed_plugin": plugin}
    given |= {"optim": "adamw_torch", "world_size": 2}
    return SimpleNamespace(**{**given, **changes})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bf16": True}, "`dtype` must be float32 with DeepSpeed"),
        ({"optim": "adafactor"}, "`optim` adafactor needs the rows and columns"),
        ({"stage": 1}, "ZeRO stage 2 or 3: got 1"),
        ({"gathers": False}, "stage3_gather_16bit_weights_on_model_save true, or no adapter"),
        ({"stacked": True}, "cannot be trained with ZeRO-3.* Set zero_stage 2"),
    ],
)
def test_what_deepspeed_cannot_train_is_refused(monkeypatch, options, message):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")

    def check(stacked=False, **changes):
        given = options_with(**changes)
        check_distributed(given, None, is_quantized=False, has_stacked_experts=stacked)

    check()
    check(stacked=True, stage=2)
    with pytest.raises(MolaError, match=message):
        check(**options)


@needs_deepspeed
@pytest.mark.quant
def test_quantised_base_is_refused(processes, flags, environments, no_weights_dir, tmp_path):
    arguments = flags(tmp_path / "run", base_model=no_weights_dir, load_in_8bit="true")
    assert processes.run(arguments=arguments, environment=environments[3]) == [2, 2]
    assert "`deepspeed` cannot be combined with a quantised base" in processes.output[0]


def test_option_on_a_cpu_is_refused(flags, tmp_path, capsys):
    path = tmp_path / "zero.json"
    path.write_text("{}", encoding="utf-8")
    assert main(flags(tmp_path / "run", deepspeed=path)) == 2
    assert "works on GPUs only" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "run")
