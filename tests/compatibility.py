"""What goes with what: compatibility.csv, a row a feature with the test that shows it.

    python tests/compatibility.py --write    # brings docs/compatibility.md up to date

`test_docs.py` checks that the page is of these rows and that every test is there.
"""

from __future__ import annotations

import argparse
import ast
import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "compatibility.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
STATES = ("works", "refused by name")


def rows() -> list[dict[str, str]]:
    """Section, feature, state, and test: a file under ``tests/``, mostly with a function."""
    with (TESTS / "compatibility.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table() -> Iterator[str]:
    """The lines of the page's tables."""
    for section, its in itertools.groupby(rows(), key=lambda row: row["section"]):
        yield from ("", f"## {section}", "", "| | state | test |", "| --- | --- | --- |")
        for row in its:
            file, _, test = row["test"].partition("::")
            name = test or Path(file).stem
            yield f"| {row['feature']} | {row['state']} | [{name}](../tests/{file}) |"
    yield ""


def wrong() -> list[str]:
    """Rows whose test is not there, or whose state is none."""
    found = []
    for row in rows():
        file, _, test = row["test"].partition("::")
        path = TESTS / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        there = test in names if test else any(name.startswith("test_") for name in names)
        if not there or row["state"] not in STATES:
            found.append(f"{row['feature']}: {row['test']}, {row['state']}")
    return found


def up_to_date() -> str:
    """The page with the tables as they are now."""
    text = PAGE.read_text(encoding="utf-8")
    return text.split(BEGIN)[0] + BEGIN + "\n".join(table()) + END + text.split(END)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(up_to_date(), encoding="utf-8")
    print("\n".join(wrong()))
    return int(up_to_date() != PAGE.read_text(encoding="utf-8") or bool(wrong()))


if __name__ == "__main__":
    raise SystemExit(main())
