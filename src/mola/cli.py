"""`mola <command>`: finds the command in the table `COMMANDS`, parses its options and runs it.

Invalid input and errors of the operating system print one line and exit with code 2. Ctrl-C exits
with code 130, a closed pipe with 141. Any other exception keeps its traceback.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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

    module: str  # its function `function` runs the command
    options: str  # path of the options dataclass
    summary: str  # one line for the help text
    positional: str | None = None  # the option that the first positional argument sets
    further: str | None = None  # the option, a list, that the positional arguments after the first one set
    # Path of the class with mola's own options, for a command that has those of `TrainingArguments` too.
    own_options: str | None = None
    function: str = "main"


COMMANDS = {
    "prepare": Command(
        "mola.data.prepare",
        "mola.data.options.PrepareOptions",
        "convert a data set to instructions and answers",
        "task",
    ),
    "train": Command(
        "mola.training.train",
        "mola.training.options.TrainOptions",
        "fine-tune a mixture of LoRA experts",
        own_options="mola.training.fields.TrainFields",
    ),
    "continual": Command(
        "mola.studies.continual_learning.continual",
        "mola.studies.continual_learning.stages.ContinualOptions",
        "train on one task after another, and measure forgetting",
        own_options="mola.studies.continual_learning.fields.ContinualFields",
    ),
    "evaluate": Command(
        "mola.evaluation.evaluate",
        "mola.evaluation.options.EvaluateOptions",
        "measure the accuracy on a test file",
        "adapter",
    ),
    "lm-eval": Command(
        "mola.evaluation.lm_eval",
        "mola.evaluation.options.LmEvalOptions",
        "run a model on tasks of the LM Evaluation Harness",
        "adapter",
    ),
    "generate": Command(
        "mola.generation.generate",
        "mola.generation.options.GenerateOptions",
        "answer one prompt, or every line of standard input",
        "adapter",
    ),
    "serve": Command(
        "mola.serving.serve",
        "mola.serving.options.ServeOptions",
        "answer over HTTP, with an OpenAI-compatible API",
        "adapter",
    ),
    "skills add": Command(
        "mola.skills.commands",
        "mola.skills.options.AddOptions",
        "make LoRAs of one base model skills: each prompt asks the one that knows it",
        "folder",
        "skills",
        function="add_skills",
    ),
    "skills remove": Command(
        "mola.skills.commands",
        "mola.skills.options.RemoveOptions",
        "remove skills: the files are as if they had never been added",
        "folder",
        "skills",
        function="remove_skills",
    ),
    "skills list": Command(
        "mola.skills.listing", "mola.skills.options.ListOptions", "show rank, layers and size of each skill", "folder"
    ),
    "skills test": Command(
        "mola.skills.commands",
        "mola.skills.options.TestOptions",
        "show which skill is asked for which data, and what goes to the base model",
        "folder",
        function="test_skills",
    ),
    "skills merge": Command(
        "mola.skills.commands",
        "mola.skills.options.MergeOptions",
        "add the skills of other folders of the same base model; needs no data",
        "folder",
        "others",
        function="merge_skills",
    ),
    "skills suggest": Command(
        "mola.skills.commands",
        "mola.skills.options.SuggestOptions",
        "find the layer whose input tells the data of skills apart",
        "folder",
        function="suggest_layer",
    ),
    "plan": Command(
        "mola.models.plan",
        "mola.models.options.PlanOptions",
        "show parameters and cost of an allocation, without loading weights",
    ),
    "compare": Command(
        "mola.studies.comparison.compare",
        "mola.studies.comparison.options.CompareOptions",
        "find out whether a mixture beats a LoRA of its size on your data, or compare any recipes with several seeds",
        own_options="mola.studies.fields.CompareFields",
    ),
    "allocate": Command(
        "mola.allocation.allocate",
        "mola.allocation.options.AllocateOptions",
        "choose how many experts each layer gets, for a given total",
    ),
    "reallocate": Command(
        "mola.allocation.reallocate",
        "mola.allocation.options.ReallocateOptions",
        "change how many experts each layer of a trained adapter has",
        "adapter",
    ),
    "convert": Command(
        "mola.exporting.convert",
        "mola.exporting.options.ConvertOptions",
        "convert between mixtures, LoRAs and adapters of other code bases",
        "source",
    ),
    "merge": Command(
        "mola.exporting.merge",
        "mola.exporting.options.MergeOptions",
        "merge a LoRA into its base model and write the result",
        "adapter",
    ),
    "inspect": Command(
        "mola.reporting.inspect",
        "mola.reporting.options.InspectOptions",
        "show which experts process which tokens, and how similar the experts are",
        "adapter",
    ),
    "report": Command(
        "mola.reporting.report", "mola.reporting.options.ReportOptions", "write one HTML page about a run", "run_dir"
    ),
    "doctor": Command(
        "mola.reporting.doctor",
        "mola.reporting.options.DoctorOptions",
        "find what is wrong with a run, and what to change",
        "run_dir",
    ),
    "demo": Command(
        "mola.serving.demonstration.demo",
        "mola.serving.options.DemoOptions",
        "open a web page that compares answers with and without an adapter, and shows its experts",
        "adapter",
    ),
    "quickstart": Command(
        "mola.studies.quickstart",
        "mola.studies.fields.QuickstartOptions",
        "run prepare, train, evaluate and report on a small model",
    ),
}

# First word of commands of two words -> what they are about.
GROUPS = {"skills": "a mixture that grows: LoRAs trained apart, of which each prompt asks the one that knows it"}

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
    name, rest = split_command(words)
    if name in COMMANDS:
        return run(name, rest)
    if words and words[0] == "with":
        return _run_and_report("mola with", lambda: _run_with(words[1:]))
    prog = f"mola {words[0]}" if words and words[0] in GROUPS else "mola"
    return _run_and_report(prog, lambda: _print_usage_or_version(words))


def split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command that words begin with, which may not exist, and its arguments."""
    length = 2 if words and words[0] in GROUPS else 1
    return " ".join(words[:length]), list(words[length:])


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one command. Returns its exit code, like `main`."""
    return _run_and_report(f"mola {name}", lambda: _run(COMMANDS[name], arguments, f"mola {name}"))


def run_script(module: str, options: str, summary: str, *, accept_noflag: bool = False) -> int:
    """Run a script as a command that is named after its file.

    Args:
        module: holds `main`.
        options: path of the options dataclass.
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
    # Imported late: `mola --help` does not need them.
    from mola.options.fields import with_shown_names
    from mola.options.parsing import parse, read_recipe

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("mola").setLevel(logging.INFO)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # as Python does for stderr
    # PEFT reads a property of Transformers by its old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    parse_as = functools.partial(
        parse,
        arguments=arguments,
        prog=name,
        summary=command.summary,
        positional=command.positional,
        further=command.further,
        accept_noflag=accept_noflag,
        read=functools.cache(read_recipe),  # a recipe may come from a pipe, which can be read once
    )
    try:
        return _parse_and_run(command, arguments, parse_as)
    except MolaError as error:
        raise MolaError(with_shown_names(str(error), find(command.own_options or command.options))) from error


