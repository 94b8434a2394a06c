"""HTML as elements. Text goes in as text and is escaped on the way out, whatever it holds."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from typing import Any

Element = ElementTree.Element


def element(tag: str, *children: Any, **attributes: Any) -> Element:
    """An element.

    Args:
        tag: its name.
        children: elements, texts, numbers, lists of these; None is left out.
        attributes: `class_` is `class`, `aria_label` is `aria-label`; True is an attribute without a value, None and
            False are left out.
    """
    given = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    # By identity: 0 is a value.
    shown = {name: value for name, value in given.items() if value is not None and value is not False}
    made = Element(tag, {name: "" if value is True else str(value) for name, value in shown.items()})
    for child in children:
        add(made, child)
    return made


def add(parent: Element, child: Any) -> None:
    """Append to an element what `element` takes as a child."""
    if child is None:
        return
    if isinstance(child, Element):
        parent.append(child)
    elif isinstance(child, list | tuple):
        for each in child:
            add(parent, each)
    elif len(parent):
        parent[-1].tail = (parent[-1].tail or "") + str(child)
    else:
        parent.text = (parent.text or "") + str(child)


def to_html(root: Element) -> str:
    """A whole document.

    Args:
        root: the `html` element.
    """
    text = ElementTree.tostring(root, encoding="unicode", method="html")
    # Half of a surrogate pair is no text: a browser shows the reference as a replacement character.
    return "<!DOCTYPE html>\n" + text.encode("utf-8", "xmlcharrefreplace").decode() + "\n"


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str | None = None, class_: str = "") -> Element:
    """A table in a box of its own that scrolls; numbers stand on the right, the first cell of a row is its name.

    Args:
        head: names of the columns.
        rows: cells; a `td` element is taken as it is.
        caption: its title, also the name of the box for screen readers.
        class_: further classes of the table.
    """
    body = [element("tr", _name_cell(row[0]), [_cell(value) for value in row[1:]]) for row in rows]
    inner = element(
        "table",
        caption and element("caption", caption),
        element("thead", element("tr", [element("th", name, scope="col") for name in head])),
        element("tbody", body),
        class_=class_ or None,
    )
    return scrolling(inner, caption or str(head[0]))


def scrolling(inner: Element, name: str) -> Element:
    """A box that scrolls sideways, with the keyboard too."""
    return element("div", inner, class_="scroll", tabindex=0, role="region", aria_label=name)


def pairs(rows: Iterable[tuple[str, Any]], class_: str = "pairs") -> Element:
    """Names and values; those without a value are left out."""
    items = [element("div", element("dt", name), element("dd", value)) for name, value in rows if value is not None]
    return element("dl", items, class_=class_)


def folded(summary: Any, *children: Any, **attributes: Any) -> Element:
    """Something to unfold."""
    return element("details", element("summary", summary), *children, **attributes)


def figure(chart: Any, caption: Any, *more: Any, class_: str | None = None) -> Element:
    """A chart with its title above, and what belongs to it below."""
    return element("figure", element("figcaption", caption), chart, *more, class_=class_)


def note(*children: Any) -> Element:
    """A remark in small print."""
    return element("p", *children, class_="note")


def code(text: str) -> Element:
    """A command or a name."""
    return element("code", text)


def command_box(text: str, name: str = "command") -> Element:
    """A command in lines of its own, to copy."""
    return element("pre", code(text), tabindex=0, role="group", aria_label=name)


def _name_cell(value: Any) -> Element:
    return value if isinstance(value, Element) and value.tag == "th" else element("th", value, scope="row")


def _cell(value: Any) -> Element:
    if isinstance(value, Element) and value.tag == "td":
        return value
    return element("td", value, class_="n" if is_numeric(value) else None)


def is_numeric(value: Any) -> bool:
    """Whether a cell's text starts like a number."""
    text = str(value).lstrip("+-−")
    return not isinstance(value, Element) and text[:1].isdigit()
