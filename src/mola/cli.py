"""`mola <command>`: finds the command in the table `COMMANDS`, parses its options and runs it.

Invalid input and errors of the operating system print one line and exit with code 2. Ctrl-C exits
with code 130, a closed pipe with 141. Any other exception keeps its traceback.
"""

from __future__ import annotations

import difflib
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
    "Use --dtype bfloat16 or a quantised base model, or, if the command has such options, a smaller batch or shorter "
    "texts."
)


class Command(NamedTuple):
    """Where the code of a command is, and how the help text describes the command."""

    module: str  # its function `main` runs the command
    options: str  # name of the options dataclass in the module
    summary: str  # one line for the help text
    positional: str | None = None  # the option that the first positional argument sets


COMMANDS = {
    "prepare": Command("mola.data.prepare", "PrepareOptions", "convert a data set to instructions and answers", "task"),
    "train": Command("mola.training.train", "TrainOptions", "fine-tune a mixture of LoRA experts"),
    "continual": Command(
        "mola.studies.continual_learning.continual",
        "ContinualOptions",
        "train on one task after another, and measure forgetting",
    ),
    "evaluate": Command(
        "mola.evaluation.evaluate", "EvaluateOptions", "measure the accuracy on a test file", "adapter"
    ),
    "lm-eval": Command(
        "mola.evaluation.lm_eval", "LmEvalOptions", "run a model on tasks of the LM Evaluation Harness", "adapter"
    ),
    "generate": Command(
        "mola.generation.generate", "GenerateOptions", "answer one prompt, or every line of standard input", "adapter"
    ),
    "serve": Command(
        "mola.serving.serve", "ServeOptions", "answer over HTTP, with an OpenAI-compatible API", "adapter"
    ),
    "plan": Command(
        "mola.models.plan", "PlanOptions", "show parameters and cost of an allocation, without loading weights"
    ),
    "compare": Command(
        "mola.studies.comparison.compare",
        "CompareOptions",
        "compare recipes: train each on tasks with several seeds, and test which differences are significant",
    ),
    "allocate": Command(
        "mola.allocation.allocate", "AllocateOptions", "choose how many experts each layer gets, for a given total"
    ),
    "reallocate": Command(
        "mola.allocation.reallocate",
        "ReallocateOptions",
        "change how many experts each layer of a trained adapter has",
        "adapter",
    ),
    "convert": Command(
        "mola.exporting.convert",
        "ConvertOptions",
        "convert between mixtures, LoRAs and adapters of other code bases",
        "source",
    ),
    "merge": Command(
        "mola.exporting.merge", "MergeOptions", "merge a LoRA into its base model and write the result", "adapter"
    ),
    "inspect": Command(
        "mola.reporting.inspect",
        "InspectOptions",
        "show which experts process which tokens, and how similar the experts are",
        "adapter",
    ),
    "report": Command("mola.reporting.report", "ReportOptions", "write one HTML page about a run", "run_dir"),
    "doctor": Command(
        "mola.reporting.doctor", "DoctorOptions", "find what is wrong with a run, and what to change", "run_dir"
    ),
    "demo": Command(
        "mola.serving.demonstration.demo",
        "DemoOptions",
        "open a web page that compares answers with and without an adapter, and shows its experts",
        "adapter",
    ),
    "quickstart": Command(
        "mola.studies.quickstart", "QuickstartOptions", "run prepare, train, evaluate and report on a small model"
    ),
}

# Commands of other programs -> mola's command for the same thing.
_OTHER_NAMES = {"sft": "train", "finetune": "train", "fine-tune": "train", "chat": "generate", "infer": "generate"}
_OTHER_NAMES |= {"test": "evaluate", "export": "convert", "check": "doctor", "preprocess": "prepare"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `mola` command.

    Returns:
        The exit code: 0; 2 for invalid input or an error of the operating system; 130 after an interrupt; 141 if the
        reader of the output closed the pipe.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return run(words[0], words[1:])
    if words and words[0] == "with":
        return _run_and_report("mola with", lambda: _run_with(words[1:]))
    return _run_and_report("mola", lambda: _print_usage_or_version(words))


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one command. Returns its exit code, like `main`."""
    return _run_and_report(f"mola {name}", lambda: _run(COMMANDS[name], arguments, f"mola {name}"))


def run_script(module: str, options: str, summary: str, *, accept_noflag: bool = False) -> int:
    """Run a script as a command that is named after its file.

    Args:
        module: holds the options and `main`.
        options: name of the options dataclass.
        summary: one line for the help text.
        accept_noflag: accept `--noNAME` for `--NAME=false`, like Python Fire.

    Returns:
        The exit code, like `main`.
    """
    command, name = Command(module, options, summary), Path(sys.argv[0]).name
    return _run_and_report(name, lambda: _run(command, sys.argv[1:], name, accept_noflag=accept_noflag))


def _run_and_report(name: str, work: Callable[[], int]) -> int:
    """Run `work` and return its exit code. An error is printed in one line that begins with `name`."""
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


def _run(command: Command, arguments: Sequence[str], name: str, *, accept_noflag: bool = False) -> int:
    from mola.options.parsing import parse  # imported late: `mola --help` does not need Transformers

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("mola").setLevel(logging.INFO)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # as Python does for stderr
    # PEFT reads a property of Transformers by its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    module = importlib.import_module(command.module)
    options = parse(
        getattr(module, command.options),
        arguments,
        prog=name,
        summary=command.summary,
        positional=command.positional,
        accept_noflag=accept_noflag,
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
        print("usage: mola COMMAND [ARGUMENT] [--config RECIPE.yaml] [--flag value ...]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<{width}}  {command.summary}")
        print(f"  {'with':<{width}}  run another program (transformers, lm_eval, accelerate ...) with mola registered")
        print("\nRun `mola COMMAND --help` for the options of a command.")
    else:
        names = [*COMMANDS, "with"]
        word = words[0].lower()
        meant = _OTHER_NAMES.get(word) or next(iter(difflib.get_close_matches(word, names)), None)
        hint = f" Did you mean `{meant}`?" if meant else ""
        raise MolaError(f"there is no command {words[0]!r}.{hint} The commands are {', '.join(names)}.")
    return 0 if words else 2  # `mola` alone is a usage error


if __name__ == "__main__":
    sys.exit(main())
