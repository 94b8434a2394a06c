"""Checkpoints in which a bit is not what it was are not resumed."""

import json
import random
import re
import shutil

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from mola.cli import main
from mola.errors import MolaError
from mola.options.parsing import parse
from mola.training.checkpoints import find_checkpoint
from mola.training.train import TrainOptions, train
from tests.damage import WEIGHTS, change_tensors, flip_bit, same
from tests.grids import slow

FLIPS = 100


@pytest.fixture(scope="module")
def flags(tiny_model_dir, tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "rows.json"
    rows = [{"instruction": f"Say {i}", "input": "", "output": f"Answer: {'ABC'[i % 3]}."} for i in range(8)]
    data.write_text(json.dumps(rows), encoding="utf-8")

    def build(folder, **more):
        settings = {
            **{"base_model": tiny_model_dir, "data": data, "output_dir": folder, "dtype": "float32", "use_cpu": "true"},
            **{"num_experts": 2, "r": 2, "target_modules": "q_proj", "per_device_train_batch_size": 2, "max_steps": 3},
            **{"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "logging_steps": 1},
            **{"disable_tqdm": "true", "lora_dropout": 0.1, "warmup_steps": 0, "lr_scheduler_type": "constant", **more},
        }
        return ["train", *(f"--{name}={value}" for name, value in settings.items())]

    return build


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main(flags(folder)) == 0
    return folder


FILES = [WEIGHTS, *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "sha256.json")]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed(name, run, tmp_path):
    checkpoint = shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")
    path = checkpoint / name
    for number in random.Random(0).sample(range(8 * path.stat().st_size), FLIPS):
        flip_bit(path, number)
        with pytest.raises(MolaError, match="checkpoint-3' has a (broken )?"):
            find_checkpoint(tmp_path, str(checkpoint))
        flip_bit(path, number)
    assert find_checkpoint(tmp_path, str(checkpoint)) == checkpoint


@pytest.mark.parametrize("name", [WEIGHTS, *slow("optimizer.pt")])
def test_training_goes_on_from_the_last_one_that_is_not_damaged(name, run, flags, tmp_path, caplog):
    folder = shutil.copytree(run, tmp_path / "run")
    path = folder / "checkpoint-3" / name
    flip_bit(path, 4 * path.stat().st_size)
    arguments = [*flags(folder, max_steps=4), "--resume_from_checkpoint=last"]
    assert main(arguments) == 0
    assert re.search(f"Skipping .*checkpoint-3, which has a (broken )?{name}", caplog.text)
    assert main(flags(tmp_path / "whole", max_steps=4)) == 0
    assert same(load_file(folder / WEIGHTS), load_file(tmp_path / "whole" / WEIGHTS))


def test_checkpoint_that_is_not_finite_is_not_resumed(run, flags, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "checkpoint-3" / "sha256.json").unlink()
    change_tensors(folder / "checkpoint-3", lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    assert main([*flags(folder, max_steps=4), "--resume_from_checkpoint=last"]) == 2
    assert "are not finite" in capsys.readouterr().err


class Damage(TrainerCallback):
    """Flips a bit of a checkpoint's weights after the last step; the first checkpoint is the best."""

    def __init__(self, path):
        self.path = path

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = state.global_step / 100

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            flip_bit(self.path, 4 * self.path.stat().st_size)


def test_a_run_does_not_end_with_best_weights_that_are_damaged(flags, tmp_path, capsys):
    folder = tmp_path / "run"
    best, more = folder / "checkpoint-1" / WEIGHTS, {"eval_strategy": "steps", "eval_steps": 1, "validation_size": 2}
    more |= {"load_best_model_at_end": "true", "save_total_limit": 1}
    with pytest.raises(MolaError, match=r"checkpoint-1' has a broken adapter_model.safetensors\. Pass"):
        train(parse(TrainOptions, flags(folder, **more)[1:], prog="mola train"), [Damage(best)])
    assert {path.parent.name for path in folder.glob(f"*/{WEIGHTS}")} == {"checkpoint-1", "checkpoint-3"}
    assert not (folder / WEIGHTS).exists()
    arguments = [*flags(folder, **more, max_steps=4), "--resume_from_checkpoint=last"]
    assert main(arguments) == 2
    assert "checkpoint-1' has a broken adapter_model.safetensors" in capsys.readouterr().err
    flip_bit(best, 4 * best.stat().st_size)
    assert main(arguments) == 0
    assert {path.parent.name for path in folder.glob(f"*/{WEIGHTS}")} == {"checkpoint-1"}
    assert same(load_file(folder / WEIGHTS), load_file(best))
