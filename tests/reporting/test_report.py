"""`mola report`: everything of a run in one page, nothing else replaced, nothing from elsewhere."""

import datetime
import json
import re
import shlex
import shutil

import pytest

from mola import MolaConfig
from mola.cli import COMMANDS, find, main
from mola.data.prepare import PrepareOptions, prepare
from mola.errors import MolaError
from mola.evaluation.evaluate import EvaluateOptions
from mola.evaluation.scoring import summarize_losses
from mola.options.parsing import parse
from mola.reporting.adapter_weights import read_adapter_weights
from mola.reporting.heatmaps import gate_maps
from mola.reporting.inspect import InspectOptions, render_inspection
from mola.reporting.load_run import load_run, step_of_weights
from mola.reporting.report import ReportOptions, report
from mola.reporting.run_summary import run_figures, small_percent
from mola.training.run_folder import clear_run
from tests.conftest import save_adapter
from tests.damage import change_tensors, flip_bit
from tests.reporting.conftest import change
from tests.reporting.pages import Page

SECTIONS = ["accuracy", "loss", "allocation", "gates", "routing", "redundancy", "agreement", "leave-one-out"]
SECTIONS += ["samples", "making"]
SECTIONS_WITH_EXPORT = [*SECTIONS[:1], "worth", *SECTIONS[1:]]
HOSTILE = '</script></style></title><script>alert(1)</script><img src=x onerror="alert(1)">&amp;]]>-->\r\n\u2028'


