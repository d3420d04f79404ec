"""What a kernel moves and computes for an element, counted in Triton's IR of its full chunks.

The IR names whole blocks, so an operation on a block is one for each of its elements, whatever a
compiler makes of it for a target. Full chunks are the loops that load blocks without a mask. The
count needs no assembly and no table of roles: it is compared with both.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_LOCATION = re.compile(r"\s+loc\([#\w]+\)$")
_BLOCK = re.compile(r"tensor<((?:\d+x)+)(?:!tt\.ptr<)?([a-z]+)(\d+)")
_LOOP = re.compile(r"= %c(\d+)_i\d+ to %(?:c(\d+)_i\d+|\w+) step %c(\d+)_i\d+")
_ONE_FLOP = re.compile(
    r"(?:arith\.(?:add|sub|mul|div|neg|maxnum|minnum|maximum|minimum)f"
    r"|math\.(?:sqrt|rsqrt|exp|exp2|log|log2)|tt\.precise_\w+) "
)
_DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x")


@dataclass
class Counts:
    """Bytes and floating-point operations; a comparison, a choice or a conversion is none.

    A division or a root is one, although it takes some ten instructions.
    """

    bytes: float = 0.0
    flops: float = 0.0  # in FP32 or less, those of matrix products in 16 bits left out
    fp64_flops: float = 0.0
    tensor_flops: float = 0.0  # of products of 16-bit matrices

    def plus(self, other: Counts, times: float = 1.0) -> Counts:
        """The sum with what runs so many times."""
        pairs = zip(vars(self).values(), vars(other).values())
        return Counts(*(mine + times * theirs for mine, theirs in pairs))

    def or_else(self, other: Counts) -> Counts:
        """What is certain to suffice for either of two branches."""
        return Counts(*map(max, zip(vars(self).values(), vars(other).values())))


@dataclass
class _Region:
    """A pair of braces in the IR."""

    head: str
    lines: list[str] = field(default_factory=list)
    inside: list[_Region] = field(default_factory=list)
    otherwise: _Region | None = None


def _parsed(ir: str) -> _Region:
    stack = [_Region("")]
    for raw in ir.splitlines():
        line = _LOCATION.sub("", raw.strip())
        if line.startswith("}"):
            closed = stack.pop()
            if line.endswith("{"):
                closed.otherwise = _Region(line)
                stack.append(closed.otherwise)
            elif "tt.reduce" in closed.head:
                stack[-1].lines.append(f"tt.reduce {line}")
        elif line.endswith("{"):
            region = _Region(line)
            stack[-1].inside.append(region)
            stack.append(region)
        else:
            stack[-1].lines.append(line)
    return stack[0]


def _blocks(text: str) -> list[tuple[int, str, int]]:
    """Of each tensor type in a text: its elements, their kind (``f``, ``i``), their bits."""
    return [
        (math.prod(map(int, shape[:-1].split("x"))), kind, int(bits))
        for shape, kind, bits in _BLOCK.findall(text)
    ]


def _whole(line: str) -> tuple[int, int] | None:
    """Elements and bytes of a block that a line loads or stores without a mask."""
    operation = re.search(r"tt\.(load|store) ([^:{]*)", line)
    blocks = _blocks(line.rpartition(":")[2])
    # Around the first-level cache come the partial sums of other programs.
    if operation is None or not blocks or re.search(r"[mM]odifier = (cg|3)\b", line):
        return None
    kind, operands = operation.groups()
    elements, element, bits = blocks[0]
    # Addresses of 64 bits come from the address table.
    if operands.count("%") > 1 + (kind == "store") or (element, bits) == ("i", 64):
        return None
    return elements, elements * bits // 8


def _own(region: _Region) -> Counts:
    """What the lines of a region count, without the regions in it."""
    total = Counts()
    for line in region.lines:
        moved, product = _whole(line), _DOT.search(line)
        if moved:
            total.bytes += moved[1]
        if product:
            high, deep, dtype, wide = product.groups()
            flops = 2.0 * int(high) * int(deep) * int(wide)
            total = total.plus(Counts(tensor_flops=flops) if "16" in dtype else Counts(flops=flops))
        elif _ONE_FLOP.search(line) or line.startswith("tt.reduce }"):
            types = line.rpartition(" : ")[2].partition(" -> ")
            before, after = map(_blocks, (types[0], types[2]))
            for index, (elements, _, bits) in enumerate(before):
                left = after[index][0] if after else 1
                flops = float(elements - left if "tt.reduce" in line else elements)
                total = total.plus(Counts(fp64_flops=flops) if bits == 64 else Counts(flops=flops))
    return total


def _work(region: _Region, times: int) -> Counts:
    """What one run of a region does; loops of unknown length run ``times``."""
    total = _own(region)
    for inner in region.inside:
        if "scf.for" in inner.head:
            loop = _LOOP.search(inner.head)
            trips = times
            if loop and loop[2]:
                trips = -(-(int(loop[2]) - int(loop[1])) // int(loop[3]))
            total = total.plus(_work(inner, times), trips)
        elif "tt.reduce" not in inner.head:
            branch = _work(inner, times)
            other = _work(inner.otherwise, times) if inner.otherwise else Counts()
            total = total.plus(branch.or_else(other))
    return total


def _per_element(region: _Region, times: int) -> Counts:
    whole = [_whole(line) for line in region.lines if "tt.load" in line]
    loaded = [block[0] for block in whole if block]
    if "scf.for" in region.head and loaded:
        return Counts().plus(_work(region, times), 1 / min(loaded))
    total = Counts()
    for inner in (*region.inside, *filter(None, (region.otherwise,))):
        total = total.plus(_per_element(inner, times))
    return total


def counted(ir: str, times: int = 1) -> Counts | None:
    """Counts of one element of a full chunk (of matrix products: of one operand's tile).

    Args:
        ir: Triton's IR, as ``asm["ttir"]`` of a compiled kernel.
        times: How often a loop runs whose length is not a constant.

    Returns:
        None where no block is loaded without a mask.
    """
    found = _per_element(_parsed(ir), times)
    return found if found.bytes else None


_ADDED = re.compile(r"^(%[\w#]+) = tt\.addptr .*>, tensor<(?:\d+x)+(i\d+)>$")


def short_offsets(ir: str) -> int:
    """Whole blocks that are reached by offsets of 32 bits, beyond which tensors go on."""
    short, found = set(), 0
    for raw in ir.splitlines():
        line = _LOCATION.sub("", raw.strip())
        added = _ADDED.match(line)
        if added and added[2] == "i32":
            short.add(added[1])
        operands = re.search(r"tt\.(?:load|store) (%[\w#]+)", line)
        if operands and _whole(line):
            found += operands[1] in short
    return found
