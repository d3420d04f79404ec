"""Random tensors of awkward sizes in poisoned memory, and what the launchers want beside them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from suite_context import Context
from torch import Tensor
from triton_hybrid.kernels import (
    adamw,
    correct,
    divergence,
    gram,
    newton_schulz,
    predict,
    settle,
)
from triton_hybrid.kernels.adamw import HYPER_FIELDS, Workspace
from triton_hybrid.kernels.chunks import TensorSet, Tiling
from triton_hybrid.kernels.ledger import INDEX, new_ledger

HISTORY = 4
"""Trajectory points: the default of `HybridConfig`."""
CANARY = 0xA5
GUARD = 64
"""Bytes of poison between two tensors."""
STATE = (
    "exp_avg",
    "exp_avg_sq",
    "slow_ema",
    "weight_ema",
    "snapshot",
    *(f"history_{j}" for j in range(HISTORY)),
)
MODULES: tuple[ModuleType, ...] = (
    adamw,
    correct,
    divergence,
    gram,
    newton_schulz,
    predict,
    settle,
)


@dataclass(frozen=True)
class Layout:
    """One tensor: its length, by how many elements it misses alignment, and its gradient."""

    length: int
    shift: int = 0
    present: bool = True


# One element, odd lengths, lengths around the end of a chunk (8,192), misaligned views, a tensor
# without a gradient. The long one gives every program of a large GPU several chunks. The number
# of tensors and of chunks is no multiple of 16, like GPT-2 small's, so Triton compiles the same
# code for these checks and for the measurements.
GPU_LAYOUTS = (
    Layout(1), Layout(5), Layout(8191), Layout(8192), Layout(8193, shift=1), Layout(40_003),
    Layout(24_576), Layout(100_003, shift=3), Layout(12_345, present=False), Layout(777, shift=1),
    Layout(10_000_003),
)  # fmt: skip
TINY_LAYOUTS = (
    Layout(1), Layout(128), Layout(129, shift=1), Layout(70, present=False), Layout(200),
)  # fmt: skip
# The interpreter runs programs one after another: only one of them can pass a grid barrier.
TINY_TILING = Tiling(block=64, chunk=128, programs=1)

GROUPS: tuple[dict[str, float], ...] = (
    {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "sign": 1.0},
    {"lr": 3e-3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.0, "sign": -1.0},
)
"""Hyperparameters of two groups; the second one maximises."""


def hyper_table(groups: Sequence[dict[str, float]], device: torch.device) -> Tensor:
    """The FP64 hyperparameter table that the launchers take."""
    rows = []
    for group in groups:
        logs = {f"log_{name}": math.log(group[name]) for name in ("beta1", "beta2")}
        row = {"horizon": 3.0, "level": 0.5, "look_ahead": 0.0, **group, **logs}
        rows.append([row[name] for name in HYPER_FIELDS])
    return torch.tensor(rows, dtype=torch.float64).to(device)


Values = dict[str, list[Tensor]]


def draw(layouts: Sequence[Layout], context: Context, dtype: torch.dtype, seed: int) -> Values:
    """Fresh random numbers for every role: FP32 state, gradients of the parameters' dtype."""
    generator = torch.Generator(context.device).manual_seed(seed)
    values: Values = {name: [] for name in ("weight", "grad", *STATE)}
    for layout in layouts:

        def normal(length: int = layout.length) -> Tensor:
            return torch.randn(length, generator=generator, device=context.device)

        weight = normal()
        values["weight"].append(weight)
        values["grad"].append(normal().to(dtype))
        values["exp_avg"].append(0.5 * normal())
        values["exp_avg_sq"].append((0.2 + normal().abs()).square())
        values["slow_ema"].append(0.3 * normal())
        values["snapshot"].append(weight + 0.1 * normal())
        for j in range(HISTORY):
            values[f"history_{j}"].append(0.1 * normal())
        values["weight_ema"].append(weight + 0.2 * normal())
    return values


