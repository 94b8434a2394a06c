"""The tables of the study of skills, from records made by hand."""

import json

import pytest
from benchmarks.skills_tables import TableOptions, main, read, tables

from mola import MolaError

KINDS = [f"kind{number}" for number in range(12)]


def a_record(seed, folder):
    """Ten questions of each kind: the folder gets one answer wrong that each own LoRA gets right, arrow half of all."""
    right = dict.fromkeys(KINDS, "1" * 10)
    stages = [["1" * 10] * (number + 1) for number in range(12)]
    stages[-1][0] = "1" * 9 + "0"
    asked = [{kind: {kind: 10} for kind in KINDS[: number + 1]} for number in range(12)]
    asked[-1]["kind0"] = {"kind0": 9, "base": 1}
    changed = [[] for _ in KINDS]
    before, now = ({"asked": each, "predicted": "A"} for each in ("kind0", "base"))
    changed[-1] = [{"task": "kind0", "place": 9, "id": "test-9", "before": before, "now": now}]
    own = {"machine": {"cpu": "CPU", "gpu": None, "threads": 1}, "seconds": 60.0}
    methods = {
        "skills": {"marks": {**right, "kind0": "1" * 9 + "0"}, "stages": stages, "asked": asked, "changed": changed},
        "own": {"marks": right},
        "arrow": {"marks": dict.fromkeys(KINDS, "10" * 5)},
    }
    methods["skills"] |= {"op": 119 / 120, "pd": -0.1 / 11}
    record = {"seed": seed, "order": KINDS, "methods": {name: {**own, **each} for name, each in methods.items()}}
    (folder / f"seed_{seed}.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.fixture
def records(tmp_path):
    folder = tmp_path / "12_kinds"
    folder.mkdir()
    for seed in (10, 9):
        a_record(seed, folder)
    return tmp_path


def test_methods_are_compared_with_own_loras_and_with_the_folder(records):
    lines = tables(read(TableOptions(kinds=12, records=str(records)))).splitlines()
    rows = [[cell.strip("| ") for cell in line.split(" | ")] for line in lines]
    cells = {row[0]: row for row in reversed(rows)}  # the first table has the same names as the second
    assert cells["skills folder"][:5] == ["skills folder", "2", "99.2", "-0.9", "-0.8"]
    assert cells["own LoRA, named by the caller"][1:5] == ["2", "100.0", "", ""]
    assert cells["PEFT Arrow, top 3"][1:5] == ["2", "50.0", "", "-50.0"]
    assert cells["PEFT Arrow, top 3"][6] == "+49.2"
    low, high = (float(end) for end in cells["PEFT Arrow, top 3"][7].split(" to "))
    assert 35 < low < 49.2 < high
    assert [line.split(" | ")[0] for line in lines[-2:]] == ["| 9", "| 10"]
    assert lines[-1].endswith("| 99.2 | -0.9 | 99.2 | 0.8 | stage 12: kind0 test-9 A (kind0) to A (base) |")


def test_a_folder_without_records_is_an_error_of_one_line(tmp_path, capsys):
    with pytest.raises(MolaError, match="seed_N"):
        read(TableOptions(records=str(tmp_path)))
    assert main(["--records", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_picture_has_the_accuracy_on_all_kinds_so_far(records, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import skills_plot

    options = TableOptions(kinds=12, records=str(records))
    (axes,) = skills_plot.draw(read(options)).axes
    thick = [line for line in axes.lines if line.get_label() == "skills folder, 2 seeds"]
    assert list(thick[0].get_ydata()) == [100] * 11 + [pytest.approx(100 * 119 / 120)]
    output = tmp_path / "skills.svg"
    assert skills_plot.main(["--kinds", "12", "--records", str(records), "--output", str(output)]) == 0
    assert "kinds of questions learnt so far" in output.read_text()
