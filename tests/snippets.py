"""Code on pages of the documentation that is the code of tests.

    python tests/snippets.py --write    # brings the pages up to date

A test marks it with ``# docs: begin NAME`` and ``# docs: end``; a page names it in a comment
before the block: ``<!-- from tests/FILE.py: NAME -->``.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- from (\S+): (.+?) -->\n```python\n)(.*?)(```\n)", re.S)


def snippet(file: str, name: str) -> str:
    """The marked lines of a test."""
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.search(
        rf"^ *# docs: begin {re.escape(name)}\n(.*?)^ *# docs: end\n", text, re.S | re.M
    )
    if found is None:
        raise ValueError(f"{file} has no code marked {name!r}")
    return textwrap.dedent(found.group(1)).rstrip() + "\n"


def up_to_date(page: Path) -> str:
    """A page with the present code of the tests."""
    text = page.read_text(encoding="utf-8")
    return BLOCK.sub(lambda m: m.group(1) + snippet(m.group(2), m.group(3)) + m.group(5), text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write, stale = parser.parse_args().write, 0
    for page in sorted((ROOT / "docs").glob("*.md")):
        new = up_to_date(page)
        if new != page.read_text(encoding="utf-8"):
            stale += 1
            if write:
                page.write_text(new, encoding="utf-8")
    return int(stale > 0 and not write)


if __name__ == "__main__":
    raise SystemExit(main())
