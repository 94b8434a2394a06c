"""The picture of the suite `growth`, drawn from records written here."""

import json
import re
import sys
from xml.etree import ElementTree

import pytest
from benchmarks.plot import draw, main
from benchmarks.plot_data import read_growth

SVG = "{http://www.w3.org/2000/svg}"
LABELS = {"LoRA r 8", "loop over experts", "mola", "frozen layers"}
SHARED = {
    "model": "/models/of-mine",
    "num_layers": 2,
    "dropout": 0.05,
    "r": 8,
    "top_k": 1,
    "optimizer": False,
    "rank": 8,
}


def row(over, dtype, provider, num_experts, tokens, median):
    ratio = {"median": median, "p20": median - 0.1, "p80": median + 0.2, "samples": [median]}
    own = {"over": over, "dtype": dtype, "provider": provider, "num_experts": num_experts, "tokens": tokens}
    return SHARED | own | {"ratio_to_frozen": ratio}


def growth_rows(dtypes=("float32", "bfloat16"), providers=("frozen", "lora_8", "loop", "mola")):
    """Medians that say where they belong: provider + experts / 100 + tokens / 100,000."""
    rows = []
    for dtype in dtypes:
        for over, points in (("experts", ((1, 512), (8, 512), (64, 512))), ("tokens", ((8, 128), (8, 2048)))):
            for experts, tokens in points:
                for place, name in enumerate(providers):
                    rows.append(row(over, dtype, name, experts, tokens, 1 + place + experts / 100 + tokens / 1e5))
    return rows


def record(rows, **changes):
    return {
        "commit": "0123456789ab",
        "date": "2031-07-14T12:00:00+00:00",
        "machine": {"cpu": "Abacus 9000", "gpu": None, "threads": 1, "cores": 4},
        "threads": 3,
        "device": "cpu",
        "versions": {"mola": "0.9.1", "torch": "7.8.9"},
        "options": {"top_k": 2, "repeats": 5},
        "results": {"step": [], "growth": rows},
    } | changes


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return str(path)

    return write


@pytest.fixture
def results(write):
    return write("results.json", record(growth_rows()))


def texts(path):
    return [element.text for element in ElementTree.parse(path).iter(f"{SVG}text")]


def refused(capsys, *arguments):
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("benchmarks.plot: error: ")
    return error


# ------------------------------------------------------------------ the picture