def _parse_and_run(command: Command, arguments: Sequence[str], parse_as: Callable[[Any], Any]) -> int:
    """Parse the options, first without torch and Transformers unless their help texts are needed, and run."""
    options = None
    if command.own_options is None:
        options = parse_as(find(command.options))
        _check(options)
    elif "all" not in arguments:  # `--help all` needs the texts
        from mola.training.launch import check_nproc, is_launcher, launch
        from mola.training.trainer_names import with_trainer_names

        quick_class = with_trainer_names(find(command.own_options))
        if quick_class is not None:
            quick_options = parse_as(quick_class)
            _check(quick_options)
            if command is COMMANDS["train"]:
                if is_launcher(quick_options.nproc):
                    return launch(quick_options.nproc, arguments)
                check_nproc(quick_options.nproc)
    main = find(f"{command.module}.{command.function}")  # from here on torch and Transformers may be imported
    if options is None:
        options = parse_as(find(command.options))
    with explain_out_of_memory(_LESS_MEMORY):
        code: int = main(options)
    return code


def find(path: str) -> Any:
    """The object of a module that a path such as `mola.cli.main` names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _check(options: Any) -> None:
    """Find mistakes before anything is imported that takes seconds: in paths, results, `dtype`, and by `check`."""
    from mola.checkpoints.adapter_settings import adapter_settings, named_adapter
    from mola.data import read
    from mola.data.tasks import load_task
    from mola.exporting.options import check_sources
    from mola.models import base_folder
    from mola.models.options import check_dtype
    from mola.options.fields import check_results

    check_dtype(getattr(options, "dtype", "auto"))
    if getattr(options, "task", None) is not None:
        load_task(options.task)
    values = {name: getattr(options, name, None) for name in ("base_model", "adapter", "data")}
    if values["base_model"]:
        base_folder.check_exists(values["base_model"])
    is_resumed = getattr(options, "resume_from_checkpoint", None) is not None  # the checkpoint has the adapter
    if isinstance(values["adapter"], str) and not os.path.isdir(values["adapter"]) and not is_resumed:
        adapter_settings(values["adapter"])  # raises
    if hasattr(options, "skill") and not hasattr(options, "into"):  # `mola train` names a new skill
        named_adapter(values["adapter"], options.skill)
    check_sources(getattr(options, "source", []))
    for data in [values["data"]] if isinstance(values["data"], str) else values["data"] or []:
        if "=" not in data:  # `mola prepare` accepts train=A,validation=B
            read.check_exists(data)
    check_results(options)
    if hasattr(options, "check"):
        options.check()
    if values["base_model"]:
        base_folder.check_on_hub(values["base_model"], getattr(options, "gguf_file", None))


def _run_with(arguments: Sequence[str]) -> int:
    from mola.integrations import with_program

    return with_program.main(arguments)


def _print_usage_or_version(words: Sequence[str]) -> int:
    group = words[0] if words and words[0] in GROUPS else None
    names = {name.removeprefix(f"{group} "): each.summary for name, each in COMMANDS.items() if _group(name) == group}
    if group is None:
        names |= GROUPS | {"with": "run another program (transformers, lm_eval, accelerate ...) with mola registered"}
    word = words[0 if group is None else 1] if len(words) > (group is not None) else None
    prog = f"mola {group}" if group else "mola"
    if word == "--version":
        print(f"mola {__version__}")
    elif word in (None, "-h", "--help", "help"):
        width = max(map(len, names))
        print(f"usage: {prog} COMMAND [ARGUMENT] [--config RECIPE.yaml] [--flag value ...]\n")
        for name, summary in names.items():
            print(f"  {name:<{width}}  {summary}")
        print(f"\nRun `{prog} COMMAND --help` for the options of a command.")
    else:
        meant = _OTHER_NAMES.get(word.lower()) or next(iter(difflib.get_close_matches(word.lower(), names)), None)
        hint = f" Did you mean `{meant}`?" if meant in names else ""
        raise MolaError(f"there is no command {word!r}.{hint} The commands are {', '.join(names)}.")
    return 0 if word else 2  # `mola` alone is a usage error


def _group(name: str) -> str | None:
    """The first word of a command of two words; None for other commands."""
    return name.split()[0] if " " in name else None


if __name__ == "__main__":
    sys.exit(main())
