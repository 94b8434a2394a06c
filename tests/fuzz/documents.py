"""Hostile documents: valid ones that are changed in a few places, and bytes that are damaged after that.

`JSON_TEXTS` and `YAML_TEXTS` name values that JSON or YAML can write and Python cannot build in a test, such as very
deep nesting: the names are words in the document, which `written` replaces in the text.
"""

import copy
import json

from hypothesis import strategies as st


def _ten_times_eight(first, nest):
    """YAML of eight levels, each with ten references to the one before."""
    levels = zip("abcdefgh", "bcdefghi", strict=True)
    return (
        f"[&a {first}, " + ", ".join(f"&{new} {nest.format(','.join([f'*{old}'] * 10))}" for old, new in levels) + "]"
    )


JSON_TEXTS = {
    "@deep list@": "[" * 50_000 + "]" * 50_000,
    "@deep mapping@": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "@digits@": "9" * 5_000,
    "@NaN@": "NaN",
    "@infinity@": "-Infinity",
    "@1e999@": "1e999",
    "@surrogate@": '"\\ud800"',
    "@surrogate key@": '{"\\udfff": 1}',
    "@twice@": '{"a": 1, "a": 2}',
    "@nothing@": "",
    "@unclosed@": '{"a": [',
}
YAML_TEXTS = JSON_TEXTS | {
    "@deep list@": "[" * 3_000 + "]" * 3_000,
    "@deep mapping@": "{a: " * 3_000 + "}" * 3_000,
    "@bomb@": _ten_times_eight("[1,1,1]", "[{}]"),
    "@merge bomb@": _ten_times_eight("{x: 1}", "{{<<: [{}]}}"),
    "@loop@": "&z [*z]",
    "@mapping loop@": "&z {a: *z}",
    "@no such anchor@": "*nothing",
    "@date@": "2024-13-45",
    "@true date@": "2024-01-05",
    "@binary@": "!!binary aGFsbG8=",
    "@bad binary@": "!!binary a",
    "@empty int@": '!!int ""',
    "@word int@": "!!int many",
    "@empty float@": '!!float ""',
    "@word bool@": "!!bool perhaps",
    "@bad timestamp@": "!!timestamp soon",
    "@no digits@": "0b_",
    "@sexagesimal@": "1:" * 500 + "1",
    "@set@": "!!set {a, b}",
    "@pairs@": "!!pairs [a: 1, a: 2]",
    "@code@": '!!python/object/apply:os.system ["touch mola-was-here"]',
    "@own tag@": "!mine {a: 1}",
    "@list key@": "{[1, 2]: 3}",
    "@no character@": '"\\UFFFFFFFF"',
    "@half character@": '"\\ud800"',
    "@number keys@": "{1: 2, true: 3, null: 4, .nan: 5}",
}
_NUMBERS = [0, -1, 1, 2, 2**31, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, 5e-324]
_TEXTS = ["", " ", "\t", "\0", "a\0b", "\ufeff", "\r\n", "é", "𝔘", "\u2028", "null", "true", "1", "{}"]
_TEXTS += [
    "{0}",
    "{a.__class__}",
    "{",
    "%s",
    "../..",
    "/",
    "/dev/zero",
    "~nobody/x",
    "a" * 300,
    "b" * 100_000,
    "x.json",
    "(",
]
_TEXTS += ["(a+)+$", "[", "a{9999999999}", "𝟙", "²", "1_0", "١"]
SCALARS = st.one_of(st.sampled_from([None, True, False]), st.sampled_from(_NUMBERS), st.sampled_from(_TEXTS))
SCALARS |= st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
TEXTS = st.sampled_from(_TEXTS) | st.text(max_size=30)
_SMALL = st.one_of(st.just([]), st.just({}), st.lists(SCALARS, max_size=3), st.dictionaries(TEXTS, SCALARS, max_size=3))


def values(words):
    """Any value of a document; `words` are the texts that stand for nasty ones."""
    nasty = st.sampled_from(sorted(words))
    return st.one_of(SCALARS, nasty, nasty, _SMALL)


def _places(document, path=()):
    yield path
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from _places(value, (*path, key))


@st.composite
def changed(draw, document, words=JSON_TEXTS):
    """`document` with up to three changes: another value, a missing, renamed or added key, a longer or deeper list."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(_places(document))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(values(words))
            continue
        *above, key = path
        owner = document
        for step in above:
            owner = owner[step]
        kind = draw(st.sampled_from(["value", "value", "value", "remove", "rename", "add", "repeat", "wrap"]))
        if kind == "value":
            owner[key] = draw(values(words))
        elif kind == "remove":
            del owner[key]
        elif kind == "wrap":
            owner[key] = draw(st.sampled_from([[owner[key]], {"a": owner[key]}, str(owner[key])]))
        elif isinstance(owner, dict):
            name = draw(TEXTS | st.sampled_from([f"{name} " for name in owner]))
            owner[name] = owner.pop(key) if kind == "rename" else draw(values(words))
        elif kind == "repeat":
            owner += [copy.deepcopy(owner[key])] * draw(st.sampled_from([1, 2, 100]))
        else:
            owner.insert(key, draw(values(words)))
    return document


def written(document, words):
    """The document as JSON, or YAML in JSON's form, with what the words stand for."""
    text = json.dumps(document)
    for word, replacement in words.items():
        text = text.replace(json.dumps(word), replacement)
    return text


@st.composite
def damaged(draw, text):
    """The bytes of a text file: mostly as they should be, else of another encoding, cut off, or with bytes changed."""
    kind = draw(
        st.sampled_from(["as it is"] * 8 + ["utf-8-sig", "utf-16", "latin-1", "cr", "cut", "bytes", "nul", "twice"])
    )
    if kind in ("utf-8-sig", "utf-16", "latin-1"):
        return text.encode(kind, "replace")
    content = text.encode("utf-8", "surrogatepass")
    if kind == "cr":
        return content.replace(b"\n", b"\r")
    if kind == "twice":
        return content + content
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "cut":
        return content[:place]
    if kind in ("bytes", "nul"):
        return content[:place] + (b"\0" if kind == "nul" else draw(st.binary(max_size=8))) + content[place + 1 :]
    return content


def files(document, words=JSON_TEXTS):
    """Bytes of a file that should hold `document`: changed, damaged, or anything at all."""
    texts = changed(document, words).map(lambda found: written(found, words))
    return texts.flatmap(damaged).filter(_is_small) | st.binary(max_size=200)


def _is_small(content):
    return len(content) < 300_000  # a bound on time says nothing about large files


def line_files(documents):
    """Bytes of a file with one JSON object per line."""
    lines = st.tuples(
        *(st.just(json.dumps(each)) | changed(each).map(lambda d: written(d, JSON_TEXTS)) for each in documents)
    )
    return lines.map(lambda found: "\n".join(found) + "\n").flatmap(damaged) | st.binary(max_size=200)


@st.composite
def broken(draw, content):
    """The bytes of a binary file with a part cut off, overwritten or doubled."""
    start = draw(st.integers(0, len(content)))
    kind = draw(st.sampled_from(["cut", "overwrite", "overwrite", "insert", "flip"]))
    if kind == "cut":
        return content[:start]
    if kind == "flip":
        places = draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=5))
        found = bytearray(content)
        for place in places:
            found[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(found)
    new = draw(st.binary(min_size=1, max_size=16))
    return content[:start] + new + content[start + (len(new) if kind == "overwrite" else 0) :]
