"""The frame of a page: head with its one style sheet and no script, header, contents, sections, footer."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from mola._version import __version__
from mola.reporting.charts import SHADES
from mola.reporting.markup import Element, element, to_html

Section = tuple[str, str, list[Element]]  # id, title, content


def document(title: str, header: Element, sections: Sequence[Section], rules: str = "") -> str:
    """A whole page that asks nobody for anything; the same arguments always give the same text.

    Args:
        title: of the window.
        header: above everything.
        sections: those without content are left out.
        rules: added to the style sheet.
    """
    shown = [section for section in sections if section[2]]
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        header,
        element("div", _contents([(key, title) for key, title, _ in shown]), _main(shown), class_="frame"),
        element(
            "footer", element("p", f"Written by mola {__version__}. This page asks no other machine for anything.")
        ),
    )
    return to_html(element("html", _head(title, rules), body, lang="en"))


def _head(title: str, rules: str) -> Element:
    style = _style(rules)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="generator", content=f"mola {__version__}"),
        element("title", title),
        element("style", style),
    )


def _style(rules: str) -> str:
    shades = "".join(f".s{step}{{--shade:{100 * step / SHADES:g}%}}" for step in range(SHADES + 1))
    sheet = files("mola.reporting").joinpath("page.css").read_text(encoding="utf-8")
    return f"{sheet}\n{shades}\n{rules}\n"


def _contents(titles: Sequence[tuple[str, str]]) -> Element:
    links = [element("li", element("a", title, href=f"#{key}")) for key, title in titles]
    return element("nav", element("ul", links), aria_label="Contents")


def _main(sections: Sequence[Section]) -> Element:
    made = [
        element("section", element("h2", title, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")
        for key, title, content in sections
    ]
    return element("main", made, id="content", tabindex=-1)
