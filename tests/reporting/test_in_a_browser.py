"""The page in headless Chromium: two widths, two colour schemes."""

import os
from pathlib import Path

import pytest

from mola.reporting.report import ReportOptions, report
from tests.browser import browser, complaints, requested_addresses
from tests.reporting.conftest import change

pytestmark = pytest.mark.slow

# WCAG 2: relative luminance of what is painted, text against the nearest background below it.
CONTRASTS = """
const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;
const brush = canvas.getContext('2d', {willReadFrequently: true});
const painted = colour => {
  brush.clearRect(0, 0, 1, 1); brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1);
  return [...brush.getImageData(0, 0, 1, 1).data];
};
const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = element => {
  for (let at = element; at; at = at.parentElement) {
    const colour = painted(getComputedStyle(at).backgroundColor);
    if (colour[3] === 255) return colour;
    if (colour[3] !== 0) throw new Error('half transparent: ' + at.outerHTML.slice(0, 80));
  }
};
document.querySelectorAll('details').forEach(each => { each.open = true; });
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || element.closest('title, .skip') || !element.checkVisibility()) continue;
  const style = getComputedStyle(element);
  const text = painted(element.closest('svg') ? style.fill : style.color);
  const [low, high] = [luminance(text), luminance(ground(element))].sort((a, b) => a - b);
  const words = walker.currentNode.data.trim().slice(0, 40);
  found.push([(high + 0.05) / (low + 0.05), words, element.getAttribute('class')]);
}
return found;
"""
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
CHARTS = """
return [...document.querySelectorAll('svg[role=img]')].map(each => each.getBoundingClientRect())
  .map(box => [box.width, box.height])
"""
OUTSIDE = """
return [...document.querySelectorAll('main *, header *')].filter(each => each.checkVisibility()
  && !each.closest('.scroll') && !each.closest('svg') && each.getBoundingClientRect().right > innerWidth + 0.5)
  .map(each => each.outerHTML.slice(0, 80))
"""
VISIBLE = (
    "return [...document.querySelectorAll('.map')].filter(each => each.checkVisibility()).map(each => each.innerText)"
)


@pytest.fixture(scope="module")
def page(finished_run, tmp_path_factory):
    return report(ReportOptions(str(finished_run), output=str(tmp_path_factory.mktemp("page") / "report.html")))


@pytest.fixture(scope="module")
def window():
    with browser() as opened:
        yield opened


def show(window, page, width=1280, height=900, scheme="light"):
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    window.get(page.as_uri())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_is_legible(window, page, tmp_path, width, scheme):
    show(window, page, width, scheme=scheme)
    assert window.execute_script(OVERFLOW) <= 0
    sizes = window.execute_script(CHARTS)
    assert len(sizes) > 10
    assert all(wide > 80 and high > 10 for wide, high in sizes)
    contrasts = window.execute_script(CONTRASTS)
    assert len(contrasts) > 500
    assert [each for each in contrasts if each[0] < 4.5] == []
    assert window.execute_script(OVERFLOW) <= 0  # with everything unfolded
    assert window.execute_script(OUTSIDE) == []
    pictures = Path(os.environ.get("MOLA_SCREENSHOTS", tmp_path))
    window.save_screenshot(str(pictures / f"report-{width}-{scheme}.png"))
    assert complaints(window) == []
    assert {each for each in requested_addresses(window) if not each.startswith("data:")} == {page.as_uri()}


def test_numbers_on_all_shades_are_legible(window, run_dir):
    def edit(found):
        for row in found["usage"]["all"]:
            row["mean_gates"], row["dead_experts"] = [index / 20 for index in range(21)], []
        changes = [{"layer_index": 0, "module": None, "expert": e, "loss_change": (e - 20) / 20} for e in range(41)]
        found["leave_one_out"] = changes

    change(run_dir / "inspect.json", edit)
    page = report(ReportOptions(str(run_dir)))
    for scheme in ("light", "dark"):
        show(window, page, scheme=scheme)
        contrasts = window.execute_script(CONTRASTS)
        assert {f"s{step}" for step in range(21)} <= {name for _, _, name in contrasts}
        assert [each for each in contrasts if each[0] < 4.5] == []


def test_choosing_with_the_keyboard(window, page):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    show(window, page)
    (first,) = window.execute_script(VISIBLE)
    assert "q_proj, all tokens" in first
    button = window.find_element("id", "kind-0")
    button.send_keys(keys.ARROW_RIGHT)
    (second,) = window.execute_script(VISIBLE)
    assert "k_proj, all tokens" in second
    window.switch_to.active_element.send_keys(keys.TAB)
    window.switch_to.active_element.send_keys(keys.ARROW_RIGHT, keys.ARROW_RIGHT)
    (third,) = window.execute_script(VISIBLE)
    assert "k_proj, answer" in third
    focused = "return getComputedStyle(document.activeElement.nextElementSibling).outlineStyle"
    assert window.execute_script(focused) == "solid"


def test_skip_link(window, page):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    show(window, page)
    window.find_element("tag name", "body").send_keys(keys.TAB)
    link = window.switch_to.active_element
    assert link.text == "Skip to the content"
    link.send_keys(keys.ENTER)
    assert window.switch_to.active_element.get_attribute("id") == "content"


def test_hostile_text_does_nothing(window, run_dir):
    def edit(result):
        for sample in result["samples"]:
            sample["prompt"] = "</script><script>document.title = 'gone'</script><img src=x onerror=alert(1)>"

    change(run_dir / "after.json", edit)
    page = report(ReportOptions(str(run_dir)))
    requested_addresses(window)
    show(window, page)
    assert window.title == "a run: a run of mola"
    assert window.find_elements("css selector", "script, img") == []
    assert {each for each in requested_addresses(window) if not each.startswith("data:")} == {page.as_uri()}
    assert complaints(window) == []
