"""A training and the test that follows it: their options, going on after a stop. For commands that do several."""

import contextlib
import copy
import gc
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from transformers import TrainerCallback

from mola.data.read import check_split, split_names
from mola.data.tasks import load_task
from mola.errors import MolaError
from mola.evaluation.evaluate import EvaluateOptions, evaluate
from mola.files.reading import read_json
from mola.files.schema import ANYTHING, FLAG, INTEGER, NUMBER, TEXT, check_form
from mola.models.quantization import QUANTIZATION_OPTIONS
from mola.options.fields import Group, first_difference, option
from mola.training.checkpoints import find_checkpoint
from mola.training.train import TrainOptions, train

logger = logging.getLogger(__name__)

# What may differ when a training goes on: places, and what changes no weight.
NOT_COMPARED = (
    "output_dir",
    "adapter",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "disable_tqdm",
    "logging_steps",
    "report_to",
    "run_name",
    "save_total_limit",
)
_SAME_NAME = ("base_model", "task", "filters", "max_new_tokens", "template", "scoring", "trust_remote_code")
# Options of the test, by the names that `mola evaluate` has for them.
_TEST_OPTIONS = {
    **{name: name for name in (*_SAME_NAME, *QUANTIZATION_OPTIONS)},
    "split": "test_split",
    "limit": "test_limit",
    "batch_size": "test_batch_size",
    "dtype": "base_dtype",
}

_RESULT = {  # what is used of the file of a test
    **dict.fromkeys(("correct", "total", "unanswered"), INTEGER),
    **dict.fromkeys(("accuracy", "seconds"), NUMBER),
    "interval_95": [NUMBER, NUMBER],
    "samples": [{"correct": FLAG}],
    "settings": {str: ANYTHING},
    "data_fingerprint": TEXT,
}


@dataclass
class TrainAndTestOptions(TrainOptions):
    """Options of one training: those of `mola train`, and how its task is tested."""

    _test: ClassVar = Group("test")
    test_data: str | None = option(None, "Test data; default: the split `test_split` of `data`.")
    test_split: str = option("test", "Split to test on where the data has several.")
    test_limit: int | None = option(None, "Test on the first so many samples only.")
    test_batch_size: int = option(8, "Test samples per batch.")
    scoring: str = option(
        EvaluateOptions.scoring, "How an answer is found: generate or likelihood, as in `mola evaluate`."
    )
    max_new_tokens: int = option(EvaluateOptions.max_new_tokens, "Tokens to generate per test sample.")

    def check_one_process(self, command: str, cure: str) -> None:
        """Refuse a launcher's processes, and to be told to resume: a study of several trainings does that by itself."""
        if self.resume_from_checkpoint:
            raise MolaError(
                f"`resume_from_checkpoint` ({self.resume_from_checkpoint!r}) has no use here: the same command goes on "
                "where it stopped. Leave it out."
            )
        if self.world_size > 1:
            raise MolaError(f"`{command}` runs in one process: got {self.world_size}. Start it without torchrun{cure}.")


def evaluation_of(options: TrainAndTestOptions) -> EvaluateOptions:
    """The evaluation that belongs to a training; adapter and output file are left open.

    Raises:
        MolaError: task or data are not named, or there is nothing to test on.
    """
    if options.task is None:
        raise MolaError("`task` must name the task, which says how an answer is found. Set it for this one or for all.")
    if options.data is None:
        raise MolaError("`data` must name the training data. Set it for this one or for all.")
    if options.test_data is not None:
        check_split("test_split", options.test_split, TrainAndTestOptions.test_split, options.test_data)
    values = {name: getattr(options, own) for name, own in _TEST_OPTIONS.items()}
    return EvaluateOptions(
        **values, data=options.test_data or _test_source(options), device="cpu" if options.use_cpu else None
    )


def _test_source(options: TrainAndTestOptions) -> str:
    """The training data's own test split."""
    data = options.data or ""
    splits = split_names(data)
    if options.test_split not in splits or options.test_split == options.train_split:
        found = f"its splits are {', '.join(splits)}" if splits else "it has no splits"
        raise MolaError(
            f"`test_data` must name the test data, or `test_split` ({options.test_split!r}) a split of {data!r} that "
            f"is not trained on: {found}."
        )
    return data


def train_or_go_on(options: TrainAndTestOptions, callbacks: Sequence[TrainerCallback] = ()) -> bool:
    """Train, from the last complete checkpoint in the folder if there is one; whether it finished without a signal."""
    options = copy.copy(options)
    folder = Path(options.output_dir or "")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            find_checkpoint(folder, "last")
            options.resume_from_checkpoint = "last"
        except MolaError:
            logger.warning("%s holds no complete checkpoint: the training starts again.", folder)
            options.overwrite_output_dir = True
    result = train(options, [*callbacks, _StopIfAsked()])
    free_memory()
    stop_if_asked()
    return result.status == "finished"


def free_memory() -> None:
    """Give back what the last model took, before the next one loads: it and what watches it refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def evaluate_once(options: EvaluateOptions, fingerprint: str) -> dict[str, Any]:
    """Content of the result file `options.output`, from an evaluation if there was none before.

    Raises:
        MolaError: the file is a result of something else, such as examples of another `fingerprint`, or the test
            cannot be done.
    """
    path = Path(options.output or "")
    if not path.exists():  # what is left of a test of other settings, or before the folder was moved, is no result
        found = evaluate(replace(options, overwrite=True)).to_dict()
        free_memory()
        return found
    try:
        result = read_json(path)
    except (OSError, ValueError) as error:
        raise MolaError(f"{str(path)!r} is no result of a test ({error}). Delete it to test again.") from error
    check_form(result, _RESULT, str(path), "It is no result of a test. Delete it to test again.")
    old = {**result["settings"], "data": result["data_fingerprint"]}
    new = {**asdict(options), "data": fingerprint}
    if "task_fingerprint" in result:  # which older results lack
        rule = load_task(options.task).fingerprint()
        old["template or answer_pattern"], new["template or answer_pattern"] = result["task_fingerprint"], rule
    places = ("adapter", "output", "overwrite")  # the folder may have been moved
    key = first_difference(old, new, (key for key in new if key not in places))
    if key is not None:
        raise MolaError(
            f"{str(path)!r} was made with another `{key}`: {old.get(key)!r}, now {new[key]!r}. Use the same options "
            "and data, or delete that file to test again."
        )
    return result


def recorded(work: Callable[[], bool], write: Callable[..., Any]) -> str:
    """Do the work of a study, with its status in the record; how it ended: "finished", or "interrupted" by a signal."""
    write("running")
    try:
        return "finished" if work() else "interrupted"
    except KeyboardInterrupt:
        return "interrupted"
    except BaseException as error:
        write("failed", error=str(error) or type(error).__name__)
        raise


_asked_to_stop = threading.Event()
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def stop_if_asked() -> None:
    """Raise KeyboardInterrupt if a signal asked for it: what is raised while garbage is collected is lost."""
    if _asked_to_stop.is_set():
        raise KeyboardInterrupt


class _StopIfAsked(TrainerCallback):
    """For a signal that came while a training was prepared, if what it raised was lost: before the first step."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """See `stop_if_asked`."""
        stop_if_asked()


def _stop(number: int, frame: Any) -> NoReturn:
    _asked_to_stop.set()
    raise KeyboardInterrupt


@contextlib.contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a test as Ctrl-C does, see also `stop_if_asked`; a running training has its own way of stopping."""
    if threading.current_thread() is not threading.main_thread() or _stop in map(signal.getsignal, _SIGNALS):
        yield
        return
    heard = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked_to_stop.clear()
