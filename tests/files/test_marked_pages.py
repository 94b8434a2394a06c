"""Pages of which a command writes one part."""

import pytest

from mola.errors import MolaError
from mola.files.marked_pages import BEGIN, END, has_markers, write_part


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_the_rest_of_the_page_stays_byte_by_byte(tmp_path, ending):
    page = tmp_path / "page.md"
    before, after = f"# A page{ending}{ending}with words{ending}", f"{ending}more{ending}"
    page.write_bytes(f"{before}{BEGIN.strip()}{ending}old{ending}{END}{after}".encode())
    assert has_markers(page)
    write_part(page, "new\nlines\n")
    written = ending.join([BEGIN.strip(), "", "new", "lines", "", END])
    assert page.read_bytes() == f"{before}{written}{after}".encode()


@pytest.mark.parametrize("text", ["no markers", f"{BEGIN}{BEGIN}{END}", f"{END}\n{BEGIN}"])
def test_pages_without_the_part_once_are_refused_and_stay(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(MolaError, match="`page` must hold the lines"):
        write_part(page, "new")
    assert page.read_text() == text
