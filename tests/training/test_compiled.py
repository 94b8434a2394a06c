"""`mola train --torch_compile`: the eager losses, few graphs, an adapter like any other; refused without a compiler."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mola import TrainOptions, train
from mola.models.loading import load_model

BACKEND = "aot_eager"  # graphs are made as for any backend, without waiting for a C++ compiler
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    """Eleven rows, so that the last batch is smaller, of lengths that need several multiples of 8."""
    path = tmp_path_factory.mktemp("data") / "rows.json"
    rows = [
        {
            "id": str(number),
            "instruction": "Count " * (1 + number * 7 % 9) + str(number),
            "input": "",
            "output": f"The answer is {'ABC'[number % 3]}.",
            "answer": "ABC"[number % 3],
        }
        for number in range(11)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def options(small_model_dir, rows_file, tmp_path):
    """Options of a short run in `tmp_path/NAME`; options given replace or extend them."""

    def build(name="run", **changes):
        settings = {
            "base_model": str(small_model_dir),
            "data": str(rows_file),
            "output_dir": str(tmp_path / name),
            "dtype": "float32",
            "template": "meta",
            "num_experts": "4,",
            "target_modules": "q_proj,down_proj",
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "num_train_epochs": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        return {**settings, **changes}

    return build


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def breaks():
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def losses(folder):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def uses(folder):
    """Shares and mean gates by line and module."""
    entries = [json.loads(line) for line in (folder / "routing.jsonl").read_text(encoding="utf-8").splitlines()]
    return [[*record["shares"], *record["mean_gates"]] for entry in entries for record in entry["modules"]]


def run(**settings):
    return train(TrainOptions(**settings))


@pytest.mark.slow
def test_compiled_and_eager_runs_agree_and_save_the_same_adapter(options, tmp_path, small_model_dir):
    settings = {"lora_dropout": 0.0, "eval_strategy": "epoch", "save_strategy": "epoch", "validation_size": 2}
    run(**options("eager", **settings))
    assert graphs() == 0
    result = run(**options("compiled", torch_compile=True, torch_compile_backend=BACKEND, **settings))
    # 9 samples: batches of different lengths, the last of a single sample, for which torch makes a graph of its own.
    assert (result.status, result.steps) == ("finished", 5)
    assert (graphs(), breaks()) == (2, 0)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    assert len(uses(tmp_path / "eager")) == 5 * 2
    for compiled, eager in zip(uses(tmp_path / "compiled"), uses(tmp_path / "eager"), strict=True):
        assert compiled == pytest.approx(eager, abs=1e-2)  # a near-tie may fall the other way
    ours, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("compiled", "eager"))
    assert ours.keys() == expected.keys()
    assert not [name for name in ours if "_orig_mod" in name]
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-4, rtol=1e-3)
    checkpoints = [path.name for path in (tmp_path / "compiled").glob(f"checkpoint-*/{WEIGHTS}")]
    assert checkpoints == [WEIGHTS]
    loaded = load_model(str(small_model_dir), str(tmp_path / "compiled"), "float32", "cpu", False)
    by_peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.float32), tmp_path / "compiled"
    )
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, by_peft.eval()(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"activation_checkpointing": True}, {"dtype": "bfloat16", "gradient_accumulation_steps": 2, "lora_dropout": 0.05}],
    ids=["checkpointing", "bfloat16"],
)
def test_one_graph_serves_all_batches(options, changes):
    run(**options(limit=10, torch_compile=True, torch_compile_backend=BACKEND, **changes))
    assert (graphs(), breaks()) == (1, 0)


@pytest.mark.slow
def test_router_losses_with_checkpointing_break_no_graph(options, tmp_path):
    settings = {"limit": 10, "lora_dropout": 0.0, "router_aux_loss_coef": 0.5, "activation_checkpointing": True}
    run(**options("eager", **settings))
    run(**options("compiled", torch_compile=True, torch_compile_backend=BACKEND, **settings))
    assert breaks() == 0
    assert graphs() == 1
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


@pytest.mark.slow
def test_compiling_one_run_does_not_compile_the_next(options):
    """Options of both exist before the first run, as in `mola continual`."""
    first = TrainOptions(**options("first", max_steps=1, torch_compile_backend="eager", warmup_steps=0))
    second = TrainOptions(**options("second", max_steps=1, warmup_steps=0))
    train(first)
    assert graphs() == 1
    torch._dynamo.reset()  # or the second run would find the graph of the first
    train(second)
    assert graphs() == 1


def test_compiling_does_not_switch_tf32_on(options):
    assert TrainOptions(**options(torch_compile_backend=BACKEND)).tf32 is False
    assert TrainOptions(**options()).tf32 is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_with_the_default_backend(options, tmp_path):
    settings = {"limit": 4, "lora_dropout": 0.0}
    run(**options("eager", **settings))
    run(**options("compiled", torch_compile=True, **settings))
    assert (graphs(), breaks()) == (1, 0)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