def test_the_file_is_small_svg_that_names_everything_in_it(results, tmp_path, capsys):
    output = tmp_path / "new" / "growth.svg"
    assert main([results, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"Written to {output}.\n"
    assert output.stat().st_size < 100_000
    root = ElementTree.parse(output).getroot()
    assert root.tag == f"{SVG}svg"
    title = root.find(f"{SVG}title").text
    assert "LoRA r 8, loop over experts, mola" in title
    assert "over tokens per step in bfloat16, 8 experts per module" in title
    words = texts(output)
    assert set(words) >= LABELS
    assert {"float32, 512 tokens per step", "bfloat16, 8 experts per module", "2,048", "64"} <= set(words)


def test_the_caption_says_what_it_was_made_with_and_no_folder(results, tmp_path):
    output = tmp_path / "growth.svg"
    assert main([results, "--output", str(output)]) == 0
    said = " ".join(texts(output))
    assert "Abacus 9000, 3 threads; mola 0.9.1, torch 7.8.9." in said
    assert "2 random layers with the shapes of of-mine, r 8, top_k 2, dropout 0.05." in said
    assert "CPU seconds" in said
    assert "over 5 rounds" in said
    content = output.read_text()
    assert "/models" not in content
    assert "2031" not in content


def test_lines_and_bands_are_where_the_results_are(results):
    figure = draw(read_growth([results]))
    assert [axes.get_title() for axes in figure.axes] == [
        "float32, 512 tokens per step",
        "bfloat16, 512 tokens per step",
        "float32, 8 experts per module",
        "bfloat16, 8 experts per module",
    ]
    for axes, x, step in zip(figure.axes, [[1, 8, 64]] * 2 + [[128, 2048]] * 2, [1e-2] * 2 + [1e-5] * 2, strict=True):
        frozen, *lines = axes.get_lines()
        assert set(frozen.get_ydata()) == {1}
        assert (axes.get_xscale(), [tick.get_text() for tick in axes.get_xticklabels()]) == (
            "log",
            [f"{each:,}" for each in x],
        )
        assert {line.get_label() for line in axes.get_lines()} == LABELS
        rest = 512 / 1e5 if x[0] == 1 else 8 / 100
        for place, (line, band) in enumerate(zip(lines, axes.collections, strict=True), start=1):
            median = [1 + place + each * step + rest for each in x]
            assert list(line.get_xdata()) == x
            assert list(line.get_ydata()) == pytest.approx(median)
            edges = band.get_paths()[0].get_extents()
            assert (edges.y0, edges.y1) == pytest.approx((median[0] - 0.1, median[-1] + 0.2))


def test_providers_differ_in_colour_and_marker_the_same_in_all_panels(write):
    names = ("frozen", "lora_8", "loop", "mola", "mixed", "other")
    figure = draw(read_growth([write("results.json", record(growth_rows(providers=names)))]))
    looks = [
        {line.get_label(): (line.get_color(), line.get_marker()) for line in axes.get_lines()} for axes in figure.axes
    ]
    assert looks == looks[:1] * 4
    assert looks[0].keys() == LABELS | {"mixed", "other"}
    for part in zip(*looks[0].values(), strict=True):
        assert len(set(part)) == len(part)


def test_the_background_hides_a_dark_page(results, tmp_path):
    output = tmp_path / "growth.svg"
    assert main([results, "--output", str(output)]) == 0
    root = ElementTree.parse(output).getroot()
    whole = next(root.iter(f"{SVG}path"))
    width, height = root.get("viewBox").split()[2:]
    assert "fill: #ffffff" in whole.get("style")
    assert f"L {width} {height}" in " ".join(whole.get("d").split())


def test_the_same_results_give_the_same_bytes(results, tmp_path, write):
    import matplotlib

    outputs = [tmp_path / f"{name}.svg" for name in "abc"]
    assert main([results, "--output", str(outputs[0])]) == 0
    with matplotlib.rc_context({"axes.labelpad": 20.0, "font.family": ["serif"]}):  # a user's own settings
        assert main([results, "--output", str(outputs[1])]) == 0
        assert matplotlib.rcParams["axes.labelpad"] == 20
    rows = growth_rows()
    rows[-1]["ratio_to_frozen"]["median"] += 0.5
    assert main([write("other.json", record(rows)), "--output", str(outputs[2])]) == 0
    first, second, other = (output.read_bytes() for output in outputs)
    assert first == second
    assert first != other


def test_several_files_make_one_picture(write):
    parts = [growth_rows(["float32"]), growth_rows(["bfloat16"])]
    parts[1] = [each for each in parts[1] if each["over"] == "experts"]
    growth = read_growth([write(f"{i}.json", record(part)) for i, part in enumerate(parts)])
    assert [(panel.over, panel.dtype) for panel in growth.panels] == [
        ("experts", "float32"),
        ("tokens", "float32"),
        ("experts", "bfloat16"),
    ]
    assert [axes.get_visible() for axes in draw(growth).axes] == [True, True, True, False]


def test_one_of_several_models(write, tmp_path, capsys):
    rows = growth_rows() + [each | {"model": "smollm2", "r": 4} for each in growth_rows(["float32"])]
    results = write("results.json", record(rows))
    error = refused(capsys, results, "--output", str(tmp_path / "growth.svg"))
    assert "`model` must say whose curves to draw: the results hold /models/of-mine, smollm2" in error
    error = refused(capsys, results, "--model", "gpt", "--output", str(tmp_path / "growth.svg"))
    assert "`model` must be one of the results, /models/of-mine, smollm2: got 'gpt'" in error
    growth = read_growth([results], "smollm2")
    assert [panel.dtype for panel in growth.panels] == ["float32"] * 2
    assert "shapes of smollm2, r 4" in growth.setting


def test_a_gpu_is_named_with_its_own_seconds(write):
    machine = {"cpu": "Abacus 9000", "gpu": "Loom X1", "threads": 1}
    growth = read_growth([write("gpu.json", record(growth_rows(), machine=machine, device="cuda:0", threads=1))])
    assert growth.conditions == "Loom X1, Abacus 9000, 1 thread; mola 0.9.1, torch 7.8.9."
    assert "GPU seconds" in growth.setting


# ------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json {", "'.*results.json' is no JSON"),
        ("[1, 2]", "holds no results"),
        (json.dumps(record([])), "`results` must hold the suite growth: '.*' has no rows. Measure with"),
        (json.dumps(record([], results={"step": [{}]})), "must hold the suite growth: '.*' has step. Measure with"),
        (json.dumps(record([SHARED | {"provider": "mola"}])), "has none for 'mola'. Measure again with frozen among"),
        (json.dumps(record(growth_rows(providers=["frozen"]))), "must hold another provider than frozen"),
        (json.dumps(record(growth_rows() + growth_rows()[1:2])), "lora_8 in float32 with 1 experts comes twice"),
        (json.dumps(record([3])), r"something is missing or of another kind \(TypeError"),
        (json.dumps(record(growth_rows(), machine={})), r"something is missing .* \(KeyError: 'cpu'\)"),
        (
            json.dumps(record([*growth_rows(), row("experts", "float32", "mola", 16, 64, 1.5)])),
            "that grow over experts in float32 must agree in the rest: '.*' has 64 where others have 512",
        ),
    ],
)
def test_wrong_results_end_in_one_line(content, message, tmp_path, capsys):
    results, output = tmp_path / "results.json", tmp_path / "new" / "growth.svg"
    results.write_text(content)
    error = refused(capsys, str(results), "--output", str(output))
    assert re.search(message, error), error
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("name", "changes", "row_changes"),
    [
        ("cpu", {"machine": {"cpu": "Slide rule", "gpu": None}}, {}),
        ("threads", {"threads": 1}, {}),
        ("versions", {"versions": {"mola": "0.9.2", "torch": "7.8.9"}}, {}),
        ("top_k", {"options": {"top_k": 1, "repeats": 5}}, {}),
        ("dropout", {}, {"dropout": 0.0}),
        ("num_layers", {}, {"num_layers": 3}),
    ],
)
def test_files_of_different_conditions_are_refused(name, changes, row_changes, write, tmp_path, capsys):
    first = write("first.json", record(growth_rows(["float32"])))
    second = write("second.json", record([each | row_changes for each in growth_rows(["bfloat16"])], **changes))
    error = refused(capsys, first, second, "--output", str(tmp_path / "growth.svg"))
    assert f"must be measured under the same conditions: `{name}` is " in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`results` must name at least one JSON file"),
        (["missing.json"], "`results` cannot be read: 'missing.json' (No such file or directory). Check the path."),
        (["a.json", "a.json"], "`results` names a file twice"),
        (
            ["a.json", "--output", "growth.png"],
            "`output` must end in .svg, no other format is written: got 'growth.png'",
        ),
        (["a.json", "--sweet", "1"], "there is no flag --sweet"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_picture_is_kept_unless_told_otherwise(results, tmp_path, capsys):
    output = tmp_path / "growth.svg"
    output.write_text("mine")
    error = refused(capsys, results, "--output", str(output))
    assert "exists. Choose another name or pass --overwrite" in error
    assert output.read_text() == "mine"
    assert main([results, "--output", str(output), "--overwrite"]) == 0
    assert ElementTree.parse(output).getroot().tag == f"{SVG}svg"


def test_without_matplotlib_it_says_how_to_get_it(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = refused(capsys, results, "--output", str(tmp_path / "growth.svg"))
    assert '`matplotlib` draws the picture and is missing: run pip install "mola-peft[plot]"' in error
    assert not (tmp_path / "growth.svg").exists()
