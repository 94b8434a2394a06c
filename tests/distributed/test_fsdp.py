"""`mola train` with the model sharded over processes (FSDP2): the same run as in one process.

Accelerate shards on GPUs only; `forks.shard_on_cpu` has it shard between CPU processes. All else is as on GPUs.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mola import MolaLinear
from mola.cli import main
from tests.versions import needs

from .conftest import assert_same_run, curve, goes_on_from, record, weights_of
from .test_ddp import ROUTER_LOSSES, routing

pytestmark = needs("accelerate", "1.15", "its checkpoints of sharded adapters are not whole, and mola refuses it")
TOLERANCE = 1e-3  # as for DDP, and norms of gradients are summed in another order too
SHARDED = {"fsdp": "true"}


@pytest.fixture(scope="module")
def whole(processes, flags, tmp_path_factory):
    """A sharded run with router losses and checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    options = {**ROUTER_LOSSES, **SHARDED, "save_strategy": "steps", "save_steps": 2}
    arguments = flags(folder, eval_strategy="steps", eval_steps=2, **options)
    processes.mola(arguments, shard=True)
    return folder, arguments


def test_two_processes_equal_one_and_the_adapter_is_whole(processes, flags, whole, tmp_path, tiny_model_dir):
    folder, _ = whole
    alone = tmp_path / "alone"
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    processes.mola(flags(alone, save_steps=2, **options, **ROUTER_LOSSES), processes=1)
    assert_same_run(folder, alone, TOLERANCE)
    # Use of experts: every token once, as in one process.
    tokens = [[line["tokens"] for line in routing(run)] for run in (folder, alone)]
    assert tokens[0] == tokens[1]
    for ours, theirs in zip(routing(folder)[0]["modules"], routing(alone)[0]["modules"], strict=True):
        assert ours["mean_gates"] == pytest.approx(theirs["mean_gates"], abs=1e-3)
    # It was sharded: only then the trainer writes the adapter in this form too.
    assert (folder / "checkpoint-4" / "pytorch_model_fsdp.bin").is_file()
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder)
    loaded = dict(model.named_parameters())
    saved = weights_of(folder)
    assert len(saved) == sum(".mola_" in name for name in loaded)
    for name, tensor in saved.items():
        assert torch.equal(loaded[f"{name}.default"], tensor), name


@pytest.mark.slow
def test_resumed_run_is_the_same(processes, whole, tmp_path):
    folder, arguments = whole
    part = shutil.copytree(folder, tmp_path / "part")
    arguments = [word.replace(str(folder), str(part)) for word in arguments]
    with goes_on_from(part, "checkpoint-2", removed="checkpoint-4"):
        processes.mola([*arguments, "--resume_from_checkpoint=last"], shard=True)
    assert_same_run(part, folder, 0.0)


@pytest.mark.slow
def test_checkpoint_of_the_other_kind_is_refused(processes, flags, whole, tmp_path):
    folder, arguments = whole
    plain = [word for word in arguments if not word.startswith("--fsdp")]
    assert processes.run(arguments=[*plain, "--resume_from_checkpoint=last"]) == [2, 2]
    assert "was written with FSDP" in processes.output[0]
    other = tmp_path / "other"
    processes.mola([word.replace(str(folder), str(other)) for word in plain])
    arguments = [word.replace(str(folder), str(other)) for word in arguments]
    assert processes.run(arguments=[*arguments, "--resume_from_checkpoint=last"], shard=True) == [2, 2]
    assert "was written with one model per process" in processes.output[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_experts": 8, "top_k": 1, **ROUTER_LOSSES}, id="idle experts"),
        pytest.param({"num_experts": "1111"}, id="lora"),
        pytest.param({"activation_checkpointing": "true", **ROUTER_LOSSES}, id="checkpointing"),
        pytest.param({"router_jitter_noise": 1e-9, **ROUTER_LOSSES}, id="plain operators"),
    ],
)
def test_two_processes_equal_one_with(processes, flags, tmp_path, options):
    processes.mola(flags(tmp_path / "two", **options, **SHARDED), shard=True)
    processes.mola(flags(tmp_path / "one", gradient_accumulation_steps=2, **options), processes=1)
    assert_same_run(tmp_path / "two", tmp_path / "one", TOLERANCE)


