"""The experts of a model while a trainer trains it: a line for every interval between two log entries.

    trainer = Trainer(model=model, args=args, train_dataset=data)
    ExpertTelemetry("runs/first/routing.jsonl").add_to(trainer)
    trainer.train()

What counts is in `mola.insight.router_recorder.RouterWatch`. Sums of several processes are added up when a line is
written.
"""

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import ParallelMode

from mola.errors import NotFiniteError
from mola.files.atomic import append_lines, atomic_write_json, atomic_write_text
from mola.files.reading import kept_lines, read_json_object
from mola.insight.router_recorder import RouterWatch

SUMS_FILE = "routing_sums.json"  # in a checkpoint: what is counted since the last line
_DIGITS = 6  # of a share or a gate; a file of all modules would be three times as large with all of them

logger = logging.getLogger(__name__)


class ExpertTelemetry(TrainerCallback):
    """Records how experts are used during training, by module, and adds means over modules to the trainer's log.

    With every log entry that has a training loss, one line goes to the file:
    `{"step", "epoch", "tokens", "modules": [...]}`, each module as `mola.insight.usage.ModuleUsage` with its `drift`:
    half the L1 distance of its mean gates to those of the line before, from 0 to 1, None at first. What is left at the
    end of training gets a line of its own. The entry itself gets `experts/balance`, `experts/entropy`,
    `experts/margin`, `experts/drift` (means over modules) and `experts/dead` (a number of experts).

    A model without routers has nothing to record: no file is made.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, checkpoint: str | os.PathLike[str] | None = None
    ) -> None:
        """Record into a file, into the log only without one.

        Args:
            path: the file, JSON lines. A resumed run keeps the lines up to its step, another one replaces it.
            checkpoint: folder of the checkpoint that a resumed run starts from; by default that of its step in the
                trainer's `output_dir`.
        """
        self.path = None if path is None else Path(path)
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self._watch: RouterWatch | None = None
        self._gates: dict[str, list[float]] = {}  # of the line before, by module
        self._said_nothing_seen = False

    def add_to(self, trainer: Trainer) -> Self:
        """Become the trainer's first callback: trackers then get the entries with what is added to them."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def close(self) -> None:
        """Leave nothing on the model; for a training that ended with an error."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    # ------------------------------------------------------------------ events of the trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to watch; a resumed run takes up the interval in which it was saved."""
        self.close()
        if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            logger.warning(
                "The use of experts is not recorded under nn.DataParallel, whose copies of the model share no state. "
                "Use one process per device (torchrun, accelerate launch) or one GPU."
            )
            return
        watch = RouterWatch(kwargs["model"])
        if not watch.routers:
            watch.close()
            return
        self._watch, self._gates = watch, {}
        if state.is_world_process_zero:
            self._take_up(args, state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write a line, and add to an entry with a training loss."""
        if self._watch is None or not logs or "loss" not in logs:
            return
        summary = self._write(args, state)
        logs.update(summary)
        if state.log_history:
            state.log_history[-1].update(summary)  # a copy of the entry

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep what is counted since the last line."""
        if self._watch is None:
            return
        sums = self._pooled(args)
        if not bool(sums.isfinite().all()):  # DeepSpeed leaves weights as they are when gradients are not finite
            raise NotFiniteError(
                f"what routers decide is no longer finite at step {state.global_step}: training has diverged. Lower "
                "`learning_rate` or raise `warmup_steps`, and start again in another `output_dir`."
            )
        folder = _checkpoint_folder(args, state.global_step)
        if state.is_world_process_zero and bool(sums.any()) and folder.is_dir():
            routers = [router.module for router in self._watch.routers]
            atomic_write_json(folder / SUMS_FILE, {"routers": routers, "sums": sums.tolist()}, indent=None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what is left, and end watching."""
        if self._watch is not None:
            self._write(args, state, is_last=True)
        self.close()

    # ------------------------------------------------------------------ lines

    def _write(self, args: TrainingArguments, state: TrainerState, *, is_last: bool = False) -> dict[str, Any]:
        """Write the line of the interval that ends here, and return its summary; nothing where nothing was counted."""
        assert self._watch is not None
        sums = self._pooled(args)
        self._watch.reset()
        records = [self._record(asdict(usage)) for usage in self._watch.usage(sums)]
        if not records:
            if not is_last:
                self._say_nothing_seen()
            return {}
        if self.path is not None and state.is_world_process_zero:
            tokens = max(record["num_tokens"] for record in records)
            line = {"step": state.global_step, "epoch": state.epoch, "tokens": tokens, "modules": records}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_lines(self.path, [json.dumps(line, allow_nan=False)])
        return _summary(records)

    def _record(self, usage: dict[str, Any]) -> dict[str, Any]:
        record = {name: _rounded(value) for name, value in usage.items()}
        gates, before = record["mean_gates"], self._gates.get(record["module"])
        # From the rounded values: a resumed run has no others.
        record["drift"] = None if before is None else _rounded(_half_l1(gates, before))
        self._gates[record["module"]] = gates
        return record

    def _pooled(self, args: TrainingArguments) -> torch.Tensor:
        """The sums of all processes."""
        assert self._watch is not None
        sums = self._watch.sums()
        if args.world_size > 1:
            shared = sums.to(args.device)
            torch.distributed.all_reduce(shared)
            sums = shared.cpu()
        return sums

    def _say_nothing_seen(self) -> None:
        if not self._said_nothing_seen:
            self._said_nothing_seen = True
            logger.warning(
                "The use of experts is not recorded: no training forward pass of the model was seen. A model that was "
                "compiled before cannot be watched: train it in a process of its own, or leave the telemetry out."
            )

    # ------------------------------------------------------------------ going on

    def _take_up(self, args: TrainingArguments, step: int) -> None:
        """Drop the lines that are written again, take up the interval that was cut off."""
        assert self._watch is not None
        sums = self._saved_sums(self.checkpoint or _checkpoint_folder(args, step)) if step else None
        self._watch.reset(sums)
        if self.path is None:
            return
        # With sums of an interval that was cut off, a line of that step is the rest of the run that ended there.
        end = step + 1 if sums is None else step
        kept = kept_lines(self.path, lambda entry: _is_whole_and_before(entry, end)) if step else []
        if self.path.exists() or step:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.path, "".join(line + "\n" for line in kept))
        last: dict[str, Any] = json.loads(kept[-1]) if kept else {"step": 0, "modules": []}
        self._gates = {record["module"]: record["mean_gates"] for record in last["modules"]}
        if sums is None and last["step"] != step:
            logger.warning(
                "The checkpoint of step %d has no sums of the experts' use since step %d: the first line in %s counts "
                "from the checkpoint on.",
                step,
                last["step"],
                self.path,
            )

    def _saved_sums(self, folder: Path) -> torch.Tensor | None:
        assert self._watch is not None
        saved = read_json_object(folder / SUMS_FILE)
        if saved.get("routers") != [router.module for router in self._watch.routers]:
            return None
        return torch.tensor(saved["sums"], dtype=torch.float64)


def drop_later_lines(path: Path, step: int) -> None:
    """Drop what a run that goes on from a step without telemetry had recorded after it."""
    if path.exists():
        kept = kept_lines(path, lambda entry: _is_whole_and_before(entry, step + 1))
        atomic_write_text(path, "".join(line + "\n" for line in kept))


def _checkpoint_folder(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _is_whole_and_before(entry: dict[str, Any], step: int) -> bool:
    return entry["step"] < step and all(record["module"] and record["mean_gates"] for record in entry["modules"])


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name in ("balance", "entropy", "margin", "drift"):
        values = [record[name] for record in records if record[name] is not None]
        if values:
            summary[f"experts/{name}"] = round(fmean(values), _DIGITS)
    return summary | {"experts/dead": sum(len(record["dead_experts"]) for record in records)}


def _half_l1(gates: Sequence[float | None], before: Sequence[float | None]) -> float:
    distances = [
        abs(now - then)
        for now, then in zip(gates, before, strict=True)
        if now is not None and then is not None  # a run that diverges says so itself
    ]
    return sum(distances) / 2 if len(distances) == len(gates) else math.nan


def _rounded(value: Any) -> Any:
    """With few digits; None for what is not finite, since JSON has no NaN."""
    if isinstance(value, tuple):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    return value
