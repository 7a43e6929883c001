"""Follow every link of the built site that stays within it; links that leave it are counted, not followed.

``python docs/check_links.py docs/_build/html`` fails with a list if a file or an anchor is missing, or if a page needs
the network to be displayed.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"src", "poster", "data"}  # what a browser fetches by itself


class Page(HTMLParser):
    """The anchors of a page, and its links, each with whether it is part of what is displayed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors = {""}
        self.links: list[tuple[str, bool]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note what one element defines and refers to."""
        found = dict(attributes)
        sheet = found.get("rel") == "stylesheet"
        for name, value in found.items():
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value or "")
            elif name == "href" or name in LOADED:
                self.links.append((value or "", name in LOADED or sheet))


def check(root: Path) -> tuple[list[str], set[str]]:
    """Return what is broken below a folder, one line for each fault, and the addresses outside it."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.html"))}
    faults: list[str] = []
    outside: set[str] = set()
    for path, page in pages.items():
        for link, loaded in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if loaded and parts.scheme != "data":
                    faults.append(f"{path.relative_to(root.resolve())}: needs the network for {link}")
                elif parts.scheme in {"http", "https"}:
                    outside.add(link)
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                faults.append(f"{path.relative_to(root.resolve())}: no file {link}")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                faults.append(f"{path.relative_to(root.resolve())}: no anchor {link}")
    return faults, outside


def main(root: Path) -> int:
    """Report, and return the exit status."""
    faults, outside = check(root)
    print(*faults, f"{len(faults)} broken links; {len(outside)} leave the site and were not followed", sep="\n")
    return 1 if faults or not (root / "index.html").is_file() else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
