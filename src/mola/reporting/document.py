"""Pages from Jinja2 templates. A page is one file with a style sheet and no script, and loads no other file."""

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
    charts.shade,
    charts.share,
    charts.tick,
    formatting.format_interval,
    formatting.number,
    formatting.percent,
)
_FUNCTIONS: Sequence[Callable[..., Any]] = (charts.axis_names, charts.step_axis, charts.value_axis)


class Section(NamedTuple):
    """One section of a page."""

    key: str  # its id, and the name of its template
    title: str  # its heading
    data: Mapping[str, Any] | None  # the variable `data` of its template; None leaves the section out


class Table(NamedTuple):
    """A table of texts and numbers; the first cell of a row is its name."""

    head: Sequence[str]
    rows: Iterable[Sequence[Any]]
    caption: str = ""


def render(template: str, title: str, sections: Sequence[Section], choices: Sequence[Any] = (), **values: Any) -> str:
    """A whole page; the same arguments always give the same text.

    Args:
        template: file name of the page's template.
        title: title of the browser window.
        sections: the sections, in order.
        choices: `mola.reporting.heatmaps.Choice`s; the style sheet makes their radio buttons work.
        **values: further variables of the template.
    """
    shown = [section for section in sections if section.data is not None]
    style = environment().get_template("page.css").render(choices=choices)
    text = (
        environment()
        .get_template(template)
        .render(
            title=title,
            sections=shown,
            style=Markup(style),  # not escaped, since the digest is computed from this text
            style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
            version=__version__,
            **values,
        )
    )
    # The output of a model may hold half a surrogate pair, which UTF-8 cannot encode. A browser shows the reference as
    # a replacement character.
    return text.encode("utf-8", "xmlcharrefreplace").decode() + "\n"


@cache
def environment() -> Environment:
    """The templates, with the functions that they may use."""
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
