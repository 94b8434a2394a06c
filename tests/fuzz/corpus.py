"""Nasty files and folders, made in a folder of a test: nothing binary lies in the repository."""

import gzip
import json
import os
import pickle
import struct
import zipfile

import torch
from safetensors.torch import save

from tests.fuzz.documents import JSON_TEXTS, YAML_TEXTS


class Harmful:
    """Pickled, it asks for a folder to be made on loading: what a hostile file could do as well as anything else."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def _empty(path):
    path.write_bytes(b"")


def _directory(path):
    path.mkdir()


def _symlink_loop(path):
    path.symlink_to(path)


def _dangling_symlink(path):
    path.symlink_to(path.with_name("nothing"))


def _pipe(path):
    os.mkfifo(path)


def _endless_device(path):
    path.symlink_to("/dev/zero")


def _unreadable(path):
    path.write_bytes(b"{}")
    path.chmod(0)


def _utf_16(path):
    path.write_text('{"a": [1]}\n', encoding="utf-16")


def _latin_1(path):
    path.write_bytes('{"\xe9": 1}\n'.encode("latin-1"))


def _byte_order_mark(path):
    path.write_text('{"a": 1}\n', encoding="utf-8-sig")


def _cr_lines(path):
    path.write_bytes(b'{"a": 1}\r{"a": 2}\ra,b\r1,2\r')


def _zeros(path):
    path.write_bytes(bytes(10_000))


def _gzip_of_garbage(path):
    path.write_bytes(gzip.compress(os.urandom(100)) + b"garbage")


def _cut_gzip(path):
    path.write_bytes(gzip.compress(b"[1, 2, 3]" * 100)[:-9])


def _zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"a": 1}))


def _code(path):
    path.write_bytes(pickle.dumps({"a": Harmful(path.parent / "harm")}))


def _code_by_torch(path):
    torch.save({"a": Harmful(path.parent / "harm")}, path)


def _deep_pickle(path):
    path.write_bytes(b"\x80\x02" + b"](" * 10_000 + b"e" * 10_000 + b".")


NASTY = {
    "empty": _empty,
    "directory": _directory,
    "symlink loop": _symlink_loop,
    "dangling symlink": _dangling_symlink,
    "pipe": _pipe,
    "endless device": _endless_device,
    "unreadable": _unreadable,
    "utf-16": _utf_16,
    "latin-1": _latin_1,
    "byte order mark": _byte_order_mark,
    "cr lines": _cr_lines,
    "zeros": _zeros,
    "gzip of garbage": _gzip_of_garbage,
    "cut gzip": _cut_gzip,
    "zip": _zip,
    "pickle with code": _code,
    "torch file with code": _code_by_torch,
    "deep pickle": _deep_pickle,
}
TEXTS = {f"yaml {name}": text for name, text in YAML_TEXTS.items()} | {f"json {k}": v for k, v in JSON_TEXTS.items()}


def put(name, path):
    """Make the nasty thing of this name at `path`."""
    if name in NASTY:
        NASTY[name](path)
    else:
        text = TEXTS[name]
        path.write_text(text + "\n", encoding="utf-8", newline="")


def safetensors_files():
    """Name and bytes of files that are nearly safetensors."""
    good = save({"a": torch.ones(2, 3), "b": torch.ones(4)})
    size = struct.unpack("<Q", good[:8])[0]
    header, body = json.loads(good[8 : 8 + size]), good[8 + size :]

    def with_header(text, length=None):
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + body

    yield "good", good
    yield "cut in the tensors", good[:-5]
    yield "cut in the header", good[:20]
    yield "cut in the length", good[:5]
    yield "longer than it says", good + b"abc"
    yield "header length beyond the file", with_header(header, 10**6)
    yield "header length of 2 to the 63", with_header(header, 2**63)
    yield "header length 0", with_header(header, 0)
    yield "header is no JSON", with_header(b"{nothing" + b" " * 20)
    yield "header is a list", with_header([1, 2])
    yield "header nested deeply", with_header(b"[" * 100_000)
    a, b = header["a"], header["b"]
    yield "overlapping offsets", with_header(header | {"b": b | {"data_offsets": [0, 16]}})
    yield "offsets beyond the end", with_header(header | {"b": b | {"data_offsets": [24, 10**9]}})
    yield "offsets backwards", with_header(header | {"b": b | {"data_offsets": [40, 24]}})
    yield "unknown dtype", with_header(header | {"a": a | {"dtype": "F31"}})
    yield "another dtype", with_header(header | {"a": a | {"dtype": "I64"}})
    yield "huge shape", with_header(header | {"a": a | {"shape": [2**40, 2**40]}})
    yield "negative shape", with_header(header | {"a": a | {"shape": [-2, -3]}})
    yield "metadata is no text", with_header({**header, "__metadata__": {"a": 1}})
