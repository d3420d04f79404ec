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
from triton_hybrid.kernels.audit.mix import KINDS
from triton_hybrid.kernels.audit.occupancy import occupancy


def _cells(finding: Finding) -> dict[str, str]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:g}"

    known = finding.known_bytes
    moved = number(finding.bytes_per_element)
    if known is not None and finding.bytes_per_element != known and not finding.skipped:
        moved += f" (known: {known})"
    return {
        "launch": finding.case,
        "target": finding.target,
        "registers": number(finding.registers) + ("*" if finding.cooperative else ""),
        "spills": number(finding.spills),
        "shared": number(finding.shared_bytes),
        "widest": number(finding.widest_bits),
        "bytes/element": moved,
        "floor": number(finding.floor_bytes),
        "": "FAIL" if finding.failures else "skipped" if finding.skipped else "ok",
    }


def table(findings: Sequence[Finding]) -> str:
    """The findings as a plain-text table."""
    cells = [_cells(finding) for finding in findings]
    return aligned([list(cells[0]), *(list(row.values()) for row in cells)], "<<>>>>>><")


def mix_table(findings: Sequence[Finding]) -> str:
    """Programs and share of warps on a multiprocessor, then instructions by kind."""
    rows = [["launch", "target", "programs", "warps", *KINDS, "all"]]
    for finding in findings:
        if finding.resident is not None:
            share = occupancy(finding.target, finding.resident, finding.warps)
            cells = [finding.case, finding.target, str(finding.resident), f"{share:.0%}"]
            rows.append([*cells, *(str(finding.mix.get(kind, "-")) for kind in rows[0][4:])])
    return aligned(rows, "<<" + ">" * (len(rows[0]) - 2))


def aligned(rows: list[list[str]], sides: str) -> str:
    """Rows as text, the first as the head; a launch is named in its first row only."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    lines = []
    previous = ""
    for launch, *rest in rows:
        shown = ["" if launch == previous else launch, *rest]
        previous = launch
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(shown, sides, widths)]
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
