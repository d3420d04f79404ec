"""The rows of the pairs of a quasi-Newton move, and the metric that they remember.

The metric is D = learning rate / (√v + ε). Each pair remembers the gradient before it: the newest
one less the changes since then. v is the mean square of the newest gradient and of those before the
pairs, which takes no memory: the moves are long, and the rule's v̂ is that of places left long ago.
With fewer pairs than `LEAST_PAIRS`, and for elements of which none of these gradients was other
than 0, the rule's denominator stands for √v + ε.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton_hybrid.kernels.rows import MOST_ROWS, address_row
from triton_hybrid.kernels.scalars import EPS
from triton_hybrid.kernels.trial import LEAST_PAIRS

LONGEST_HISTORY = 32
LAST_GRADIENT = address_row("last_gradient")
# Rows of one kind lie side by side in the address table.
MOVES, *_ = (address_row(f"move_{slot}") for slot in range(LONGEST_HISTORY))
CHANGES, *_ = (address_row(f"change_{slot}") for slot in range(LONGEST_HISTORY))
_N_ROWS = tl.constexpr(MOST_ROWS)


@triton.jit
def tile(
    addresses, first, tensor, begin, length,
    HISTORY: tl.constexpr, ROWS: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """A block of every row of a kind, ``[ROWS, BLOCK]``; beyond `HISTORY` the last one again."""
    rows = tl.minimum(tl.arange(0, ROWS), HISTORY - 1)
    pointers = tl.load(addresses + tensor * _N_ROWS + first + rows).to(tl.pointer_type(STATE))
    offsets = begin + tl.arange(0, BLOCK)
    if FULL:
        values = tl.load(tl.multiple_of(pointers, 16)[:, None] + offsets[None, :])
    else:
        cells = pointers[:, None] + offsets[None, :]
        values = tl.load(cells, mask=(offsets < length)[None, :], other=0.0)
    return values


@triton.jit
def newest(slot, back, history):
    """Where the newest pair but so many lies, if the next one is written to a slot."""
    found = slot - 1 - back
    return tl.where(found < 0, found + history, found)


@triton.jit
def remembered(squares, pairs, row, otherwise, STATE: tl.constexpr):
    """The denominator from the sum of squared gradients; the rule's, where there are none."""
    share = tl.where(pairs >= LEAST_PAIRS, 1.0 / (pairs + 1.0), 0.0).to(STATE)
    root = tl.sqrt(squares * share)
    return tl.where(root > 0, root + tl.load(row + EPS).to(STATE), otherwise)
