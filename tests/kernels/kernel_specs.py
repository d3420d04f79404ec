"""What the kernel tests draw: shapes and memory orders, dtypes, tilings, hyperparameters.

A test draws `Spec`s (shape, memory order, misalignment, seed), never arrays. On a GPU the same
tests draw tensors of millions of elements and the device's own tiling too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from kernel_memory import DEVICE
from torch import Tensor
from triton_hybrid.kernels.launch import Tiling
from triton_hybrid.kernels.rows import NONE, OWN, SPLIT
from triton_hybrid.kernels.scalars import HYPER

from triton_hybrid.rules import OPTIONS, RULES

ON_GPU = DEVICE.type == "cuda"
"""Then layouts of GPU size are drawn too."""

ONE = Tiling(block=64, chunk=128, programs=1)
"""Small enough that a few hundred elements span several chunks. One program, so that the
interpreter, which runs programs one after another, can take the cooperative launch."""
THREE = Tiling(block=64, chunk=128, programs=3)
"""The same with several programs: in the interpreter only for launches without a grid barrier."""
TILINGS: tuple[Tiling | None, ...] = (ONE, THREE, None) if ON_GPU else (ONE, THREE)
"""None is the device's own; in the interpreter its chunks are larger than any tensor here."""


def fewer(examples: int = 4) -> settings:
    """Settings of a costly property: fewer examples than the profile draws."""
    return settings(max_examples=min(examples, settings().max_examples))


def more(examples: int = 40) -> settings:
    """Settings of a cheap property with many cases: more examples than the profile draws."""
    return settings(max_examples=max(examples, settings().max_examples))


@dataclass(frozen=True)
class Spec:
    """One tensor of a problem, with everything its values depend on."""

    shape: tuple[int, ...]
    order: tuple[int, ...]
    grad_order: tuple[int, ...]
    shift: int = 0
    seed: int = 0
    group: int = 0
    step: int = 3
    present: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def plain(*shapes: tuple[int, ...], **changes: Any) -> list[Spec]:
    """Contiguous, aligned tensors of the given shapes."""
    return [
        Spec(shape, tuple(range(len(shape))), tuple(range(len(shape))), seed=seed, **changes)
        for seed, shape in enumerate(shapes)
    ]


LENGTHS = (1, 2, 5, 63, 64, 65, 127, 128, 129, 200, 257)
Shapes = tuple[tuple[int, ...], ...]
ODD: Shapes = ((), (0,), (1,), (3, 0), (0, 3), (1, 1, 7), (2, 0, 4))
LARGE: Shapes = ((1 << 21,), (3_000_017,), (768, 3072), (1021, 2053), (37, 64, 33, 29))
"""Of GPU size: whole chunks, ragged ones, and memory orders in which neighbours lie far apart."""


def some(tiling: Tiling | None = ONE, rule: str = "adamw", **changes: Any) -> list[Spec]:
    """A few tensors that a rule takes, of several chunks of a tiling."""
    matrices = RULES[rule].bind is not None
    small: Shapes = ((300,), (7, 9), (0,), ())
    shapes = LARGE if ON_GPU and tiling is None else ((12, 24), (7, 9)) if matrices else small
    return plain(*(shape for shape in shapes if not matrices or len(shape) == 2), **changes)


@st.composite
def specs(draw: st.DrawFn, groups: int = 1, absent: bool = False, matrices: bool = False) -> Spec:
    """A tensor of any rank, order, alignment; empty, single, around a chunk's end, or large."""
    kinds = ("matrix", "odd") if matrices else ("vector", "vector", "matrix", "images", "odd")
    kind = draw(st.sampled_from(kinds + ("large",) * ON_GPU))
    if kind == "vector":
        shape: tuple[int, ...] = (draw(st.sampled_from(LENGTHS)),)
    elif kind == "matrix":
        shape = (draw(st.integers(1, 12)), draw(st.integers(1, 24)))
    elif kind == "images":
        shape = (2, draw(st.integers(1, 4)), 3, draw(st.integers(1, 5)))
    else:
        known = ODD if kind == "odd" else LARGE
        shape = draw(st.sampled_from([s for s in known if not matrices or len(s) == 2]))
    orders = st.permutations(range(len(shape))).map(tuple)
    order = draw(st.just((0, 2, 3, 1)) | orders if kind == "images" else orders)
    return Spec(
        shape=shape,
        order=order,
        grad_order=draw(st.just(order) | orders),
        shift=draw(st.sampled_from((0, 0, 1, 3))),
        seed=draw(st.integers(0, 999)),
        group=draw(st.integers(0, groups - 1)),
        step=draw(st.sampled_from((0, 1, 9, 1000))),
        present=not absent or draw(st.sampled_from((True, True, False))),
    )


def spec_lists(
    min_size: int = 1, max_size: int = 4, rule: str = "adamw", filled: bool = False, **each: Any
) -> st.SearchStrategy[list[Spec]]:
    """Lists of tensors for one launch of a rule; filled: one at least has a gradient."""
    matrices = RULES[rule].bind is not None
    lists = st.lists(specs(matrices=matrices, **each), min_size=min_size, max_size=max_size)
    return lists.filter(lambda drawn: not filled or any(s.present and s.numel for s in drawn))


class Precision(NamedTuple):
    """Dtypes of parameter and gradient, and how the FP32 masters of 16-bit ones are kept."""

    param: torch.dtype
    grad: torch.dtype
    kept: int = OWN

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.param == torch.float64 else torch.float32


FP32 = Precision(torch.float32, torch.float32)
FP16 = Precision(torch.float16, torch.float16)
BF16 = Precision(torch.bfloat16, torch.bfloat16)
FP64 = Precision(torch.float64, torch.float64)
WITHOUT_MASTERS = BF16._replace(kept=SPLIT), BF16._replace(kept=NONE), FP16._replace(kept=NONE)
PRECISIONS = (FP32, FP16, BF16, BF16._replace(grad=torch.float32), FP64, *WITHOUT_MASTERS)
precisions = st.sampled_from(PRECISIONS)

GROUPS: tuple[dict[str, float], ...] = (
    {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 3e-3, "beta1": 0.0, "beta2": 0.5, "eps": 1e-3, "sign": -1.0, "horizon": 7.0},
    {"lr": 0.0, "beta1": 0.95, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.5},
)
"""Hyperparameters of three groups: defaults, maximising, and a learning rate of 0."""


def hyper_table(groups: Sequence[dict[str, float]], rule: str = "adamw") -> Tensor:
    """The FP64 hyperparameter table of parameter groups."""
    start = {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "sign": 1.0,
    }
    start |= {"horizon": 3.0, "nesterov_mix": 1.0, "slow_mix": 0.0}
    rows = []
    for group in groups:
        row = {**start, **group}
        options = {**OPTIONS, "betas": (row["beta1"], row["beta2"]), "momentum": row["beta1"]}
        decays = {"exp_avg": RULES[rule].betas(options, False).exp_avg, "beta2": row["beta2"]}
        logs = {f"log_{name}": math.log(d) if d else -math.inf for name, d in decays.items()}
        rows.append([{**row, **logs}[name] for name in HYPER])
    return torch.tensor(rows, dtype=torch.float64)
