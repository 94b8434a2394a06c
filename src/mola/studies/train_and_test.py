"""One training run and its test, for commands that do several: options, resuming, signals."""

import contextlib
import copy
import gc
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from mola.data.read import check_split, split_names
from mola.data.tasks import Task, load_task
from mola.errors import MolaError
from mola.evaluation.evaluate import EvaluateOptions, check_evaluation, evaluate
from mola.files.reading import read_json
from mola.models.options import QUANTIZATION_OPTIONS
from mola.studies.fields import TestFields
from mola.training.checkpoints import find_checkpoint
from mola.training.train import TrainOptions, train

logger = logging.getLogger(__name__)

# Options that may differ when a training is resumed: paths, and options that do not affect the weights.
NOT_COMPARED = (
    "output_dir",
    "adapter",
    "into",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "disable_tqdm",
    "logging_steps",
    "report_to",
    "run_name",
    "save_total_limit",
    "verbose",
)
_SAME_NAME = ("base_model", "task", "filters", "max_new_tokens", "template", "scoring", "trust_remote_code")
# Option of `mola evaluate` -> option of this class.
_TEST_OPTIONS = {
    **{name: name for name in (*_SAME_NAME, *QUANTIZATION_OPTIONS)},
    "split": "test_split",
    "limit": "test_limit",
    "batch_size": "test_batch_size",
    "dtype": "base_dtype",
}


@dataclass
class TrainAndTestOptions(TestFields, TrainOptions):
    """Options of one training run: those of `mola train`, and those of the test on its task."""

    def check_one_process(self, command: str, cure: str) -> None:
        """Raise if several processes run the command, or if `resume_from_checkpoint` is set.

        Args:
            command: for messages, such as "mola compare".
            cure: the end of the advice on several processes; may be empty.
        """
        if self.resume_from_checkpoint:
            raise MolaError(
                f"`resume_from_checkpoint` ({self.resume_from_checkpoint!r}) has no effect: the same command "
                "resumes where it stopped. Leave the option out."
            )
        if (processes := max(self.world_size, self.nproc)) > 1:
            raise MolaError(
                f"`{command}` runs in one process: got {processes}. Start it without torchrun and `nproc`{cure}."
            )


def evaluation_of(options: TrainAndTestOptions) -> EvaluateOptions:
    """Options of the evaluation that follows a training run, without adapter and output file.

    Raises:
        MolaError: the data are missing, or there are no test data.
    """
    if options.data is None:
        raise MolaError("`data` must name the training data. Set it for this run or for all.")
    if options.test_data is not None:
        check_split("test_split", options.test_split, TrainAndTestOptions.test_split, options.test_data)
    values = {name: getattr(options, own) for name, own in _TEST_OPTIONS.items()}
    # Named here, because a later training may leave an adapter with the template of a different task.
    if options.task is not None:
        values["template"] = options.template or load_task(options.task).template
    return EvaluateOptions(
        **values, data=options.test_data or _test_source(options), device="cpu" if options.use_cpu else None
    )


def check_questions(test: EvaluateOptions) -> tuple[Task, list[dict[str, Any]]]:
    """Check an evaluation that measures accuracy, before weights are loaded; returns its task and its examples.

    Raises:
        MolaError: the task has no answers, or see `check_evaluation`.
    """
    checked = check_evaluation(test)
    if checked.task is None:
        raise MolaError(
            f"`task` must say where the answers are, whose accuracy is measured: {test.task!r} does not. Change it."
        )
    return checked.task, checked.examples


def _test_source(options: TrainAndTestOptions) -> str:
    """The training data, if they have a test split; used if `test_data` is not set."""
    data = options.data or ""
    splits = split_names(data)
    if options.test_split not in splits or options.test_split == options.train_split:
        found = f"its splits are {', '.join(splits)}" if splits else "it has no splits"
        raise MolaError(
            f"`test_data` must name the test data, or `test_split` ({options.test_split!r}) a split of {data!r} that "
            f"is not used for training: {found}."
        )
    return data


def train_or_resume(options: TrainAndTestOptions) -> bool:
    """Train, resuming from the last complete checkpoint in the folder if there is one.

    Returns:
        Whether the training finished; False if a signal stopped it.
    """
    options = copy.copy(options)
    folder = Path(options.output_dir or "")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            find_checkpoint(folder, "last")
            options.resume_from_checkpoint = "last"
        except MolaError:
            logger.warning("%s holds no complete checkpoint: the training starts from the beginning.", folder)
            options.overwrite_output_dir = True
    result = train(options)
    free_memory()
    return result.status == "finished"


def free_memory() -> None:
    """Free the memory of the last model, which reference cycles keep, before the next model is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def evaluate_once(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate unless the result file `options.output` exists, and return its content.

    The caller makes sure that an existing file is a result of the same weights, options and data.
    """
    path = Path(options.output or "")
    if path.exists():
        result: dict[str, Any] = read_json(path)
        return result
    found = evaluate(replace(options, overwrite=True)).to_dict()  # also resumes an unfinished evaluation
    free_memory()
    return found


def recorded(work: Callable[[], bool], write: Callable[..., Any]) -> str:
    """Do the work of a study, and write its status to the record when work begins or fails.

    Args:
        work: does the work; returns False if a signal stopped it.
        write: writes the record with a status.

    Returns:
        "finished", or "interrupted" by a signal.
    """
    write("running")
    try:
        return "finished" if work() else "interrupted"
    except KeyboardInterrupt:
        return "interrupted"
    except BaseException as error:
        write("failed", error=str(error) or type(error).__name__)
        raise


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, like Ctrl-C. A running training handles both signals itself."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
