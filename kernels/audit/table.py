"""The findings of the audit as a table, a summary and a file."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import triton
from triton_hybrid.kernels.audit.findings import REGISTER_LIMIT, Finding

_COLUMNS = (
    ("launch", "<"),
    ("target", "<"),
    ("registers", ">"),
    ("spills", ">"),
    ("shared", ">"),
    ("widest", ">"),
    ("bytes/element", ">"),
    ("floor", ">"),
    ("", "<"),
)


def _cells(finding: Finding) -> list[str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:g}"

    known = finding.known_bytes
    moved = number(finding.bytes_per_element)
    if known is not None and finding.bytes_per_element != known and not finding.skipped:
        moved += f" (known: {known})"
    state = "FAIL" if finding.failures else "skipped" if finding.skipped else "ok"
    return [
        finding.case,
        finding.target,
        number(finding.registers) + ("*" if finding.cooperative else ""),
        number(finding.spills),
        number(finding.shared_bytes),
        number(finding.widest_bits),
        moved,
        number(finding.floor_bytes),
        state,
    ]


def table(findings: Sequence[Finding]) -> str:
    """The findings as a plain-text table."""
    rows = [[title for title, _ in _COLUMNS], *(_cells(finding) for finding in findings)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(_COLUMNS))]
    rows.insert(1, ["-" * width for width in widths])
    lines = []
    previous = ""
    for row in rows:
        shown = [("" if row[0] == previous else row[0]), *row[1:]]
        previous = row[0]
        cells = [f"{c:{a}{w}}" for c, (_, a), w in zip(shown, _COLUMNS, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def summary(findings: Sequence[Finding], seconds: float) -> str:
    """What failed, what was skipped, and the totals."""
    lines = ["* cooperative launch: all programs must be resident together."]
    for finding in findings:
        for failure in finding.failures:
            lines.append(f"FAIL {finding.case}, {finding.target}: {failure}")
    for reason in sorted({finding.skipped for finding in findings if finding.skipped}):
        count = sum(finding.skipped == reason for finding in findings)
        lines.append(f"skipped {count}: {reason}")
    failed = sum(bool(finding.failures) for finding in findings)
    compiled = sum(not finding.skipped for finding in findings)
    lines.append(
        f"{compiled} compiled, {failed} failed, Triton {triton.__version__}, {seconds:.0f} s"
    )
    return "\n".join(lines)


def write_json(path: Path, findings: Sequence[Finding]) -> None:
    """Writes the findings, with the versions that they hold for."""
    report = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "register_limit": REGISTER_LIMIT,
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
