"""Hook of MkDocs: links from a page to files of the repository outside `docs/`.

In the repository such a link is relative, as in `[recipes](../../recipes)`. The site has only the pages of `docs/`, so
there the link leads to the repository at `repo_url`. A build without `repo_url` leaves the text of the link alone.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>(?:\.\./)+[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks.repository_links")  # a warning stops a strict build


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Rewrite the links of one page."""
    docs = Path(config.docs_dir).resolve()
    source = Path(page.file.abs_src_path)

    def rewrite(link: re.Match[str]) -> str:
        target = (source.parent / link["path"]).resolve()
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            _log.warning("%s: no such file: %s", page.file.src_uri, link["path"])
        if not config.repo_url:
            return link["text"]
        kind = "tree" if target.is_dir() else "blob"
        path = target.relative_to(docs.parent).as_posix()
        return f"[{link['text']}]({config.repo_url.rstrip('/')}/{kind}/main/{path}{link['anchor'] or ''})"

    return _LINK.sub(rewrite, markdown)
