"""`mola doctor`: the faults of a run or an adapter, and what to change. The command loads no model."""

from collections.abc import Mapping
from dataclasses import asdict, replace

from mola.files.atomic import atomic_write_json
from mola.files.terminal import OutputConsole
from mola.insight import ROUTING_FILE
from mola.options.fields import check_results
from mola.reporting.findings import MIN_LOSSES, Finding, find_faults, is_compared
from mola.reporting.load_run import Run, load_run, outdated_results, results_of_other_adapters
from mola.reporting.options import DoctorOptions
from mola.reporting.routing_log import LateUse, read_late_use


def doctor(options: DoctorOptions) -> list[Finding]:
    """Find the faults of a run.

    Args:
        options: the run folder and further files.

    Returns:
        The faults, gravest first; empty if there is none.

    Raises:
        MolaError: the folder holds no run and no adapter, or a result file is of a different kind.
    """
    return find_faults(*_load(options))


def main(options: DoctorOptions) -> int:
    """Run the command and print the findings."""
    check_results(options)
    run, late = _load(options)
    found = find_faults(run, late)
    if options.json is not None:
        atomic_write_json(options.json, {"run": str(run.folder), "findings": [asdict(each) for each in found]})
    lines = [] if found else [f"Nothing was found wrong with {run.folder}."]
    for number, each in enumerate(found, 1):
        lines += [f"{number}. {each.name}", f"   {each.seen}", f"   {each.change}"]
    lines += [f"Not looked at: {part}." for part in _missing_parts(run, late)]
    for line in lines:
        OutputConsole().print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _load(options: DoctorOptions) -> tuple[Run, dict[str, LateUse]]:
    """The run, without results of different adapters, and the use of its experts in the last quarter of training."""
    run = load_run(options.run_dir, export=options.export)
    outdated = outdated_results(run)
    if options.export is None and "export" in outdated:
        run = replace(run, export=None)
    if "after" in outdated or "after" in dict(results_of_other_adapters(run)):
        run = replace(run, after=None)
    steps = [curve[-1][0] for curve in run.curves.values()]
    return run, read_late_use(run.folder / ROUTING_FILE, max([run.record.get("steps") or 0, *steps]))


def _missing_parts(run: Run, late: Mapping[str, LateUse]) -> list[str]:
    """Names of the parts that the folder lacks, so that no rule could check them."""
    status = run.record.get("status", "finished")
    if run.export is not None:
        export = "no answers to a `test` in the export.json"
    elif run.paths["export"].is_file():
        export = "its export.json is older than the adapter"
    else:
        export = "no export.json"
    is_over, num_losses = status not in ("running", "interrupted"), len(run.curves.get("training", []))
    is_lora = not run.has_routers
    state = "" if run.has_record else ", which the trainer saves in its checkpoints"
    is_present = {
        "whether the training ended well, and its settings and data (no run.json, which only `mola train` writes)": (
            run.has_record
        ),
        f"the rest of the training (`status` in run.json is {status})": is_over,
        f"the training loss (fewer than {MIN_LOSSES} entries in {run.losses_file}{state})": num_losses >= MIN_LOSSES,
        "the evaluation loss (no evaluation data, or --eval_strategy no)": any(
            step for step, _ in run.curves.get("evaluation", [])
        ),
        "routers over training (no routing.jsonl, or no numbers in it)": run.routing is not None or is_lora,
        "routers in the last quarter of training (routing.jsonl ends before)": run.routing is None or late or is_lora,
        "likeness of experts, and `top_k` without balance loss (no adapter saved)": run.adapter is not None,
        "answers to a test (no after.json of `mola evaluate`, or one of a different adapter)": "after"
        in run.accuracies,
        f"whether a LoRA answers as well ({export} of `mola convert --to lora`)": is_compared(run.export or {})
        or is_lora,
    }
    return [name for name, exists in is_present.items() if not exists]
