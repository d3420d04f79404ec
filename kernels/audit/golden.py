"""What every kernel was last agreed to take, and what a change may not make worse.

``golden.txt`` holds one line a launch: what it moves and computes for an element, and for each
target registers, spills, shared memory, widest access, and global loads and stores of 128 bits and
more + narrower ones. It belongs to one version of Triton, which its first line names. Under others
nothing is compared. ``python -m triton_hybrid.kernels.audit --write`` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import triton
from triton_hybrid.kernels.audit.findings import Finding
from triton_hybrid.kernels.audit.occupancy import resident_programs
from triton_hybrid.kernels.audit.targets import TARGETS

FILE = Path(__file__).with_name("golden.txt")
REGISTERS_MORE = 4
"""So many registers more pass, if they cost no resident program."""
OF_ALL = ("bytes", "flops", "fp64 flops", "tensor flops")
OF_TARGET = ("registers", "spills", "shared", "widest", "loads", "stores", "warps")
REWRITE = "python -m triton_hybrid.kernels.audit --write"

Values = dict[str, str]


def values_of(finding: Finding) -> Values:
    """What the golden file says about a finding, by column."""
    counts = (finding.ir_bytes, finding.flops, finding.fp64_flops, finding.tensor_flops)
    accesses = [f"{wide}+{narrow}" for wide, narrow in (finding.loads, finding.stores)]
    sizes = (finding.registers, finding.spills, finding.shared_bytes, finding.widest_bits)
    numbers = ["-" if count is None else f"{count:.0f}" for count in counts]
    found = (*numbers, *map(str, sizes), *accesses, str(finding.warps))
    return dict(zip((*OF_ALL, *OF_TARGET), found))


class Golden:
    """The golden file.

    Args:
        text: Its content; nothing where there is none, as in an installed package.
    """

    def __init__(self, text: str = "") -> None:
        self.triton = ""
        self.values: dict[tuple[str, str], Values] = {}
        targets: list[str] = []
        for line in text.splitlines():
            name, *cells = (part.strip() for part in line.split("|"))
            if line.startswith("# Triton"):
                self.triton = line.split()[2].rstrip(":")
            elif line.startswith("#"):
                targets = [cell.split()[0] for cell in cells[1:]]
            else:
                shared = dict(zip(OF_ALL, cells[0].split()))
                for target, cell in zip(targets, cells[1:]):
                    if cell != "-":
                        own = dict(zip(OF_TARGET, cell.split()))
                        self.values[name, target] = {**shared, **own}

    @classmethod
    def read(cls) -> Golden:
        """The committed one."""
        return cls(FILE.read_text(encoding="utf-8") if FILE.exists() else "")

    def why_not(self) -> str:
        """Why nothing is compared; nothing where it is."""
        if not self.triton:
            return f"no golden file at {FILE}: nothing was compared"
        if self.triton != triton.__version__:
            here = f"this is {triton.__version__}: nothing was compared"
            return f"the golden file belongs to Triton {self.triton}, {here}"
        return ""

    def worse(self, finding: Finding) -> list[str]:
        """What is worse than it was, each with column, old and new value."""
        old = self.values.get((finding.case, finding.target))
        if old is None:
            return [f"is not in the golden file: {REWRITE}"]
        new = values_of(finding)
        words = [(column, why) for column, why in _worse(old, new, finding.target)]
        return [f"{column} {new[column]}, was {old[column]}{why}" for column, why in words]

    def gone(self, names: Sequence[str]) -> list[str]:
        """Launches of the golden file that are no more."""
        return sorted({case for case, _ in self.values} - set(names))

    def updated(self, findings: Sequence[Finding], names: Sequence[str]) -> str:
        """The file's text with other findings, and of the launches with these names alone."""
        values = {key: value for key, value in self.values.items() if key[0] in names}
        if self.triton != triton.__version__:
            values = {}
        values |= {(finding.case, finding.target): values_of(finding) for finding in findings}
        head = [f"# Triton {triton.__version__}: {REWRITE}"]
        first, *others = TARGETS
        title = ("# launch", ", ".join(OF_ALL), f"{first} {', '.join(OF_TARGET)}", *others)
        head.append(" | ".join(title))
        lines = []
        for name in sorted({case for case, _ in values}):
            row = {target: values[name, target] for target in TARGETS if (name, target) in values}
            shared = " ".join(next(iter(row.values()))[column] for column in OF_ALL)
            cells = [
                " ".join(row[target][column] for column in OF_TARGET) if target in row else "-"
                for target in TARGETS
            ]
            lines.append(" | ".join((name, shared, *cells)))
        return "\n".join((*head, *lines)) + "\n"


def _worse(
    old: Mapping[str, str], new: Mapping[str, str], target: str
) -> Iterator[tuple[str, str]]:
    """Columns that are worse, with the reason where the numbers do not tell it."""
    for column in OF_ALL:
        if "-" in (old[column], new[column]):
            if old[column] != new[column]:
                yield column, " (counted and not counted)"
        elif float(new[column]) > float(old[column]):
            yield column, ""
    before, after = (
        {column: int(side[column]) for column in OF_TARGET if side[column].isdigit()}
        for side in (old, new)
    )
    was, now = (
        resident_programs(target, side["registers"], side["shared"], side["warps"])
        for side in (before, after)
    )
    fewer = f", and {now} programs are resident on a multiprocessor instead of {was}"
    more = after["registers"] - before["registers"]
    if more > REGISTERS_MORE:
        yield "registers", f": at most {REGISTERS_MORE} more"
    elif more > 0 and now < was:
        yield "registers", fewer
    if after["shared"] > before["shared"] and now < was:
        yield "shared", fewer
    if after["spills"] > before["spills"]:
        yield "spills", ""
    if after["widest"] < before["widest"]:
        yield "widest", ""
    for column in ("loads", "stores"):
        (wide, narrow), (w, n) = (map(int, side[column].split("+")) for side in (old, new))
        if w < wide and n > narrow:
            yield column, " (128 bits and more + narrower): accesses became narrower"
