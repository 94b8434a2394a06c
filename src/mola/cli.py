"""`mola <command>`: finds the command in the table `COMMANDS`, parses its options and runs it.

Invalid input and file errors print one line and exit with code 2. Any other exception keeps its traceback.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mola._version import __version__
from mola.errors import MolaError
from mola.files.failures import explain_out_of_memory
from mola.files.terminal import close_output

_LESS_MEMORY = (
    "Pass a smaller batch or shorter texts, if the command has such options, --dtype bfloat16, or a quantised "
    "base model."
)


class Command(NamedTuple):
    """Where the code of a command is, and how the help text describes the command."""

    module: str  # its function `main` runs the command
    options: str  # name of the options dataclass in the module
    summary: str  # one line for the help text
    positional: str | None = None  # option set by a positional first argument


COMMANDS = {
    "prepare": Command("mola.data.prepare", "PrepareOptions", "turn a data set into instructions and answers", "task"),
    "train": Command("mola.training.train", "TrainOptions", "fine-tune a mixture of LoRA experts"),
    "continual": Command(
        "mola.studies.continual_learning.continual",
        "ContinualOptions",
        "train on one task after another, measure forgetting",
    ),
    "evaluate": Command("mola.evaluation.evaluate", "EvaluateOptions", "measure the accuracy on a test file"),
    "lm-eval": Command("mola.evaluation.lm_eval", "LmEvalOptions", "run a model on tasks of the LM Evaluation Harness"),
    "generate": Command("mola.generation.generate", "GenerateOptions", "answer one prompt, or every line of the input"),
    "serve": Command("mola.serving.serve", "ServeOptions", "answer over HTTP, with an OpenAI-compatible API"),
    "plan": Command(
        "mola.models.plan", "PlanOptions", "show parameters and cost of an allocation, without loading weights"
    ),
    "compare": Command(
        "mola.studies.comparison.compare",
        "CompareOptions",
        "train recipes on tasks with several seeds, and test which differences are significant",
    ),
    "allocate": Command(
        "mola.allocation.allocate", "AllocateOptions", "choose the number of experts per layer for an exact budget"
    ),
    "reallocate": Command(
        "mola.allocation.reallocate", "ReallocateOptions", "change the numbers of experts of a trained adapter"
    ),
    "convert": Command(
        "mola.exporting.convert",
        "ConvertOptions",
        "convert between mixtures, LoRAs and adapters of other code bases",
        "source",
    ),
    "merge": Command(
        "mola.exporting.merge", "MergeOptions", "write base model and LoRA as one model folder", "adapter"
    ),
    "inspect": Command(
        "mola.reporting.inspect", "InspectOptions", "show which experts process which tokens, and how similar they are"
    ),
    "report": Command("mola.reporting.report", "ReportOptions", "write one HTML page about a run", "run_dir"),
    "doctor": Command(
        "mola.reporting.doctor", "DoctorOptions", "find what is wrong with a run, and what to change", "run_dir"
    ),
    "demo": Command(
        "mola.serving.demonstration.demo",
        "DemoOptions",
        "open a page that answers with and without an adapter, and shows its experts",
    ),
    "quickstart": Command(
        "mola.studies.quickstart", "QuickstartOptions", "run prepare, train, evaluate and report on a small model"
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `mola` command.

    Returns:
        The exit code: 0, 2 for invalid input, 130 after an interrupt, 141 if the reading end of a pipe was closed.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return run(words[0], words[1:])
    if words and words[0] == "with":
        return _exit_code("mola with", lambda: _run_with(words[1:]))
    return _exit_code("mola", lambda: _print_usage_or_version(words))


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one command. Returns its exit code, like `main`."""
    return _exit_code(f"mola {name}", lambda: _run(COMMANDS[name], arguments, f"mola {name}"))


def run_script(module: str, options: str, summary: str, *, bare_no: bool = False) -> int:
    """Run a script as a command that is named after its file.

    Args:
        module: holds the options and `main`.
        options: name of the options dataclass.
        summary: one line for the help text.
        bare_no: accept `--noflag` for `--flag=false`, like Python Fire.

    Returns:
        The exit code, like `main`.
    """
    command, name = Command(module, options, summary), Path(sys.argv[0]).name
    return _exit_code(name, lambda: _run(command, sys.argv[1:], name, bare_no=bare_no))


def _exit_code(name: str, work: Callable[[], int]) -> int:
    """The exit code that `work` returns, or that of an error, which is printed in one line after the name."""
    try:
        code = work()
        sys.stdout.flush()  # so that a broken pipe is noticed here
        return code
    except BrokenPipeError:
        return close_output()
    except (MolaError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def _run(command: Command, arguments: Sequence[str], name: str, *, bare_no: bool = False) -> int:
    from mola.options.parsing import parse  # imports Transformers, which the list of commands does not need

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("mola").setLevel(logging.INFO)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # like stderr
    # PEFT reads a property of Transformers by its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    module = importlib.import_module(command.module)
    options = parse(
        getattr(module, command.options),
        arguments,
        prog=name,
        summary=command.summary,
        positional=command.positional,
        bare_no=bare_no,
    )
    with explain_out_of_memory(_LESS_MEMORY):
        code: int = module.main(options)
    return code


def _run_with(arguments: Sequence[str]) -> int:
    from mola.integrations import with_program

    return with_program.main(arguments)


def _print_usage_or_version(words: Sequence[str]) -> int:
    if words and words[0] == "--version":
        print(f"mola {__version__}")
    elif not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print("usage: mola COMMAND [--config RECIPE.yaml] [--flag value ...]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<{width}}  {command.summary}")
        print(
            f"  {'with':<{width}}  run a different program (transformers, lm_eval, accelerate ...) with mola registered"
        )
        print("\nmola COMMAND --help")
    else:
        raise MolaError(f"there is no command {words[0]!r}; the commands are {', '.join(COMMANDS)}")
    return 0 if words else 2


if __name__ == "__main__":
    sys.exit(main())