@pytest.mark.slow
def test_half_precision_base_with_routers_in_float32(processes, flags, tmp_path):
    """The formats of one process: bfloat16 for the base, float32 for experts and, when they compute, routers."""
    options = {"dtype": "bfloat16", **ROUTER_LOSSES}
    processes.mola(flags(tmp_path / "two", **options, **SHARDED), shard=True)
    processes.mola(flags(tmp_path / "one", gradient_accumulation_steps=2, **options), processes=1)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-2)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert {tensor.dtype for tensor in two.values()} == {torch.float32}
    # Where the first step went up in one it rarely went down in the other.
    agreement = [torch.nn.functional.cosine_similarity(one[name].flatten(), two[name].flatten(), 0) for name in one]
    assert min(agreement) > 0.7, min(agreement)


def note_router_formats(index: int, arguments: list[str], target: str) -> None:
    """A run, and the formats in which layers find their weights when they compute."""
    found = set()
    compute = MolaLinear.forward

    def noting(self, x):
        tensors = self.base_layer.weight, self.mola_A["default"], self.mola_router["default"]
        found.add(" ".join(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))
        return compute(self, x)

    MolaLinear.forward = noting
    assert main(arguments) == 0
    Path(f"{target}.{index}").write_text(json.dumps(sorted(found)), encoding="utf-8")


@pytest.mark.slow
def test_every_weight_is_computed_in_its_own_format(processes, flags, tmp_path):
    arguments = flags(tmp_path / "run", dtype="bfloat16", max_steps=1, warmup_steps=0, **SHARDED)
    processes.call(note_router_formats, shard=True, arguments=arguments, target=str(tmp_path / "formats"))
    for index in range(2):
        formats = json.loads((tmp_path / f"formats.{index}").read_text(encoding="utf-8"))
        assert formats == ["bfloat16 float32 float32"], "of base, experts, router"


# What `accelerate launch --use_fsdp` sets where nothing else is said.
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


@pytest.mark.slow
@pytest.mark.parametrize("start", ["gaussian", "principal"])
def test_what_a_launcher_sets_by_itself_changes_nothing(processes, flags, tmp_path, start):
    """`accelerate launch` has the first process give all weights to the others, those of experts too."""
    options = {**ROUTER_LOSSES, "init_lora_weights": start, "num_experts": 2, "r": 2}
    processes.mola(flags(tmp_path / "two", **options), shard=True, environment=LAUNCHED)
    processes.mola(flags(tmp_path / "one", gradient_accumulation_steps=2, **options), processes=1)
    assert_same_run(tmp_path / "two", tmp_path / "one", TOLERANCE)


@pytest.mark.slow
def test_signal_to_one_process_leaves_a_run_that_goes_on(processes, flags, tmp_path):
    options = {**ROUTER_LOSSES, **SHARDED, "num_train_epochs": 10}
    processes.mola(flags(tmp_path / "whole", **options), shard=True)
    folder = tmp_path / "part"
    terminate = {"file": str(folder / "metrics.jsonl"), "lines": 5}
    codes = processes.run(arguments=flags(folder, **options), terminate=terminate, shard=True)
    assert codes == [130, 130], processes.output
    assert 0 < record(folder)["steps"] < 40
    processes.mola([*flags(folder, **options), "--resume_from_checkpoint=last"], shard=True)
    assert_same_run(folder, tmp_path / "whole", 0.0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param({"fsdp_config": {"version": 1}}, "`fsdp_config` must have version 2", id="FSDP1"),
        pytest.param({"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}, "state_dict_type", id="sharded"),
    ],
)
def test_unsupported_fsdp_settings_are_refused(processes, flags, tmp_path, options, reason):
    options = {name: json.dumps(value) for name, value in options.items()}
    assert processes.run(arguments=flags(tmp_path, **SHARDED, **options), shard=True) == [2, 2], processes.output
    assert reason in processes.output[0]


def test_fsdp_without_gpus_or_processes_is_refused(processes, flags, tmp_path):
    assert processes.run(arguments=flags(tmp_path, **SHARDED)) == [2, 2], processes.output
    assert "`fsdp` works on GPUs only" in processes.output[0]
    assert processes.run(arguments=flags(tmp_path, **SHARDED), processes=1) == [2], processes.output
    assert "`fsdp` shards a model over several processes" in processes.output[0]
