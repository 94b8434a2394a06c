"""The forms of what mola wrote."""

import math

import pytest

from mola import MolaError
from mola.files.schema import ANYTHING, FLAG, INTEGER, NUMBER, TEXT, check_form


@pytest.mark.parametrize(
    ("content", "form"),
    [
        ({"a": 1, "more": None}, {"a": INTEGER, "b?": TEXT}),
        ({"x": [1, 2.5]}, {str: [NUMBER]}),
        ([0.1, 1], [NUMBER, NUMBER]),
        ({"a": None}, {"a": (TEXT, None)}),
        ({"a": True}, {"a": FLAG}),
        (object(), ANYTHING),
    ],
)
def test_forms_that_fit(content, form):
    check_form(content, form, "file", "Cure.")


@pytest.mark.parametrize(
    ("content", "form", "problem"),
    [
        ({"a": True}, {"a": INTEGER}, "`a` must be an integer: got True"),
        ({"a": [1, math.nan]}, {"a": [NUMBER]}, r"`a\[1\]` must be a finite number: got nan"),
        ({"a": 10**400}, {"a": NUMBER}, "finite number"),
        ({"a": 10**400}, {"a": INTEGER}, "an integer"),
        ({}, {"a": TEXT}, "`a` is missing"),
        ({"a": {"b": 1}}, {"a": {str: TEXT}}, "`a.b` must be text: got 1"),
        ({"b": 1}, {"b?": TEXT}, "`b` must be text"),
        ([1], [NUMBER, NUMBER], "a list of 2"),
        ([1], {"a": TEXT}, "`content` must be a mapping"),
        ({"a": "x" * 500}, {"a": [TEXT]}, r"`a` must be a list: got 'x{79}\.\.\., in 'file'. Cure."),
    ],
)
def test_forms_that_do_not_fit(content, form, problem):
    with pytest.raises(MolaError, match=problem):
        check_form(content, form, "file", "Cure.")
