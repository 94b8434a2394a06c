"""`python -m studies.routing_worth`: what is routing worth, over all mixtures of comparisons by `mola compare`?

- Every mixture becomes the plain LoRA nearest to it, fitted to rows that the mixture was trained on.
- The LoRA is tested as the mixture was, on the same questions; the difference is what the LoRA gains or loses.
- Every finished LoRA is in the record, and deleted. The same command does what is left; several share the work.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from studies.routing_worth_tables import key_of, markdown, note_of, tables

from mola.data.encode import data_fingerprint
from mola.data.examples import load_examples
from mola.data.tasks import load_task
from mola.errors import MolaError
from mola.evaluation.evaluate import EvaluateOptions, check_evaluation, evaluate
from mola.exporting.convert import ConvertOptions, ExportReport, convert
from mola.files.atomic import atomic_write_json, check_writable
from mola.files.environment import machine_description, software_versions
from mola.files.locks import POLL_SECONDS, held
from mola.files.marked_pages import check_page, write_part
from mola.files.reading import read_json, read_json_object
from mola.files.schema import INTEGER, NUMBER, TEXT, check_form
from mola.files.terminal import end_unread, table_console
from mola.models.adapters import check_adapter
from mola.models.identity import weights_identity
from mola.models.quantization import QUANTIZATION_OPTIONS
from mola.options.fields import first_difference, mapping, option
from mola.options.parsing import parse
from mola.studies.comparison.curve import marks_of
from mola.studies.comparison.options import Key
from mola.studies.comparison.record import Result, read_results
from mola.studies.train_and_test import signals_as_interrupt, stop_if_asked
from mola.training.checkpoints import RUN_FILE

_ENTRY = {**dict.fromkeys(("task", "recipe", "marks", "mixture"), TEXT), "seed": INTEGER, "kl": NUMBER}


@dataclass
class WorthOptions:
    """Options of the study."""

    record: list[str] = field(
        default_factory=lambda: ["runs/study/compare.json"], metadata={"help": "Records of one or more comparisons."}
    )
    runs: list[str] = field(
        default_factory=lambda: ["runs/study"], metadata={"help": "The `output_dir` of each, with the adapters."}
    )
    output: str = option("studies/routing_worth.json", "File of all results.")
    page: str | None = option(
        None, "When all is done, also write the tables into this page, between its two marker comments."
    )
    tasks: list[str] | None = option(None, "Tasks whose mixtures are exported; default: all.")
    recipes: list[str] | None = option(None, "Recipes to export; default: all with a layer of several experts.")
    seeds: list[int] | None = option(None, "Seeds to export; default: all.")
    rank: int = option(8, "Rank of the LoRAs.")
    fit_rows: int = option(256, "Training rows of a fit, evenly spaced; one of ten is held out, to measure KL on.")


class Study:
    """What is done, and doing the rest."""

    def __init__(self, options: WorthOptions) -> None:
        self.options, self.output, self.work = options, Path(options.output), Path(options.runs[0], ".worth")
        if options.fit_rows < 2:
            raise MolaError(f"`fit_rows` must be at least 2, of which one is held out: got {options.fit_rows}.")
        self.mixtures, self.folders = _mixtures(options.record, options.runs)
        for name, wanted in (("task", options.tasks), ("recipe", options.recipes), ("seed", options.seeds)):
            known = {getattr(key, name): None for key in self.mixtures}
            for each in wanted or ():
                if each not in known:
                    have = ", ".join(map(str, known)) or "none"
                    raise MolaError(
                        f"`{name}s` must be of mixtures in {_names(options.record)}, got {each!r}: there is {have}."
                    )
        if not self._chosen():
            raise MolaError(
                "`record` must hold a mixture of these `tasks`, `recipes` and `seeds`: "
                f"{_names(options.record)} has none."
            )
        check_writable(self.output)
        self.entries = self._read()
        for key in self.left():
            self._inputs(key)

    def left(self) -> list[Key]:
        """Mixtures without a result."""
        done = {key_of(entry) for entry in self.entries}
        return [key for key in self._chosen() if key not in done]

    def _chosen(self) -> list[Key]:
        wanted = self.options.tasks, self.options.recipes, self.options.seeds
        return [key for key in self.mixtures if all(w is None or k in w for k, w in zip(key, wanted, strict=True))]

    def do_all(self) -> None:
        """What nobody has done or is doing; then wait for the others, and do what they leave."""
        while left := self.left():
            is_idle = True
            for key in left:
                stop_if_asked()
                with held(self.work / f"{'-'.join(map(str, key))}.lock", waits=False) as is_mine:
                    self.entries = self._read()
                    if is_mine and key in self.left():
                        is_idle = False
                        print(f"{len(self.left())} mixtures left. Next: {key}", flush=True)
                        self._do(key)
            if is_idle and self.left():
                time.sleep(POLL_SECONDS)

    def _read(self) -> list[dict[str, Any]]:
        """Finished exports, all of them of mixtures as the comparison has them."""
        if not self.output.exists():
            return []
        try:
            entries = read_json(self.output)["runs"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MolaError(
                f"`output` is no record of this study: {str(self.output)!r} ({error}). Pass another."
            ) from error
        check_form(entries, [_ENTRY], str(self.output), "Restore it, or pass another `output`.")
        for entry in entries:
            result = self.mixtures.get(key_of(entry))
            if result is None:
                raise MolaError(
                    f"{key_of(entry)} of {str(self.output)!r} is no mixture of {_names(self.options.record)}. Pass its "
                    "own."
                )
            name = first_difference(entry, wanted := self._wanted(result), wanted)
            if name is not None:
                raise MolaError(
                    f"{key_of(entry)} of {str(self.output)!r} was made with another `{name}`: {entry.get(name)!r}, now "
                    f"{wanted[name]!r}. Use the same, take that entry out, or pass another `output`."
                )
        return entries

    def _wanted(self, result: Result) -> dict[str, Any]:
        """What has to be equal for an entry to be kept."""
        fit = {"rank": self.options.rank, "fit_rows": self.options.fit_rows}
        return fit | {"mixture": result.marks, "settings": result.settings, "fingerprints": result.fingerprints}

    def _inputs(self, key: Key) -> tuple[Path, dict[str, Any], EvaluateOptions]:
        """Folder, training settings and test of a mixture, as its folder has them."""
        folder, result = self.folders[key], self.mixtures[key]
        try:
            check_adapter(folder)
        except MolaError as error:
            raise MolaError(f"{key} has no adapter, see `keep_adapters` of `mola compare`: {error}") from error
        settings = read_json_object(folder / RUN_FILE).get("settings", {})
        tested = read_json_object(folder / "test.json")
        try:
            marks = "".join("01"[sample["correct"]] for sample in tested["samples"])
            test = EvaluateOptions(**{**tested["settings"], "adapter": None, "output": None})
            is_same = marks == result.marks and tested["data_fingerprint"] == result.fingerprints["test"]
            filters = settings["filters"]
        except (KeyError, TypeError) as error:
            raise MolaError(
                f"{str(folder)!r} must hold {RUN_FILE} and test.json of a run of `mola compare`: {error!r}."
            ) from error
        if not is_same:
            raise MolaError(
                f"test.json in {str(folder)!r} is not the test in {_names(self.options.record)}. Pass `runs` of that "
                "record."
            )
        for name in QUANTIZATION_OPTIONS:
            if getattr(test, name):
                raise MolaError(
                    f"`{name}` ({getattr(test, name)!r}) of {key} is unknown to `mola convert`. Leave its recipe out."
                )
        return folder, settings | {"filters": mapping("filters", filters)}, test

    def _do(self, key: Key) -> None:
        """One export and its test."""
        (folder, settings, test), result = self._inputs(key), self.mixtures[key]
        if data_fingerprint(check_evaluation(test)[1]) != result.fingerprints["test"]:
            raise MolaError(
                f"the test data of {key} are not those that the mixture was tested on: {test.data!r} has changed."
            )
        now = {"base_model": weights_identity(test.base_model), "rule": load_task(test.task).fingerprint()}
        for name, value in now.items():
            if getattr(result, name, value) not in (None, "", value):  # which older records lack
                raise MolaError(
                    f"`{name}` of {key} is not that with which the mixture was tested: {getattr(result, name)!r} then, "
                    f"now {value!r}. Use the same."
                )
        work = self.work / "-".join(map(str, key))
        shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
        try:
            report = self._export(folder, settings, test, result, work)
            tested = evaluate(replace(test, adapter=report.output))
        finally:
            shutil.rmtree(work, ignore_errors=True)
        entry = {**key._asdict(), **self._wanted(result), "accuracy": tested.accuracy}
        entry["marks"] = marks_of(tested.samples)
        entry |= {"kl": report.divergence["answer"], "explained": report.by_kind(), "rows": report.rows["answer"]}
        entry |= {"seconds": {**report.seconds, "testing": round(tested.seconds, 2)}, "notes": report.notes}
        entry |= {"versions": software_versions(), "machine": machine_description()}
        with held(self.work / "record.lock", waits=True):
            self.entries = [*self._read(), entry]
            atomic_write_json(self.output, {"runs": self.entries})

    def _export(
        self, folder: Path, settings: Mapping[str, Any], test: EvaluateOptions, result: Result, work: Path
    ) -> ExportReport:
        """The LoRA nearest to a mixture on rows of its training, in the prompts of its training."""
        task = load_task(settings["task"])
        rows = load_examples(
            settings["data"], task, settings["train_split"], limit=settings["limit"], filters=settings["filters"]
        )
        if not settings["validation_size"] and data_fingerprint(rows) != result.fingerprints["train"]:
            raise MolaError(f"{settings['data']!r} has changed since {result.key} was trained on it. Restore it.")
        count = min(self.options.fit_rows, len(rows))
        atomic_write_json(work / "fit.json", [rows[i * len(rows) // count] for i in range(count)])
        # Rows that are prompts and answers already: of their task only the template matters.
        fit = {"name": "fit", "version": 1, "columns": [], "instruction": None, "output": "-"}
        atomic_write_json(work / "fit.yaml", fit | {"template": settings["template"] or task.template})
        options = ConvertOptions(
            [str(folder)], str(work / "lora"), None, "lora", test.base_model, rank=self.options.rank
        )
        options = replace(options, data=[str(work / "fit.json")], task=str(work / "fit.yaml"), limit=count)
        more = {"dtype": test.dtype, "device": test.device, "trust_remote_code": test.trust_remote_code}
        report = convert(replace(options, **more))
        assert isinstance(report, ExportReport)
        return report


def _mixtures(records: Sequence[str], runs: Sequence[str]) -> tuple[dict[Key, Result], dict[Key, Path]]:
    """Results of mixtures, without those of a search for options or that diverged, and their folders."""
    if len(records) != len(runs):
        raise MolaError(f"`runs` must be as many as `record`, {len(records)}: got {len(runs)}.")
    results: dict[Key, Result] = {}
    folders = {}
    for record, folder in zip(records, runs, strict=True):
        for each in read_results(Path(record)):
            is_mixture = max(each.num_experts, default=0) > 1 and each.diverged_at is None  # else there are no weights
            if is_mixture and not each.key.candidate:
                if each.key in results:
                    raise MolaError(
                        f"`record`: {each.key} is in {record!r} and in another. Name their tasks differently."
                    )
                results[each.key] = each
                folders[each.key] = Path(folder, each.task, each.recipe, f"seed-{each.seed}")
    return results, folders


def _names(paths: Sequence[str]) -> str:
    return ", ".join(map(repr, paths))


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is left; returns the exit code: 0, 2 for wrong input, 130 after an interruption."""
    try:
        options = parse(WorthOptions, sys.argv[1:] if arguments is None else arguments, prog="studies.routing_worth")
        if options.page:
            check_page(options.page)
        study = Study(options)
        with signals_as_interrupt():
            study.do_all()
        if options.page:
            write_part(options.page, markdown(study.entries))
        _show(study, options.output)
    except BrokenPipeError:
        return end_unread("studies.routing_worth")
    except MolaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; go on with the same command", file=sys.stderr)
        return 130
    return 0


def _show(study: Study, output: str) -> None:
    for head, rows in tables(study.entries):
        table = Table()
        for column in head:
            table.add_column(escape(column), overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        table_console().print(table)
    print(f"{note_of(study.entries)} Everything is in {output}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
