"""SIGKILL to one of two processes at random moments, then a resume: does the other one end, and is the result the same?

    OMP_NUM_THREADS=1 python -m tests.distributed.kill_trials --way ddp --trials 30 --seed 0 --output kills.json

A trial starts a run of 6 steps with a checkpoint after each, kills one process at a moment drawn over the time that
such a run took, waits for the other one, and goes on as docs/guides/training.md says. Adapter, loss curve and use of
experts must then be those of a run that nothing killed, bit for bit. Trials that are in the output file already are not
run again. A process that is left must end by itself: after `--ddp_timeout` 20 where it waits for one that never came.
"""

import argparse
import collections
import json
import random
import shutil
import tempfile
from pathlib import Path

import torch

from mola.errors import MolaError
from mola.training.checkpoints import find_checkpoint
from tests.conftest import save_tiny_llama

from .conftest import Processes, curve, weights_of, write_rows
from .test_launchers import environment_of

WAYS = {"ddp": {}, "fsdp2": {"shard": True}, "zero2": {}, "zero3": {}}
TIMEOUT = 20  # `--ddp_timeout`
PATIENCE = 3 * TIMEOUT  # seconds for the process that is left


class Trials:
    """Runs of one way, in a folder."""

    def __init__(self, processes: Processes, way: str, base_model: Path, data: Path, folder: Path, until=None) -> None:
        self.processes, self.folder, self.job = processes, folder, dict(WAYS[way])
        if way.startswith("zero"):
            self.job["environment"] = {**environment_of(f"{way}.yaml")[1], "DS_ACCELERATOR": "cpu"}
        options = {
            "base_model": base_model,
            "data": data,
            "dtype": "float32",
            "template": "meta",
            "num_experts": "2468",
            "r": 4,
            "lora_dropout": 0.1,
            "router_aux_loss_coef": 0.1,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 2,
            "eval_strategy": "no",
            "disable_tqdm": "true",
            "use_cpu": "true",
            "ddp_timeout": TIMEOUT,
            **({"fsdp": "true"} if way == "fsdp2" else {}),
        }
        self.arguments = ["train", *(f"--{name}={value}" for name, value in options.items())]
        self.whole = folder / "whole"
        self._must_finish(self.whole, [])
        self._must_finish(folder / "again", [])  # the first run on a machine also fills caches, such as DeepSpeed's
        self.seconds = min(processes.lasted, until or processes.lasted)

    def _must_finish(self, folder: Path, more: list[str]) -> None:
        self.processes.mola([*self.arguments, f"--output_dir={folder}", *more], **self.job)

    def trial(self, number: int, seed: int) -> dict:
        """Kill one process of a run, go on, compare."""
        chance = random.Random(f"{seed} {number}")
        kill = {"process": chance.randrange(2), "seconds": round(chance.uniform(0, self.seconds), 3)}
        run = self.folder / f"run-{number}"
        arguments = [*self.arguments, f"--output_dir={run}"]
        codes = self.processes.run(arguments=arguments, kill=kill, patience=PATIENCE, **self.job)
        left = 1 - kill["process"]
        output = self.processes.output[left]
        result = {"number": number, **kill, "codes": codes, "waited": round(self.processes.seconds, 2)}
        if codes[kill["process"]] == 0:
            result["other"] = "the run was over"
        elif codes[left] == 2 and "another process of this run has ended" in output:
            result["other"] = "ended with the message"
        elif codes[left] == 0:
            result["other"] = "had finished its part"
        else:
            result["other"] = f"WRONG: {output[-2000:]}"
        try:
            result["resumed"] = find_checkpoint(run, "last").name
            more = ["--resume_from_checkpoint=last"]
        except MolaError:
            result["resumed"] = "from the start"
            more = ["--overwrite"]
        codes = self.processes.run(arguments=[*arguments, *more], **self.job)
        result["same"] = codes == [0, 0] and self._is_same(run)
        if codes != [0, 0]:
            result["error"] = self.processes.output[0][-2000:]
        shutil.rmtree(run)
        return result

    def _is_same(self, run: Path) -> bool:
        one, two = weights_of(run), weights_of(self.whole)
        return (
            one.keys() == two.keys()
            and all(torch.equal(tensor, two[name]) for name, tensor in one.items())
            and curve(run) == curve(self.whole)
            and (run / "routing.jsonl").read_bytes() == (self.whole / "routing.jsonl").read_bytes()
        )


def summary(results: list[dict]) -> dict:
    """How many trials ended how."""
    return {
        "trials": len(results),
        "the other process": dict(collections.Counter(result["other"][:40] for result in results)),
        "its longest time": max((result["waited"] for result in results), default=0),
        "went on": dict(collections.Counter(result["resumed"] for result in results)),
        "the same result": sum(result["same"] for result in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, default="ddp")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=float, help="draw moments up to so many seconds only, when processes meet")
    parser.add_argument("--output", type=Path, help="JSON file; trials in it are not run again")
    given = parser.parse_args()
    results = json.loads(given.output.read_text()) if given.output and given.output.exists() else []
    key = {"way": given.way, "seed": given.seed, "until": given.until}
    if any(result.get(name, value) != value for result in results for name, value in key.items()):
        parser.error(f"{given.output} has trials of another --way, --seed or --until: pass another file")
    done = {result["number"] for result in results}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = save_tiny_llama(folder / "model", hidden_size=32, intermediate_size=48, std=0.2)
        processes = Processes(folder)
        trials = Trials(processes, given.way, model, write_rows(folder / "rows.json"), folder, given.until)
        for number in sorted(set(range(given.trials)) - done):
            results.append(key | trials.trial(number, given.seed))
            print(json.dumps(results[-1]), flush=True)
            if given.output:
                given.output.write_text(json.dumps(results, indent=1))
        processes.close()
    print(json.dumps(summary(results), indent=1))


if __name__ == "__main__":
    main()
