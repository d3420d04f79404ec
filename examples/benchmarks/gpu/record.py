"""What the suite finds out, section by section: as JSON and as tables."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from lib.files import write_json
from lib.tables import UNKNOWN, figures_table

SHOWN_FAILURES = 12
WIDTH = 160
UNTESTED = "The kernels are not shown to be right: no time above is worth anything."
Found = list[dict[str, Any]]


@dataclass
class SectionResult:
    """What came out of one section; `take` and `end` fill it in."""

    name: str
    title: str
    status: str = "not run"  # or unfinished, passed, failed, skipped, timeout
    seconds: float = 0.0
    rows: Found = field(default_factory=list)
    checks: Found = field(default_factory=list)
    skipped: Found = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def take(self, kind: str, content: dict[str, Any]) -> None:
        """Keeps what a section tells."""
        if kind == "fact":
            self.facts |= content
        else:
            {"row": self.rows, "check": self.checks, "skip": self.skipped}[kind].append(content)

    @property
    def failures(self) -> Found:
        """The checks that do not hold."""
        return [check for check in self.checks if not check["passed"]]

    def end(self, error: str | None = None, late: bool = False) -> None:
        """Settles the status by what went wrong, and whether time was up."""
        self.error = error
        failed, empty = error is not None or self.failures, not self.rows and not self.checks
        found = "failed" if failed else "skipped" if self.skipped and empty else "passed"
        self.status = "timeout" if late else found


@dataclass
class Record:
    """All sections of a run, and the file they go to."""

    output: Path
    seed: int
    minutes: float
    sections: list[SectionResult]
    benchmark: str = "gpu_suite"
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    @property
    def held(self) -> bool:
        """Whether every section passed, or was left out for a reason."""
        return all(section.status in ("passed", "skipped") for section in self.sections)

    def write(self) -> None:
        """Writes the file, whole or not at all: a run that is killed leaves the last version."""
        content: dict[str, Any] = {"benchmark": self.benchmark, "held": self.held}
        content |= {"hardware": None, "versions": None}
        for section in self.sections:
            if section.name == "environment":
                content |= section.facts
        plain = dataclasses.asdict(self)
        del plain["output"]
        write_json(self.output, content | plain)

    def show(self) -> None:
        """Prints tables and failures of every section, then a line for each."""
        console = Console(width=WIDTH, highlight=False)
        for section in self.sections:
            _show(section, console)
        summary = figures_table("Sections", ("section", "status", "seconds", "checks", "error"))
        for section in self.sections:
            held = f"{len(section.checks) - len(section.failures)} of {len(section.checks)}"
            seconds, error = f"{section.seconds:.0f}", (section.error or "")[:80]
            summary.add_row(section.name, section.status, seconds, held, error)
        console.print(summary)
        if any(s.name == "correctness" and s.status != "passed" for s in self.sections):
            console.print(UNTESTED)
        print(f"{'PASSED' if self.held else 'FAILED'}: {self.output}")


def _show(section: SectionResult, console: Console) -> None:
    for head in dict.fromkeys(tuple(row) for row in section.rows):
        table = figures_table(section.title, [name.replace("_", " ") for name in head])
        for row in section.rows:
            if tuple(row) == head:
                table.add_row(*map(_cell, row.values()))
        console.print(table)
    lines = [
        f"FAILED {section.name}: {check['name']}: {_cell(check['value'])}, "
        f"limit {_cell(check['limit'])} {check['detail']}"
        for check in section.failures
    ]
    if len(lines) > SHOWN_FAILURES:
        lines[SHOWN_FAILURES:] = [f"... and {len(lines) - SHOWN_FAILURES} more, in the JSON file"]
    lines += [f"FAILED {section.name}: {section.error}"] * (section.error is not None)
    lines += [f"{section.name}, left out: {s['what']} ({s['reason']})" for s in section.skipped]
    for line in lines:
        print(line[:600])


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        if "median" in value:
            return f"{value['median']:.4g} ({value['p20']:.4g}-{value['p80']:.4g})"
        return " ".join(f"{name} {_cell(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else UNKNOWN if value is None else str(value)
