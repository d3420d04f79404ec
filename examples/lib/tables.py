"""Tables and their cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

UNKNOWN = "-"


def figures_table(title: str, headings: Sequence[str], **settings: Any) -> Table:
    """Returns a table without rows: a column of names, and columns of figures that are never cut.

    Args:
        title: Its title.
        headings: Of all columns; they end on the same line.
        settings: More for rich's `Table`.
    """
    narrow: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": 0, "title_justify": "left"}
    table = Table(title=title, **{**narrow, **settings})
    lines = max(heading.count("\n") for heading in headings)
    table.add_column(headings[0])
    for heading in headings[1:]:
        above = "\n" * (lines - heading.count("\n"))
        table.add_column(above + heading, justify="right", no_wrap=True)
    return table


def cell(value: float | None, form: str) -> str:
    """Returns a number as ``form.format(value)``; a dash where there is none."""
    return UNKNOWN if value is None or math.isnan(value) else form.format(value)


def mean_cell(values: Sequence[float | None], form: str) -> str:
    """The same of the mean of some numbers; a dash unless all of them are there."""
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known and len(known) == len(values) else None
    return cell(mean, form)
