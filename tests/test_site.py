"""The site in headless Chromium, in a window as narrow as a phone."""

import pytest

from tests.browser import browser
from tests.test_repository import build_site

pytestmark = pytest.mark.slow

# What reaches over the right edge, except in a part that scrolls.
TOO_WIDE = """
const scrolls = element => element.closest('pre, .md-typeset__scrollwrap');
return [...document.querySelectorAll('article *')]
  .filter(each => each.checkVisibility() && !scrolls(each) && each.getBoundingClientRect().right > innerWidth + 0.5)
  .map(each => each.outerHTML.slice(0, 80));
"""


def test_no_page_for_users_is_wider_than_a_phone(tmp_path):
    with browser() as window:
        site = build_site(tmp_path / "site")
        screen = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        pages = [site / "index.html", *site.glob("get-started/*/index.html"), *site.glob("guides/*/index.html")]
        assert len(pages) > 30
        for page in pages:
            window.get(page.as_uri())
            assert window.execute_script("return innerWidth") == 390, page
            assert window.execute_script(TOO_WIDE) == [], page
            assert window.title, page
