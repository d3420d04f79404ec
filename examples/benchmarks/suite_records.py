"""What the GPU suite finds out: checks, rows of numbers and failures, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

FORMAT = 1
"""Version of the JSON file's layout."""
UNKNOWN = "-"
SHOWN_FAILURES = 12


@dataclass
class Check:
    """One thing that holds or does not.

    Attributes:
        name: What was checked.
        kernel: Whose speed it vouches for; empty where it is about something else.
        dtype: Of the parameters; ``"any"`` where it does not matter.
        passed: Whether it holds.
        error: What was measured, usually ‖out - ref‖ / ‖ref‖.
        tolerance: What the error may be.
        detail: What a reader needs when it failed.
    """

    name: str
    kernel: str
    dtype: str
    passed: bool
    error: float | None = None
    tolerance: float | None = None
    detail: str = ""


@dataclass
class Skip:
    """Something that was left out, and why."""

    what: str
    reason: str


@dataclass
class Timing:
    """Milliseconds of repeated runs: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        """Summarises samples."""
        ordered = sorted(milliseconds)

        def at(share: float) -> float:
            position = share * (len(ordered) - 1)
            low = math.floor(position)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (position - low) * (ordered[high] - ordered[low])

        return cls(at(0.5), at(0.2), at(0.8), len(ordered))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.p20:.3f}-{self.p80:.3f})"


class Row:
    """One line of a section's table; its subclasses are dataclasses."""

    HEAD: ClassVar[tuple[str, ...]] = ()

    def cells(self) -> tuple[str, ...]:
        """The line, as text under ``HEAD``."""
        raise NotImplementedError


@dataclass
class SectionResult:
    """What came out of one section.

    Attributes:
        name: Of the section.
        title: Of its table.
        checks: What holds and what does not.
        rows: Numbers.
        skipped: What was left out.
        facts: Everything else.
        error: The exception that ended the section early.
        traceback: Where it came from.
        seconds: How long the section took.
        state: ``"not run"``, ``"running"`` or ``"done"``.
    """

    name: str
    title: str
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    traceback: str | None = None
    seconds: float = 0.0
    state: str = "not run"

    @property
    def failures(self) -> list[Check]:
        """The checks that do not hold."""
        return [check for check in self.checks if not check.passed]

    @property
    def status(self) -> str:
        """``"passed"``, ``"failed"``, or why neither is known."""
        if self.error is not None or self.failures:
            return "failed"
        return "passed" if self.state == "done" else self.state

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain Python values."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["checks"] = [dataclasses.asdict(check) for check in self.checks]
        plain["skipped"] = [dataclasses.asdict(skip) for skip in self.skipped]
        plain["rows"] = [dataclasses.asdict(row) for row in self.rows]  # type: ignore[call-overload]
        return {"status": self.status, **plain}


@dataclass
class SuiteRecord:
    """All sections of a run, and the file they go to.

    Attributes:
        output: The JSON file.
        options: How the suite was called.
        sections: In the order they run.
        started: Date and time, local.
    """

    output: Path
    options: dict[str, Any]
    sections: list[SectionResult]
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    @property
    def passed(self) -> bool:
        """Whether every section ran and nothing failed."""
        return all(section.status == "passed" for section in self.sections)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain Python values that every JSON reader accepts."""
        content = {
            "suite": "gpu_suite",
            "format": FORMAT,
            "started": self.started,
            "passed": self.passed,
            "options": self.options,
            "sections": [section.to_dict() for section in self.sections],
        }
        strict = _strict(content)
        assert isinstance(strict, dict)
        return strict

    def write(self) -> None:
        """Writes the file, whole or not at all: a run that is killed leaves the last version."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        self.output.parent.mkdir(parents=True, exist_ok=True)
        partial = self.output.with_name(self.output.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.output)

    def table(self) -> str:
        """What is printed last: a block for each section, then a line for each."""
        environment = [s.title for s in self.sections if s.name == "environment"]
        blocks = [block for section in self.sections if (block := section_block(section))]
        blocks = [*environment, *blocks]
        summary = [
            (section.name, section.status, f"{section.seconds:.0f} s", _headline(section))
            for section in self.sections
        ]
        blocks.append(grid(("section", "status", "time", ""), summary))
        return "\n\n".join(blocks)


def section_block(section: SectionResult) -> str:
    """The numbers, failures and omissions of a section, as text."""
    lines = []
    if section.rows:
        # Rows of different kinds in one section make a table each.
        kinds = list(dict.fromkeys(type(row) for row in section.rows))
        for kind in kinds:
            members = [row.cells() for row in section.rows if type(row) is kind]
            lines.append(grid(kind.HEAD, members))
    lines += [
        f"FAILED {check.kernel} {check.dtype} {check.name}: error "
        f"{UNKNOWN if check.error is None else format(check.error, '.2e')} {check.detail}"[:240]
        for check in section.failures[:SHOWN_FAILURES]
    ]
    if len(section.failures) > SHOWN_FAILURES:
        lines.append(f"... and {len(section.failures) - SHOWN_FAILURES} more, in the JSON file")
    if section.error is not None:
        lines.append(f"FAILED {section.error}"[:400])
    reasons: dict[str, list[str]] = {}
    for skip in section.skipped:
        reasons.setdefault(skip.reason, []).append(skip.what)
    lines += [f"left out ({reason}): {'; '.join(what)}"[:240] for reason, what in reasons.items()]
    return "\n".join([section.title, *lines]) if lines else ""


def _headline(section: SectionResult) -> str:
    if section.error is not None:
        return section.error.splitlines()[0][:70]
    if section.checks:
        return f"{len(section.checks) - len(section.failures)} of {len(section.checks)} checks hold"
    return f"{len(section.rows)} rows" if section.rows else ""


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: to the right where they hold numbers, but never the first one."""
    table = [tuple(head), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    numeric = [
        column > 0 and all(row[column][:1].isdigit() or row[column] == UNKNOWN for row in rows)
        for column in range(len(head))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric)
        ).rstrip()
        for line in table
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _strict(value: Any) -> Any:
    """Makes values that JSON does not have (NaN, infinities, paths) into text."""
    if isinstance(value, dict):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
