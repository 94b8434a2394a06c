"""Pages in Markdown of which a command writes one part: what stands between two comments."""

from pathlib import Path

from mola.errors import MolaError
from mola.files.atomic import atomic_write_text

BEGIN, END = "<!-- tables -->\n", "<!-- /tables -->"


def has_markers(path: Path) -> bool:
    """Whether a file is there and has such a part."""
    try:
        return path.is_file() and BEGIN in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def check_page(path: str | Path, option: str = "page") -> str:
    """The content of a page that has the part once; `option` names it in messages.

    Raises:
        MolaError: it cannot be read, or has not.
    """
    try:
        page = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MolaError(f"`{option}` cannot be read: {str(path)!r} ({error}). Name a page with two markers.") from error
    if [page.count(marker) for marker in (BEGIN, END)] != [1, 1] or page.index(BEGIN) > page.index(END):
        raise MolaError(
            f"`{option}` must hold the lines {BEGIN.strip()} and {END} once, in this order: {str(path)!r} does not. "
            "Add them."
        )
    return page


def write_part(path: str | Path, text: str) -> None:
    """Put a text in the place of the part; the rest of the page stays.

    Raises:
        MolaError: as `check_page`, or the file cannot be written.
    """
    before, _, rest = check_page(path).partition(BEGIN)
    after = rest[rest.index(END) :]
    ending = "\r\n" if b"\r\n" in Path(path).read_bytes() else "\n"
    atomic_write_text(path, f"{before}{BEGIN}\n{text.strip()}\n\n{after}".replace("\n", ending))
