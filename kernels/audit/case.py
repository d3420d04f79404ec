"""A launch that is audited, and what it is known to move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from triton_hybrid.kernels.audit.targets import Launch, Target


@dataclass(frozen=True)
class Case:
    """A launch to audit, and what it is known to move.

    The byte counts are those of one element in a full chunk, one entry a row.
    """

    name: str
    launch: Callable[[Target], Launch]
    reads: tuple[int, ...] = ()  # item sizes of the rows that a block reads
    writes: tuple[int, ...] = ()  # and of those that it writes
    inner: tuple[int, ...] = ()  # and of those that it reads in a loop of its own
    times: int = 1  # how often that loop runs
    first_pass: tuple[int, ...] = ()  # and of those that a pass of its own reads before
    pieces: int = 1  # parts of a block that all but that pass work on one after the other
    floor: int | None = None
    """Bytes that the bare operation has to move; None where elements are not moved."""
    may_spill: bool = False
    """True for FP64, which nobody trains with: it has to run, not to be fast."""
    may_park: bool = False
    """Whether `MOST_PARKED` bytes a thread may spill (on AMD `MOST_LANES`): what only the loop over
    chunks needs, stored once in 8192 elements. Without and with, an H200 ran at the same speed."""
    products: bool = False
    """Whether it multiplies matrices; then all its tiles must come by accesses of 128 bits. Its
    element is one of a tile of an operand."""
    on_paper: int | None = None
    """Bytes of a kernel whose accesses in the assembly do not add up to its roles: it writes a tile
    as it is or turned, or keeps what it loaded for several products."""
    repeats: int = 0
    """Bytes that it asks for once more, and that lie in a cache by then."""

    @property
    def kernel(self) -> str:
        """Which kernel, as on the command line."""
        return self.name.split()[0].rstrip(",")

    @property
    def bytes_per_element(self) -> int | None:
        """Bytes that the kernel moves for an element; None where it moves none."""
        if self.on_paper is not None:
            return self.on_paper
        return sum((*self.reads, *self.writes, *self.first_pass, *self.inner * self.times)) or None