def page_of(run_dir, **options):
    return Page(report(ReportOptions(str(run_dir), **options)).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(finished_run, tmp_path_factory):
    return page_of(finished_run, output=str(tmp_path_factory.mktemp("page") / "report.html"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def percent(value, digits=1):
    return f"{100 * value:.{digits}f}\u00a0%"


def test_structure(page):
    assert [each.attributes["id"] for each in page.root.all("section")] == SECTIONS
    ids = [node.attributes["id"] for node in page.root if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    levels = [int(node.tag[1]) for node in page.root if re.fullmatch("h[1-6]", node.tag)]
    assert levels == [1] + [2] * len(SECTIONS)
    assert page.root.one("html").attributes["lang"] == "en"
    assert [len(page.root.all(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    assert page.root.one("head").one("title").text == "a run: a run of mola"
    for node in page.root:
        for name in ("aria-labelledby", "href"):
            if name in node.attributes:
                assert node.attributes[name].removeprefix("#") in ids
    for drawing in page.root.all("svg", role="img"):
        assert drawing.attributes["aria-label"]
    for box in page.root.all("div", class_="scroll"):
        assert box.attributes["tabindex"] == "0"
        assert box.attributes["aria-label"]


def test_the_page_loads_nothing_from_elsewhere(page):
    tags = {node.tag for node in page.root}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    attributes = {name for node in page.root for name in node.attributes}
    assert not attributes & {"src", "srcset", "style", "action", "xlink:href"}
    assert not [name for name in attributes if name.startswith("on")]
    assert all(node.attributes["href"].startswith("#") for node in page.root if "href" in node.attributes)
    policy = page.root.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert not re.search(r"url\(|@import|https?:", page.root.one("style").text)


def test_accuracy(page, finished_run):
    before, after = read(finished_run / "before.json"), read(finished_run / "after.json")
    rows = page.table("accuracy", "Accuracy by group").rows

    def cells(result):
        low, high = result["interval_95"]
        return [percent(result["accuracy"]), f"{percent(low)} to {percent(high)}"]

    assert "do not compare them" not in page.section("accuracy").text
    assert "in the wrong place" not in page.section("accuracy").text
    assert rows[1] == ["all", "8", *cells(before), *cells(after)]
    for row in rows[2:]:
        column, _, value = row[0].partition(": ")
        old, new = before["groups"][column][value], after["groups"][column][value]
        assert row[1:] == [str(new["total"]), *cells(old), *cells(new)]
    assert len(rows) - 2 == sum(map(len, after["groups"].values()))


def test_loss(page, finished_run):
    entries = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    training = {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
    evaluation = {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}
    rows = page.section("loss").one("table").rows
    assert rows[1:] == [[str(step), f"{training[step]:.3g}", f"{evaluation[step]:.3g}"] for step in (1, 2, 3)]


def test_allocation(page, finished_run):
    rows = page.table("allocation", "Experts by layer").rows
    assert [row[:4] for row in rows[1:]] == [[str(layer), str(2 * layer + 2), "2", "2"] for layer in range(4)]
    record = read(finished_run / "run.json")["allocation"]
    for column, name in ((4, "expert_parameters"), (5, "router_parameters")):
        assert sum(int(row[column].replace(",", "")) for row in rows[1:]) == record[name]


def test_gates(page, finished_run):
    usage = read(finished_run / "inspect.json")["usage"]
    maps = page.section("gates").all("table")
    kinds = {row["module"].rpartition(".")[2] for row in usage["all"]}
    assert len(maps) == len(usage) * len(kinds)
    rows = page.table("gates", "q_proj, answer").rows
    expected = [row for row in usage["answer"] if row["module"].endswith("q_proj")]
    assert rows[0] == ["expert / layer", "0", "1", "2", "3"]
    for expert in range(8):
        for layer, row in enumerate(expected):
            shown = rows[1 + expert][1 + layer]
            if expert >= len(row["mean_gates"]):
                assert shown == ""
            elif expert in row["dead_experts"]:
                assert shown == "×"
            else:
                assert shown == f"{100 * row['mean_gates'][expert]:.0f}"


def test_redundancy_equals_that_of_inspect(page, finished_run):
    found = read(finished_run / "inspect.json")["redundancy"]
    rows = page.section("redundancy").one("table").rows
    for layer in range(4):
        members = [row for row in found if row["layer_index"] == layer]
        for column, name in enumerate(("distance", "input_overlap", "output_overlap"), 1):
            # None: an expert that no token chose is still zero and spans nothing.
            known = [row[name] for row in members if row[name] is not None]
            shown = rows[1 + layer][column]
            assert shown == "–" if not known else float(shown) == pytest.approx(sum(known) / len(known), rel=0.01)


def test_routing_agreement_and_leave_one_out(page, finished_run):
    rows = page.section("routing").one("table").rows
    last = json.loads((finished_run / "routing.jsonl").read_text().splitlines()[-1])
    top = [module["balance"] for module in last["modules"] if module["layer_index"] == 3]
    assert rows[-1][0] == str(last["step"])
    assert float(rows[-1][rows[0].index("balance, layers 3")]) == pytest.approx(sum(top) / len(top), abs=6e-3)
    assert page.section("agreement").one("svg", role="img").attributes["aria-label"].startswith("Agreement of routers")
    assert "1.25" in page.section("leave-one-out").text
    rows = page.table("leave-one-out", "Change of the loss; 1 stands for 0.0001").rows
    assert [row[4] for row in rows[1:]] == ["−10", "0", "+10", "+20", "+30", "+40", "+50", "+60"]


def test_samples(page, finished_run):
    after = read(finished_run / "after.json")["samples"]
    shown = page.section("samples").all("details")
    assert len(shown) == len(after) == 8
    for sample, details in zip(after, shown, strict=True):
        assert details.one("pre").text == sample["prompt"].strip("\n")
        assert ("✓" if sample["correct"] else "✗") in details.one("ul").text
    example = read(finished_run / "inspect.json")["examples"][0]["experts"]
    rows = page.section("samples").all("table")[0].rows
    by_place = {(row["module"].rpartition(".")[2], row["layer_index"]): row["mean_gates"] for row in example}
    for row in rows[1:]:
        gates = [by_place[row[0], layer] for layer in range(4)]
        assert row[1:] == [str(each.index(max(each))) for each in gates]


def test_changed_and_wrong_samples_are_shown_first(run_dir):
    """Forty of them, in their order: those that changed or are wrong before those that stayed right."""
    for name, wrong in (("before", ()), ("after", (41, 42, 43, 44))):
        path = run_dir / f"{name}.json"
        result = json.loads(path.read_text(encoding="utf-8"))
        result["samples"] = [
            {**result["samples"][0], "id": str(number), "correct": number not in wrong} for number in range(45)
        ]
        path.write_text(json.dumps(result), encoding="utf-8")
    section = page_of(run_dir).section("samples")
    assert "40 of 45" in section.text
    assert len(section.all("details")) == 40
    assert section.text.count("newly wrong") >= 4


def test_same_input_same_page(finished_run, tmp_path):
    first, second = (report(ReportOptions(str(finished_run), output=str(tmp_path / name))) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    today = datetime.datetime.now(datetime.UTC).date()
    text = first.read_text(encoding="utf-8")
    assert not any(str(today + datetime.timedelta(days=days)) in text for days in (-1, 0, 1))  # in any time zone


@pytest.mark.parametrize(
    ("file", "section", "words"),
    [
        ("after.json", "accuracy", "Accuracy with the adapter has not been measured."),
        ("inspect.json", "gates", "Gates by prompt, answer, kind of token and group have not been measured."),
        ("inspect.json", "samples", "The experts used for the expected answers have not been measured."),
        ("routing.jsonl", "routing", "The run has no telemetry"),
        ("metrics.jsonl", "loss", "No loss was found: the run has no metrics.jsonl"),
        ("adapter_model.safetensors", "allocation", "There is no adapter in the run folder"),
    ],
)
def test_missing_part(run_dir, file, section, words):
    (run_dir / file).unlink()
    found = page_of(run_dir)
    assert words in found.section(section).text
    for box in found.section(section).all("div", class_="missing"):
        for command in box.all("pre"):
            check_command(command.text)


def asked(run_dir, *missing, results="accuracy"):
    """Without some results: the options of the commands that make them, by name of the command."""
    for name in missing:
        (run_dir / f"{name}.json").unlink()
    found = {}
    for section, options in ((results, EvaluateOptions), ("gates", InspectOptions)):
        for box in page_of(run_dir, overwrite=True).section(section).all("pre"):
            parsed = parse(options, shlex.split(box.text)[2:], prog="", positional="adapter")
            if isinstance(parsed.filters, str):
                parsed.filters = json.loads(parsed.filters)
            found.setdefault(shlex.split(box.text)[1], []).append(parsed)
    return found


def test_commands_measure_what_was_trained(run_dir):
    """In its prompts, on its rows, on the base model as it was loaded."""
    settings = {"template": "alpaca_short", "filters": {"category": ["Tense"]}, "trust_remote_code": True}
    settings |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    change(run_dir / "run.json", lambda record: record["settings"].update(settings))
    found = asked(run_dir, "after", "inspect")
    for options in (*found["evaluate"], *found["inspect"]):
        assert {name: getattr(options, name) for name in settings} == settings


def test_commands_after_training_on_a_file_without_a_task(run_dir):
    """Whose rows are no test data, and whose prompts no task names. The loss is measured."""
    change(run_dir / "run.json", lambda record: record.update(template="alpaca"))
    settings = {"data": "train.jsonl.gz", "task": None, "template": None}
    change(run_dir / "run.json", lambda record: record["settings"].update(settings))
    found = asked(run_dir, "before", "after", "inspect", results="free-text")
    assert [(each.data, each.task, each.template) for each in found["evaluate"]] == 2 * [("TEST_DATA", None, "alpaca")]
    assert [(each.data, each.template) for each in found["inspect"]] == [("TEST_DATA", "alpaca")]


def test_commands_after_training_on_a_folder_that_is_empty_now(run_dir, tmp_path):
    (tmp_path / "data").mkdir()
    change(run_dir / "run.json", lambda record: record["settings"].update(data=str(tmp_path / "data")))
    assert [each.data for each in asked(run_dir, "before", "after", "inspect")["evaluate"]] == 2 * [
        str(tmp_path / "data")
    ]


def test_the_command_for_a_missing_result_has_the_settings_of_the_other_result(run_dir):
    rows = {"template": "vicuna", "filters": {"category": ["Tense"]}, "split": "validation"}
    settings = rows | {"limit": 3, "scoring": "likelihood", "max_new_tokens": 7}
    change(run_dir / "before.json", lambda result: result["settings"].update(settings))
    found = asked(run_dir, "after", "inspect")
    assert [{name: getattr(each, name) for name in settings} for each in found["evaluate"]] == [settings]
    assert [{name: getattr(each, name) for name in rows} for each in found["inspect"]] == [rows]


def test_the_base_model_gets_the_settings_of_the_adapters_result(run_dir):
    """Also where that was on other rows and in other prompts than the training."""
    changes = {"template": "alpaca_short", "filters": {"category": ["Tense"]}}
    change(run_dir / "run.json", lambda record: record["settings"].update(changes))
    (options,) = asked(run_dir, "before")["evaluate"]
    assert (options.template, options.filters) == (None, None)


def test_numbers_of_layers_come_from_the_configuration(run_dir):
    """Some modules have more experts; the card and the plan show the layer's own number."""
    folder = run_dir.parent / "other"
    config = MolaConfig(num_experts=[2, 2, 1, 1], num_experts_pattern={r"layers\.0\..*q_proj": 6}, top_k=1, r=2)
    config.task_type = "CAUSAL_LM"
    base = json.loads((run_dir / "run.json").read_text())["settings"]["base_model"]
    save_adapter(base, folder, config)
    layers = read_adapter_weights(folder).layers
    assert [layer.num_experts for layer in layers] == [2, 2, 1, 1]
    assert [layer.experts_text for layer in layers] == ["2–6", "2", "1", "1"]


def test_mixtures_in_some_modules(run_dir):
    """Neither the layer's own number nor the sum of those is that of the mixtures."""
    config = MolaConfig(num_experts=1, num_experts_pattern={"mlp.*": 4}, top_k=2, r=2, task_type="CAUSAL_LM")
    save_adapter(json.loads((run_dir / "run.json").read_text())["settings"]["base_model"], run_dir, config)
    found = page_of(run_dir)
    assert "LoRA experts in 4 layers" in found.root.one("header").text
    assert "per kind of module" not in found.root.one("header").text
    cells = found.section("allocation").one("table").all("tr")[1].all("td")
    assert [cell.text for cell in cells[:2]] == ["1–4", "2"]


def check_command(text):
    """The command is one that mola takes."""
    program, name, *arguments = shlex.split(text)
    assert program == "mola"
    command = COMMANDS[name]
    parse(find(command.options), arguments, prog=name, positional=command.positional)


def test_a_run_with_only_its_record(run_dir):
    for path in run_dir.iterdir():
        if path.is_file() and path.name != "run.json":
            path.unlink()
    change(run_dir / "run.json", lambda record: [record.pop(name) for name in ("seconds", "metrics", "steps")])
    change(run_dir / "run.json", lambda record: record.update(status="failed", error="the loss is not finite"))
    found = page_of(run_dir)
    assert "the loss is not finite" in found.root.one("header").text
    commands = [box.text for box in found.root.all("pre") if box.text.startswith("mola")]
    assert len(commands) >= 4
    for command in commands:
        check_command(command)


def spoiled(document):
    """A JSON document with hostile text at the end of every text in it, and under some of its names."""
    if isinstance(document, dict):
        return {name: spoiled(value) for name, value in document.items()}
    if isinstance(document, list):
        return [spoiled(value) for value in document]
    return document + HOSTILE if isinstance(document, str) else document


def looks(page):
    """Elements and their attributes, without what is in them."""
    return {(node.tag, *sorted(node.attributes)) for node in page.root}


def test_hostile_text_stays_text(run_dir, page):
    folder = run_dir.rename(run_dir.with_name("<b>run&amp;"))

    def edit_result(result):
        result.update(spoiled(result))
        sample = result["samples"][0]
        sample["prompt"], sample["output"], sample["predicted"] = f"Question: {HOSTILE}", HOSTILE, HOSTILE + "\ud800"
        result["groups"] = {HOSTILE: {HOSTILE: result["groups"]["category"].popitem()[1]}}
        result["metrics"] = {HOSTILE: 0.5}

    def edit_inspection(found):
        found.update(spoiled(found))
        found["usage"][f"a={HOSTILE}"] = found["usage"]["all"]
        found["leave_one_out"].append({**found["leave_one_out"][0], "module": HOSTILE})

    def edit_record(record):
        record.update(spoiled(record), error=HOSTILE)
        for name in ("settings", "adapter_settings", "allocation", "versions", "machine", "data_fingerprints"):
            record[name][HOSTILE] = HOSTILE
        record["data"][HOSTILE] = record["data"]["train"]

    change(folder / "before.json", edit_result)
    change(folder / "after.json", edit_result)
    change(folder / "inspect.json", edit_inspection)
    change(folder / "run.json", edit_record)
    change(folder / "adapter_config.json", lambda config: config.update(target_modules=[HOSTILE]))
    found = page_of(folder)
    assert found.root.one("h1").text == "<b>run&amp;"
    for key in ("accuracy", "allocation", "gates", "agreement", "leave-one-out", "samples", "making"):
        assert HOSTILE.replace("\r", "") in found.section(key).text.replace("\r", ""), key
    assert HOSTILE.replace("\r", "") in found.root.one("header").text.replace("\r", "")
    assert looks(found) <= looks(page)
    # Whatever the text holds, the page is still known for mola's own.
    report(ReportOptions(str(folder)))
    inspected = Page(render_inspection(str(folder), read(folder / "inspect.json")))
    assert looks(inspected) <= looks(page)
    # What is shown where there is less: telemetry alone, another method, commands.
    (folder / "inspect.json").unlink()
    (folder / "after.json").unlink()
    lines = [json.dumps(spoiled(json.loads(line))) for line in (folder / "routing.jsonl").read_text().splitlines()]
    (folder / "routing.jsonl").write_text("\n".join(lines) + "\n")
    change(folder / "run.json", lambda record: record.update(command=["mola", HOSTILE]))
    change(folder / "adapter_config.json", lambda config: config.update(peft_type=HOSTILE))
    found = page_of(folder)
    assert {node.tag for node in found.root} <= {node.tag for node in page.root}
    for key in ("allocation", "gates", "making"):
        assert HOSTILE.replace("\r", "") in found.section(key).text.replace("\r", ""), key


def test_what_routing_is_worth(run_dir, tiny_model_dir):
    """Only where an export says so; the numbers are those of its export.json."""
    data = run_dir.parent / "data"
    prepare(PrepareOptions("sample", str(data), train_size=20, validation_size=2, test_size=8))
    output = run_dir.parent / "lora"
    words = ["convert", run_dir, "--to", "lora", "--r", 2, "--base_model", tiny_model_dir, "--device", "cpu"]
    words += ["--data", data / "train.json", "--task", "sample", "--test", data / "test.json", "--output", output]
    assert main([str(word) for word in words]) == 0
    found = page_of(run_dir, export=str(output / "export.json"))
    assert [each.attributes["id"] for each in found.root.all("section")] == SECTIONS_WITH_EXPORT
    text, export = found.section("worth").text, read(output / "export.json")
    for name in ("base", "mixture", "lora"):
        assert percent(export["accuracy"][name]["accuracy"]) in text
        assert f"{export['loss']['answer'][name]:.3f}" in text
    assert f"less the mixture's is {100 * export['differences']['lora']['value']:+.1f} points" in text
    assert f"{export['divergence']['answer']:.4f}" in text
    assert all(kind in text and percent(value) in text for kind, value in export["explained_by_kind"].items())
    # In the run folder it is found by its name; the mean, without data, has nothing measured.
    export.update(accuracy={}, differences={}, divergence={}, loss={}, explained_by_kind={HOSTILE: 0.5})
    (run_dir / "export.json").write_text(json.dumps(export))
    found = page_of(run_dir)
    assert HOSTILE.replace("\r", "") in found.section("worth").text.replace("\r", "")
    with pytest.raises(MolaError, match=r"`export` must be a result file of `mola convert --to lora`"):
        page_of(run_dir, export=str(run_dir / "after.json"))


def test_an_inspected_adapter_with_one_router(run_dir):
    inspection = read(run_dir / "inspect.json")
    inspection["usage"] = {name: rows[:1] for name, rows in inspection["usage"].items()}
    inspection["agreement"] = {"modules": inspection["agreement"]["modules"][:1], "cramers_v": [[1.0]]}
    found = Page(render_inspection(str(run_dir), inspection))
    assert "agreement" not in [node.attributes["id"] for node in found.root.all("section")]


def test_an_adapter_of_another_method(run_dir):
    change(run_dir / "adapter_config.json", lambda config: config.update(peft_type="LORA", target_modules=[[]]))
    found = page_of(run_dir)
    assert "The adapter is of type LORA" in found.section("allocation").text
    assert "No module has several experts." in found.section("redundancy").text


def test_a_run_without_routers_has_no_router_sections(run_dir, tiny_model_dir, tmp_path, capsys):
    """No command could say more of them."""
    lora = save_adapter(tiny_model_dir, tmp_path / "lora", MolaConfig(num_experts=1, r=2, task_type="CAUSAL_LM"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(lora / name, run_dir)
    for name in ("routing.jsonl", "inspect.json"):
        (run_dir / name).unlink()
    found = page_of(run_dir)
    names = [node.attributes["id"] for node in found.root.all("section")]
    assert not {"gates", "routing", "agreement"} & {*names}
    assert "No module has several experts." in found.section("redundancy").text
    assert "mola inspect" not in found.root.text
    assert main(["doctor", str(run_dir)]) == 0
    assert "routers over training" not in (printed := capsys.readouterr().out)
    assert "whether a LoRA answers as well" not in printed


def test_experts_of_another_prompt_are_not_shown(run_dir):
    """Files without ids have the same ones, of their rows' numbers."""

    def edit(inspection):
        for example in inspection["examples"]:
            example["prompt"] += " Another one."

    change(run_dir / "inspect.json", edit)
    assert not page_of(run_dir).section("samples").all("table")


def test_unknown_values(run_dir):
    def edit(result):
        result["samples"][0].update(output=None, predicted=None, answer=None)
        result["settings"]["scoring"] = result["unanswered"] = result["metrics"] = None

    change(run_dir / "after.json", edit)
    change(run_dir / "before.json", edit)
    change(run_dir / "inspect.json", lambda found: found.update(leave_one_out_baseline=None))
    found = page_of(run_dir)
    assert "With all experts the loss is –." in found.section("leave-one-out").text
    assert "no answer" in found.section("samples").all("details")[0].text
    assert "None" not in found.section("samples").text + found.section("accuracy").text


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda result: result.update(data_fingerprint="0"), "data"),
        (lambda result: result["settings"].update(max_new_tokens=7), "longest answer"),
    ],
)
def test_results_with_different_settings_are_warned_about(run_dir, edit, what):
    change(run_dir / "before.json", edit)
    assert f"different {what}: do not compare them" in page_of(run_dir).section("accuracy").text


@pytest.mark.parametrize(("owner", "is_same"), [("models--owner--tiny", True), ("models--owner--other", False)])
def test_a_base_model_in_the_hub_cache_has_its_hub_name(run_dir, owner, is_same):
    for name, base in (("before", "owner/tiny"), ("after", f"/cache/{owner}/snapshots/0123abc")):
        change(run_dir / f"{name}.json", lambda result, base=base: result["settings"].update(base_model=base))
    assert ("do not compare them" not in page_of(run_dir).section("accuracy").text) == is_same


def test_results_in_the_wrong_place_are_warned_about(run_dir):
    change(run_dir / "after.json", lambda result: result["settings"].update(adapter=None))
    assert "after was measured without an adapter" in page_of(run_dir).section("accuracy").text


def test_a_task_of_free_text_has_commands_for_the_loss(run_dir):
    change(run_dir / "run.json", lambda record: record["settings"].update(task="openorca"))
    page = page_of(run_dir)
    assert page.section("accuracy") is not None, "there are results of another task"
    for name in ("before.json", "after.json", "inspect.json"):
        (run_dir / name).unlink()
    found = page_of(run_dir, overwrite=True)
    assert {"accuracy", "samples"}.isdisjoint(names_of(found))
    (box,) = found.section("free-text").all("div", class_="missing")
    assert "The loss without and with the adapter has not been measured. Run these, then" in box.text
    commands = [box.text for box in found.section("free-text").all("pre")]
    assert len(commands) == 2
    for command in commands:
        check_command(command)


def names_of(page):
    return {section.attributes["id"] for section in page.root.all("section")}


def loss_result(losses, **settings):
    """A result of `mola evaluate` on free text, of rows with 2, 3, 4, ... tokens."""
    samples = [
        {"id": f"row-{index}", "loss": loss, "tokens": index + 2, "bytes": 3 * index + 4}
        for index, loss in enumerate(losses)
    ]
    fingerprint = {"data_fingerprint": "1a2b"}
    return {
        **summarize_losses(samples),
        "samples": samples,
        "settings": {"template": "alpaca", **settings},
        **fingerprint,
    }


def test_loss_of_free_text(run_dir):
    before, after = [6.0, 9.5, 12.0, 14.0, 20.0], [4.0, 7.0, 8.0, 11.5, 13.0]
    for name, losses in (("before", before), ("after", after)):
        result = loss_result(losses, adapter=str(run_dir) if name == "after" else None, base_model="base")
        (run_dir / f"{name}.json").write_text(json.dumps(result))
    page = page_of(run_dir)
    assert {"accuracy", "samples"}.isdisjoint(names_of(page))
    section = page.section("free-text")
    rows = section.one("table").rows
    assert [row[:3] for row in rows[1:]] == [["before", "3.08", "21.6"], ["after", "2.17", "8.8"]]
    assert "After − before, on the same rows: -0.900, 95 % interval -1.1" in section.text
    assert "3.08 → 2.17" in page.root.one("header").text
    assert not section.all("p", class_="warning")
    change(run_dir / "before.json", lambda result: result["settings"].update(template="chat"))
    section = page_of(run_dir, overwrite=True).section("free-text")
    assert [node.text for node in section.all("p", class_="warning")] == [
        "Before and after had different templates: do not compare them."
    ]
    assert "on the same rows" not in section.text


def test_results_of_another_adapter_are_warned_about(run_dir, tmp_path, caplog):
    for name in ("after", "inspect"):
        change(run_dir / f"{name}.json", lambda found: found["settings"].update(adapter="runs/b"))
    page = page_of(run_dir, output=str(tmp_path / "b.html"))
    warnings = [node.text for node in page.root.one("header").all("p", class_="warning")]
    assert warnings == [
        f"The {each} was measured with a different adapter: runs/b" for each in ("result after", "inspection")
    ]
    assert caplog.text.count("was measured with a different adapter: 'runs/b'") == 2
    for adapter in (run_dir, f"elsewhere/{run_dir.name}", "."):  # a folder that was moved since; one that was left
        for name in ("after", "inspect"):
            change(
                run_dir / f"{name}.json", lambda found, adapter=adapter: found["settings"].update(adapter=str(adapter))
            )
        page = page_of(run_dir, output=str(tmp_path / "a.html"), overwrite=True)
        assert not page.root.one("header").all("p", class_="warning")


def test_outdated_results_are_warned_about(run_dir, caplog):
    (run_dir / "adapter_model.safetensors").touch()
    page_of(run_dir)
    assert [record.args[0].name for record in caplog.records if "older than the adapter" in record.msg] == [
        "after.json",
        "inspect.json",
    ]


def test_an_incomplete_last_line(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert len(page_of(run_dir).section("loss").one("table").rows) == 4
    (run_dir / "metrics.jsonl").write_text('{"step"\n{}\n')
    with pytest.raises(MolaError, match="line 1 is not a JSON object"):
        page_of(run_dir)


def test_at_most_24_groups_have_maps(run_dir):
    def edit(found):
        found["usage"].update({f"topic={index}": found["usage"]["all"] for index in range(40)})

    change(run_dir / "inspect.json", edit)
    found = page_of(run_dir)
    views = [node for node in found.section("gates") if node.attributes.get("class", "").startswith("view ")]
    assert len(views) == len(found.section("gates").all("input", name="view")) == 24
    total = len(read(run_dir / "inspect.json")["usage"])
    assert f"{total - 24} smaller groups are left out here" in found.section("gates").text


def test_only_own_reports_are_replaced(run_dir, capsys):
    assert main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"Open {run_dir / 'report.html'} in a browser\n"
    page = run_dir / "report.html"
    first = page.read_bytes()
    assert main(["report", str(run_dir)]) == 0
    assert page.read_bytes() == first
    page.write_bytes(first + b"<p>A remark of mine.</p>")
    assert main(["report", str(run_dir)]) == 2
    assert "`output` must be a new file, or an unchanged report of mola" in capsys.readouterr().err
    assert page.read_bytes() != first
    assert main(["report", str(run_dir), "--overwrite"]) == 0
    assert page.read_bytes() == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run_dir": "nowhere"}, "and its weights): got 'nowhere', there is no such folder"),
        ({"run_dir": "."}, "must be a folder with the run.json of `mola train`, or with an adapter"),
        ({"before": "nowhere.json"}, "`before` must be a file"),
        ({"after": "run.json"}, "`after` must be a result file of `mola evaluate`"),
        ({"inspection": "after.json"}, "`inspection` must be a result file of `mola inspect`"),
        ({"output": "run.json"}, "`output` must be a new file, or an unchanged report"),
        ({"output": "."}, "must be a file to write"),
    ],
)
def test_wrong_options(run_dir, tmp_path, monkeypatch, options, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(run_dir if "run_dir" not in options else tmp_path / "empty")
    before = sorted(run_dir.iterdir())
    with pytest.raises(MolaError, match=re.escape(message)):
        report(ReportOptions(**{"run_dir": str(run_dir), **options}))
    assert sorted(run_dir.iterdir()) == before
    assert not (tmp_path / "empty" / "nowhere").exists()


def test_telemetry_alone(run_dir):
    (run_dir / "inspect.json").unlink()
    found = page_of(run_dir)
    gates = found.section("gates")
    assert [node.attributes["name"] for node in gates.all("input")] == ["kind"] * 7
    last = json.loads((run_dir / "routing.jsonl").read_text().splitlines()[-1])["modules"][0]
    kind = last["module"].rpartition(".")[2]
    assert found.table("gates", f"{kind}, all tokens").rows[1][1] == f"{100 * last['mean_gates'][0]:.0f}"


def test_a_layer_without_experts_ends_a_range(run_dir):

    def change_layers(tensors):
        kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
        tensors.clear()
        # The others all as the lowest layer.
        tensors.update({name: tensor[:2].contiguous() for name, tensor in kept.items()})

    change_tensors(run_dir, change_layers)
    change(run_dir / "adapter_config.json", lambda config: config.update(num_experts=2))
    rows = page_of(run_dir).table("allocation", "Experts by layer").rows
    assert [row[0] for row in rows[1:]] == ["0", "2–3"]


def test_damaged_weights_are_not_reported_on(run_dir):
    flip_bit(run_dir / "adapter_model.safetensors", 8 * 10_000)
    with pytest.raises(MolaError, match="damaged"):
        page_of(run_dir)


def test_a_damaged_configuration_is_refused(run_dir):
    (run_dir / "adapter_config.json").write_text('{"peft_type": "MO')
    with pytest.raises(MolaError, match="adapter_config.json cannot be read"):
        page_of(run_dir)


def test_regular_expression_of_modules(run_dir):
    change(run_dir / "adapter_config.json", lambda config: config.update(target_modules=".*[qv]_proj"))
    assert "Adapted modules: .*[qv]_proj." in page_of(run_dir).section("allocation").text


def test_a_new_run_in_the_folder_removes_the_report_of_the_old_one(run_dir):
    page = report(ReportOptions(str(run_dir)))
    changed = run_dir / "mine.html"
    changed.write_text("mine")
    clear_run(run_dir)
    assert not page.exists()
    assert changed.exists()
    page.write_text("mine")
    clear_run(run_dir)
    assert page.exists()


def test_the_page_names_the_step_of_the_best_weights(run_dir):
    change(run_dir / "run.json", lambda record: record.update(best_checkpoint="run/checkpoint-1", steps=9))
    shown = {name: value for name, value, _ in run_figures(load_run(str(run_dir))) if value}
    assert (shown["steps"], shown["weights"]) == ("9", "of step 1")
    assert "mean training loss" in shown, "the curve's last loss is another number"
    assert step_of_weights({"best_checkpoint": "checkpoint-" + "9" * 5000}) is None  # more digits than Python reads


@pytest.mark.parametrize(("share", "said"), [(0.213, "21.3"), (0.0004567, "0.046"), (0.00001, "0.0010")])
def test_small_percentages(share, said):
    assert small_percent(share) == f"{said}\u00a0%"


def test_modules_with_other_tokens_are_in_the_view_of_all_tokens_only():
    """Such as a base model's own experts: they are in the view of all tokens only."""
    names = [f"model.layers.{layer}.mlp.{part}" for layer in (0, 1) for part in ("up_proj", "experts.0.up_proj")]
    rows = [
        {
            "module": name,
            "layer_index": int(name.split(".")[2]),
            "mean_gates": [0.5, 0.5],
            "balance": 1.0,
            "dead_experts": [],
        }
        for name in names
    ]
    for row in rows:
        row["num_tokens"] = 4
    maps = gate_maps({"all": rows, "answer": [row for row in rows if "experts" not in row["module"]]})
    assert [len(view) for view in maps.views] == [2, 1]
