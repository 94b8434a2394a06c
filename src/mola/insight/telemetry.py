"""Records the use of experts during training: one line for every interval between two log entries.

    trainer = Trainer(model=model, args=args, train_dataset=data)
    ExpertTelemetry("runs/first/routing.jsonl").add_to(trainer)
    trainer.train()

`mola.insight.recorder.RouterRecorder` says which tokens count. Sums of several processes are added up when a line is
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
from mola.files.reading import read_json_object, select_lines
from mola.insight.recorder import RouterRecorder
from mola.insight.usage import usage_of_sums

SUMS_FILE = "routing_sums.json"  # in a checkpoint: the sums since the last line
_DIGITS = 6  # digits of a share or a gate; with all digits the file would be three times as large

logger = logging.getLogger(__name__)


class ExpertTelemetry(TrainerCallback):
    """Records how experts are used during training, by module, and adds means over modules to the trainer's log.

    With every log entry that has a training loss, one line goes to the file:
    `{"step", "epoch", "tokens", "modules": [...]}`. Each module is a `mola.insight.usage.ModuleUsage` with its `drift`:
    half the L1 distance between its mean gates and those of the previous line, from 0 to 1; None in the first line.
    Tokens after the last log entry get a line at the end of training. The log entry itself gets
    `experts/balance`, `experts/entropy`, `experts/margin`, `experts/drift` (means over modules) and `experts/dead` (a
    number of experts).

    No file is written for a model without routers.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, checkpoint: str | os.PathLike[str] | None = None
    ) -> None:
        """Set the file for the lines.

        Args:
            path: the file (JSON lines); without a path, only the log gets the means. A resumed run keeps the lines up
                to its step. A new run replaces the file.
            checkpoint: folder of the checkpoint from which a resumed run starts; by default the checkpoint of that step
                in the trainer's `output_dir`.
        """
        self.path = None if path is None else Path(path)
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self._recorder: RouterRecorder | None = None
        self._last_gates: dict[str, list[float]] = {}  # mean gates in the last line, by module
        self._has_warned = False

    def add_to(self, trainer: Trainer) -> Self:
        """Become the trainer's first callback, so that trackers get log entries with the added means."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def close(self) -> None:
        """Remove the recorder from the model; needed after a training that ended with an error."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None

    # ------------------------------------------------------------------ events of the trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to record; a resumed run continues the interval in which its checkpoint was saved."""
        self.close()
        if args.parallel_mode == ParallelMode.NOT_DISTRIBUTED:
            logger.warning(
                "The use of experts is not recorded under nn.DataParallel, whose copies of the model share no state. "
                "Use one process per device (torchrun, accelerate launch) or one GPU."
            )
            return
        recorder = RouterRecorder(kwargs["model"])
        if not recorder.routers:
            recorder.close()
            return
        self._recorder, self._last_gates = recorder, {}
        if state.is_world_process_zero:
            self._continue_interval(recorder, args, state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write a line, and add the means to a log entry with a training loss."""
        if self._recorder is None or not logs or "loss" not in logs:
            return
        means = self._write_line(self._recorder, args, state)
        if not means and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The use of experts is not recorded: no training forward pass of the model was seen. A model that was "
                "compiled before training cannot be recorded. Train it in a process of its own, or without telemetry."
            )
        logs.update(means)
        if state.log_history:
            state.log_history[-1].update(means)  # the trainer has copied the entry

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the sums since the last line into the checkpoint."""
        if self._recorder is None:
            return
        sums = _sums_of_all_processes(self._recorder, args)
        # DeepSpeed skips a step whose gradients are not finite, so only the routers show that training has diverged.
        if not bool(sums.isfinite().all()):
            raise NotFiniteError(
                f"router decisions are no longer finite at step {state.global_step}: training has diverged. Lower "
                "`learning_rate` or raise `warmup_steps`, and start again in a different `output_dir`."
            )
        folder = _checkpoint_folder(args, state.global_step)
        if state.is_world_process_zero and bool(sums.any()) and folder.is_dir():
            content = {"routers": [router.module for router in self._recorder.routers], "sums": sums.tolist()}
            atomic_write_json(folder / SUMS_FILE, content, indent=None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write a line for the tokens after the last log entry, and stop recording."""
        if self._recorder is not None:
            self._write_line(self._recorder, args, state)
        self.close()

    # ------------------------------------------------------------------ lines

    def _write_line(self, recorder: RouterRecorder, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """Write the line of the current interval; returns its means over modules, empty if no token was counted."""
        sums = _sums_of_all_processes(recorder, args)
        recorder.reset()
        records = [self._record(asdict(usage)) for usage in usage_of_sums(recorder.routers, sums)]
        if not records:
            return {}
        if self.path is not None and state.is_world_process_zero:
            tokens = max(record["num_tokens"] for record in records)
            line = {"step": state.global_step, "epoch": state.epoch, "tokens": tokens, "modules": records}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_lines(self.path, [json.dumps(line, allow_nan=False)])
        return _means_over_modules(records)

    def _record(self, usage: dict[str, Any]) -> dict[str, Any]:
        record = {name: _rounded(value) for name, value in usage.items()}
        gates, before = record["mean_gates"], self._last_gates.get(record["module"])
        # Computed from rounded gates, since a resumed run reads the gates of the previous line from the file.
        record["drift"] = None if before is None else _rounded(_half_l1(gates, before))
        self._last_gates[record["module"]] = gates
        return record

    # ------------------------------------------------------------------ a resumed run

    def _continue_interval(self, recorder: RouterRecorder, args: TrainingArguments, step: int) -> None:
        """Drop lines after the checkpoint, and load the sums of the interval in which the checkpoint was saved."""
        sums = _saved_sums(recorder, self.checkpoint or _checkpoint_folder(args, step)) if step else None
        recorder.reset(sums)
        if self.path is None:
            return
        # If the checkpoint has sums, a line of the same step was written when the earlier run stopped; drop that line.
        end = step + 1 if sums is None else step
        kept = select_lines(self.path, lambda line: _is_complete_before(line, end)) if step else []
        if self.path.exists() or step:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.path, "".join(line + "\n" for line in kept))
        last: dict[str, Any] = json.loads(kept[-1]) if kept else {"step": 0, "modules": []}
        self._last_gates = {record["module"]: record["mean_gates"] for record in last["modules"]}
        if sums is None and last["step"] != step:
            logger.warning(
                "The checkpoint of step %d has no sums of the experts' use since step %d: the first line in %s counts "
                "from the checkpoint on.",
                step,
                last["step"],
                self.path,
            )


def drop_later_lines(path: Path, step: int) -> None:
    """Drop lines after a step, for a run that resumes from it without telemetry."""
    if path.exists():
        kept = select_lines(path, lambda line: _is_complete_before(line, step + 1))
        atomic_write_text(path, "".join(line + "\n" for line in kept))


def _is_complete_before(line: dict[str, Any], step: int) -> bool:
    return line["step"] < step and all(record["module"] and record["mean_gates"] for record in line["modules"])


def _checkpoint_folder(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _saved_sums(recorder: RouterRecorder, checkpoint: Path) -> torch.Tensor | None:
    """Sums in a checkpoint; None if it has none, or has sums of different routers or of another version of mola."""
    saved = read_json_object(checkpoint / SUMS_FILE)
    if saved.get("routers") != [router.module for router in recorder.routers]:
        return None
    sums = torch.tensor(saved["sums"], dtype=torch.float64)
    return sums if sums.shape == recorder.sums().shape else None


def _sums_of_all_processes(recorder: RouterRecorder, args: TrainingArguments) -> torch.Tensor:
    sums = recorder.sums()
    if args.world_size > 1:
        shared = sums.to(args.device)
        torch.distributed.all_reduce(shared)
        sums = shared.cpu()
    return sums


def _means_over_modules(records: list[dict[str, Any]]) -> dict[str, Any]:
    means: dict[str, Any] = {}
    for name in ("balance", "entropy", "margin", "drift"):
        values = [record[name] for record in records if record[name] is not None]
        if values:
            means[f"experts/{name}"] = round(fmean(values), _DIGITS)
    return means | {"experts/dead": sum(len(record["dead_experts"]) for record in records)}


def _half_l1(gates: Sequence[float | None], before: Sequence[float | None]) -> float:
    """Half the L1 distance; NaN if a gate was not finite, such as in a run that diverges."""
    pairs = zip(gates, before, strict=True)
    return sum(math.nan if new is None or old is None else abs(new - old) for new, old in pairs) / 2


def _rounded(value: Any) -> Any:
    """A value rounded to `_DIGITS` digits; None if it is not finite, since JSON has no NaN."""
    if isinstance(value, tuple):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    return value
