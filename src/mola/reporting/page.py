"""The page: sections under headings, one style sheet, no script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from mola._version import __version__
from mola.reporting.charts import SHADES
from mola.reporting.experts import allocation_section, gates_section, redundancy_section, routing_section
from mola.reporting.gathering import Run
from mola.reporting.heat import Choice, choice_rules
from mola.reporting.making import lead, making_section, summary
from mola.reporting.markup import Element, element, to_html
from mola.reporting.relations import agreement_section, leave_one_out_section
from mola.reporting.results import accuracy_section, loss_section
from mola.reporting.samples import samples_section


def render_page(run: Run) -> str:
    """The whole page; the same run always gives the same text.

    Args:
        run: what is known about it.
    """
    gates, choices = gates_section(run)
    sections = [
        ("accuracy", "Accuracy", accuracy_section(run)),
        ("loss", "Loss", loss_section(run)),
        ("allocation", "Experts by layer", allocation_section(run)),
        ("gates", "Which experts work", gates),
        ("routing", "Routers over training", routing_section(run)),
        ("redundancy", "How alike experts are", redundancy_section(run)),
        ("agreement", "How routers agree", agreement_section(run)),
        ("leave-one-out", "What an expert is worth", leave_one_out_section(run)),
        ("samples", "Samples", samples_section(run)),
        ("making", "How it was made", making_section(run)),
    ]
    shown = [section for section in sections if section[2]]
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        _header(run),
        element("div", _contents([(key, title) for key, title, _ in shown]), _main(shown), class_="frame"),
        element(
            "footer", element("p", f"Written by mola {__version__}. This page asks no other machine for anything.")
        ),
    )
    return to_html(element("html", _head(run, choices), body, lang="en"))


def _head(run: Run, choices: Sequence[Choice]) -> Element:
    style = _style(choices)
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
        element("title", f"{run.name}: a run of mola"),
        element("style", style),
    )


def _style(choices: Sequence[Choice]) -> str:
    shades = "".join(f".s{step}{{--shade:{100 * step / SHADES:g}%}}" for step in range(SHADES + 1))
    sheet = files("mola.reporting").joinpath("page.css").read_text(encoding="utf-8")
    return f"{sheet}\n{shades}\n{choice_rules(choices) if choices else ''}\n"


def _header(run: Run) -> Element:
    return element(
        "header", element("p", "Run of mola", class_="kicker"), element("h1", run.name), lead(run), summary(run)
    )


def _contents(titles: Sequence[tuple[str, str]]) -> Element:
    links = [element("li", element("a", title, href=f"#{key}")) for key, title in titles]
    return element("nav", element("ul", links), aria_label="Contents")


def _main(sections: Sequence[tuple[str, str, list[Element]]]) -> Element:
    made = [
        element("section", element("h2", title, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")
        for key, title, content in sections
    ]
    return element("main", made, id="content", tabindex=-1)
