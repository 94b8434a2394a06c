"""Pages from their templates: one file with one style sheet and no script, which asks nobody for anything."""

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mola._version import __version__
from mola.reporting import charts, formatting

_FILTERS: Sequence[Callable[..., str]] = (
    *(charts.shade, charts.share, charts.tick),
    *(formatting.duration, formatting.interval, formatting.layers, formatting.number, formatting.percent),
)
_FUNCTIONS: Sequence[Callable[..., Any]] = (charts.every_so_often, charts.step_axis, charts.value_axis)


class Section(NamedTuple):
    """A section of a page."""

    key: str  # its id
    title: str  # its heading
    data: Mapping[str, Any] | None  # what its template gets as `data`; None leaves the section out
    template: str = ""  # name of its template, the key if it is empty


class Table(NamedTuple):
    """A table of texts and numbers; the first cell of a row is its name."""

    head: Sequence[str]
    rows: Iterable[Sequence[Any]]
    caption: str = ""


def render(template: str, title: str, sections: Sequence[Section], choices: Sequence[Any] = (), **values: Any) -> str:
    """A whole page; the same arguments always give the same text.

    `title` is that of the window, `choices` are buttons that the style sheet makes work, see
    `mola.reporting.heat.Choice`, and `values` what the template's header needs.
    """
    shown = [section for section in sections if section.data is not None]
    style = environment().get_template("page.css").render(choices=choices)
    text = (
        environment()
        .get_template(template)
        .render(
            title=title,
            sections=shown,
            style=Markup(style),  # the only text that is not escaped: our own, and it has to be what was summed up
            style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
            version=__version__,
            **values,
        )
    )
    # Half of a surrogate pair is no text: a browser shows the reference as a replacement character.
    return text.encode("utf-8", "xmlcharrefreplace").decode() + "\n"


@cache
def environment() -> Environment:
    """The templates, and what they may use."""
    made = Environment(
        loader=PackageLoader("mola.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {function.__name__: function for function in _FILTERS}
    made.globals |= {"SHADES": charts.SHADES} | {function.__name__: function for function in _FUNCTIONS}
    made.tests["numeric"] = formatting.is_numeric
    return made
