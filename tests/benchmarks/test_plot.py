"""The picture of the suite `growth`, drawn from records written here."""

import json
from xml.etree import ElementTree

import pytest
from benchmarks.plot import draw, main

SVG = "{http://www.w3.org/2000/svg}"
LABELS = {"LoRA r 8", "loop over experts", "mola", "frozen layers"}
SHARED = {"model": "/models/of-mine", "num_layers": 2, "dropout": 0.05, "r": 8, "top_k": 1, "optimizer": False}


def growth_rows():
    """Medians that say where they belong: provider + experts / 100 + tokens / 100,000."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        for over, points in (("experts", ((1, 512), (8, 512), (64, 512))), ("tokens", ((8, 128), (8, 2048)))):
            for experts, tokens in points:
                for place, name in enumerate(("frozen", "lora_8", "loop", "mola")):
                    median = 1 + place + experts / 100 + tokens / 1e5
                    own = {"over": over, "dtype": dtype, "provider": name, "num_experts": experts, "tokens": tokens}
                    ratio = {"median": median, "p20": median - 0.1, "p80": median + 0.2}
                    rows.append(SHARED | own | {"ratio_to_frozen": ratio})
    return rows


RECORD = {
    "date": "2031-07-14T12:00:00+00:00",
    "machine": {"cpu": "Abacus 9000", "gpu": None},
    "threads": 3,
    "device": "cpu",
    "versions": {"mola": "0.9.1", "torch": "7.8.9"},
    "options": {"top_k": 2, "repeats": 5},
    "results": {"step": [], "growth": growth_rows()},
}


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RECORD))
    return str(path)


def test_the_file_is_svg_that_names_everything_in_it(results, tmp_path, capsys):
    output = tmp_path / "new" / "growth.svg"
    assert main([results, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"Written to {output}.\n"
    assert output.stat().st_size < 100_000
    words = [element.text for element in ElementTree.parse(output).iter(f"{SVG}text")]
    assert set(words) >= LABELS
    assert {"float32, 512 tokens per step", "bfloat16, 8 experts per module", "2,048", "64"} <= set(words)
    caption = " ".join(words)
    assert "Abacus 9000, threads: 3; mola 0.9.1, torch 7.8.9." in caption
    assert "2 random layers with the shapes of of-mine, r 8, top_k 2, dropout 0.05." in caption
    content = output.read_text()
    assert "/models" not in content
    assert "2031" not in content
    assert main([results, "--output", str(output)]) == 2
    assert "`output` must be a new file" in capsys.readouterr().err
    assert main([results, "--output", str(output), "--overwrite"]) == 0
    assert output.read_text() == content


def test_lines_and_bands_are_where_the_results_are():
    figure = draw(RECORD)
    for axes, x, step in zip(figure.axes, [[1, 8, 64]] * 2 + [[128, 2048]] * 2, [1e-2] * 2 + [1e-5] * 2, strict=True):
        frozen, *lines = axes.get_lines()
        assert set(frozen.get_ydata()) == {1}
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [f"{each:,}" for each in x]
        assert {line.get_label() for line in axes.get_lines()} == LABELS
        rest = 512 / 1e5 if x[0] == 1 else 8 / 100
        for place, (line, band) in enumerate(zip(lines, axes.collections, strict=True), start=1):
            median = [1 + place + each * step + rest for each in x]
            assert list(line.get_xdata()) == x
            assert list(line.get_ydata()) == pytest.approx(median)
            edges = band.get_paths()[0].get_extents()
            assert (edges.y0, edges.y1) == pytest.approx((median[0] - 0.1, median[-1] + 0.2))


def test_results_of_another_suite_are_refused(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": {"step": []}}))
    assert main([str(path)]) == 2
    assert "`results` must hold the suite growth" in capsys.readouterr().err