class Problem:
    """A copy of drawn values in guarded memory, as a tensor set with its small tables.

    Args:
        layouts: The tensors.
        values: What is in them.
        context: Where they are.
        dtype: Of the parameters; FP64 makes the reference's copy, with everything in FP64.
    """

    def __init__(
        self, layouts: Sequence[Layout], values: Values, context: Context, dtype: torch.dtype
    ) -> None:
        self.layouts, self.values, self.context, self.dtype = layouts, values, context, dtype
        device = context.device
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        roles = {"weight": wide, "grad": dtype, **dict.fromkeys(STATE, wide)}
        if dtype != wide:
            roles["param"] = dtype
        size = sum(
            (layout.length + 8) * role.itemsize + GUARD + 16
            for role in roles.values()
            for layout in layouts
        )
        self._arena = torch.full((size + GUARD,), CANARY, dtype=torch.uint8, device=device)
        self._guards = [(0, GUARD)]
        self.rows: Values = {}
        for name, role in roles.items():
            self.rows[name] = []
            for index, layout in enumerate(layouts):
                tensor = self._carve(layout, role)
                tensor.copy_(values["weight" if name == "param" else name][index])
                self.rows[name].append(tensor)
        self.rows.setdefault("param", self.rows["weight"])
        if self.has_master:
            for param, layout in zip(self.rows["param"], layouts):
                # Written, never read: a kernel that leaves an element out leaves this behind.
                if layout.present:
                    param.fill_(math.nan)
        tiling = TINY_TILING if context.tiny else None
        self.set = TensorSet({k: v for k, v in self.rows.items() if k != "grad"}, tiling)
        grads = [g if layout.present else None for g, layout in zip(self.rows["grad"], layouts)]
        self.set.set_row("grad", grads)
        count = len(layouts)
        self.group = torch.tensor([i % 2 for i in range(count)], dtype=torch.int32).to(device)
        cycle = (0.0, 1.0, 9.0, 1000.0)
        self.steps = torch.tensor([cycle[i % 4] for i in range(count)]).to(device)
        self.hyper = hyper_table(GROUPS, device)
        self.ledger = new_ledger(device)
        self.memory = torch.tensor([[1.0, 0.25, 1.0]] * count).to(device)
        self.sums = torch.full((count, 3), math.nan, dtype=torch.float64, device=device)
        self.products = torch.full((count, HISTORY), math.nan, dtype=torch.float64, device=device)
        self.workspace = Workspace([self.set])

    @property
    def has_master(self) -> bool:
        """Whether the parameters have 16 bits."""
        return self.dtype in (torch.float16, torch.bfloat16)

    def _carve(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        begin = -(-self._guards[-1][1] // 16) * 16 + layout.shift * dtype.itemsize
        end = begin + layout.length * dtype.itemsize
        self._guards[-1] = (self._guards[-1][0], begin)
        self._guards.append((end, end + GUARD))
        return self._arena[begin:end].view(dtype)

    def spoiled_guards(self) -> int:
        """How many bytes outside every tensor were written."""
        guards = torch.cat([self._arena[begin:end] for begin, end in self._guards])
        return int((guards != CANARY).sum())

    def misrounded(self) -> int:
        """How many parameters are not their master rounded to their dtype, bit for bit."""
        if not self.has_master:
            return 0
        wrong = torch.zeros((), dtype=torch.int64, device=self.context.device)
        for param, weight in zip(self.rows["param"], self.rows["weight"]):
            wrong += (param.view(torch.int16) != weight.to(self.dtype).view(torch.int16)).sum()
        return int(wrong)

    def partials(self, columns: int, every: bool = True) -> Tensor:
        """Poisoned scratch memory for the chunk sums of a kernel."""
        count = self.set.chunks(every=every).count
        return torch.full((count, columns), math.nan, device=self.context.device)

    def enter(self, **entries: float) -> None:
        """Writes ledger entries by name."""
        for name, value in entries.items():
            self.ledger[INDEX[name]] = value

    def copies(self, *names: str) -> list[Tensor]:
        """Copies of all tensors of some roles, for comparing later."""
        return [tensor.clone() for name in names for tensor in self.rows[name]]

    def everything(self) -> list[Tensor]:
        """All that a kernel may write, for comparing bit for bit."""
        tensors = [tensor for name in ("param", "weight", *STATE) for tensor in self.rows[name]]
        small = [self.steps, self.ledger, self.memory, self.sums, self.products]
        return [*tensors, *small]


def different_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> int:
    """How many elements differ in any bit; a NaN equals the same NaN."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    count = 0
    for a, b in zip(left, right, strict=True):
        kind = integers[a.element_size()]
        count += int((a.contiguous().view(kind) != b.contiguous().view(kind)).sum())
    return count


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖actual - expected‖ / ‖expected‖ over a list of tensors, in FP64; NaN stays NaN."""
    pairs = list(zip(actual, expected, strict=True))
    wrong = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    size = sum(float(b.double().square().sum()) for _, b in pairs)
    return math.sqrt(wrong) / math.sqrt(size) if size else math.sqrt(wrong)


class Launches:
    """Stands in for the package's kernels, and notes their launches and resources."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.resources: dict[str, dict[str, int]] = {}

    @contextlib.contextmanager
    def counted(self) -> Iterator[Launches]:
        """Notes every launch inside the block."""
        originals: list[tuple[ModuleType, str, Any]] = []
        for module in MODULES:
            for name in dir(module):
                if name.endswith("_kernel"):
                    originals.append((module, name, getattr(module, name)))
                    setattr(module, name, _Counted(getattr(module, name), name, self))
        try:
            yield self
        finally:
            for module, name, kernel in originals:
                setattr(module, name, kernel)


class _Counted:
    def __init__(self, kernel: Any, name: str, launches: Launches) -> None:
        self._kernel, self._name, self._launches = kernel, name, launches

    def __getitem__(self, programs: Any) -> Any:
        launch = self._kernel[programs]

        def noted(*args: Any, **options: Any) -> Any:
            self._launches.names.append(self._name)
            compiled = launch(*args, **options)
            # Attributes of Triton's compiled kernel that are no public interface.
            found = {key: getattr(compiled, key, None) for key in ("n_regs", "n_spills")}
            if all(isinstance(value, int) for value in found.values()):
                resources = self._launches.resources.setdefault(self._name, {})
                for key, value in found.items():
                    resources[key] = max(resources.get(key, 0), value or 0)
            return compiled

        return noted
