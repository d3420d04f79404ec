"""Builders of the kernel tests: tensors in guarded memory, and problems drawn by shape.

A test draws `Spec`s (shape, memory order, misalignment, seed), never arrays. A `Problem`
lays the tensors of all roles out in one poisoned buffer; `Problem.check` then knows what
must hold after every kernel, whatever it computed: nothing was written between the tensors,
and a 16-bit parameter is its rounded master.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from triton_hybrid.kernels import adamw, correct, divergence, gram, predict, settle
from triton_hybrid.kernels.adamw import HYPER_FIELDS, Workspace
from triton_hybrid.kernels.chunks import ROWS, ChunkTable, TensorSet, Tiling
from triton_hybrid.kernels.ledger import INDEX, new_ledger, read_ledger

ONE = Tiling(block=64, chunk=128, programs=1)
"""Small enough that a few hundred elements span several chunks. One program, so that the
interpreter, which runs programs one after another, can take the cooperative launch."""
THREE = Tiling(block=64, chunk=128, programs=3)
"""The same with several programs: only for launches without a grid barrier."""

CANARY = 0xA5
GUARD = 64
"""Bytes of poison before and after each tensor."""


def fewer(examples: int = 4) -> settings:
    """Settings of a costly property: fewer examples than the profile draws."""
    return settings(max_examples=min(examples, settings().max_examples))


def more(examples: int = 40) -> settings:
    """Settings of a cheap property with many cases: more examples than the profile draws."""
    return settings(max_examples=max(examples, settings().max_examples))


# --------------------------------------------------------------------------------- memory


class Arena:
    """One poisoned buffer; tensors are views into it with canary bytes between them."""

    def __init__(self, device: torch.device, size: int = 1 << 18) -> None:
        self.buffer = torch.full((size,), CANARY, dtype=torch.uint8, device=device)
        self.owned = torch.zeros(size, dtype=torch.bool)
        self.end = GUARD

    def carve(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        order: Sequence[int] | None = None,
        shift: int = 0,
    ) -> Tensor:
        """A dense tensor, filled with NaN (integers: with -1).

        Args:
            shape: Its shape.
            dtype: Its dtype.
            order: Its dimensions from the slowest to the fastest; None for contiguous.
            shift: Elements by which it misses the next 16-byte boundary.
        """
        strides = [1] * len(shape)
        count = 1
        for dimension in reversed(order if order is not None else range(len(shape))):
            strides[dimension] = count
            count *= max(shape[dimension], 1)
        elements = math.prod(shape)
        begin = -(-self.end // 16) * 16 + shift * dtype.itemsize
        stop = begin + elements * dtype.itemsize
        self.end = stop + GUARD
        assert self.end <= len(self.buffer), "the arena is too small for this problem"
        self.owned[begin:stop] = True
        typed = self.buffer[begin % dtype.itemsize :]
        typed = typed[: len(typed) // dtype.itemsize * dtype.itemsize].view(dtype)
        offset = begin // dtype.itemsize
        tensor = typed.as_strided(tuple(shape), tuple(strides), offset)
        return tensor.fill_(math.nan if dtype.is_floating_point else -1)

    def put(self, values: Tensor) -> Tensor:
        """A contiguous copy of ``values`` inside the arena."""
        return self.carve(values.shape, values.dtype).copy_(values)

    def check(self) -> None:
        """Asserts that no byte outside the tensors was written."""
        spoiled = ((self.buffer.cpu() != CANARY) & ~self.owned).nonzero().flatten()
        assert not len(spoiled), f"bytes written outside every tensor, at {spoiled[:8].tolist()}"


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, in the order of its elements."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Asserts equality of every bit; NaN equals itself."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} against {expected.dtype}"
    if torch.equal(bits(actual), bits(expected)):
        return
    left, right = actual.detach().cpu().flatten(), expected.detach().cpu().flatten()
    rows = bits(left).view(len(left), -1) != bits(right).view(len(left), -1)
    where = rows.any(1).nonzero().flatten()
    shown = [(i, left[i].item(), right[i].item()) for i in where[:5].tolist()]
    raise AssertionError(f"{what}: {len(where)} of {len(left)} elements differ: {shown}")


def assert_near(
    actual: Tensor, expected: Tensor, what: str, rtol: float = 2e-6, atol: float = 1e-7
) -> None:
    """Asserts closeness in FP64, naming what differs."""
    torch.testing.assert_close(
        actual.detach().double().cpu(),
        expected.detach().double().cpu(),
        rtol=rtol,
        atol=atol,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def assert_ledgers_near(
    actual: Tensor, expected: Tensor, rtol: float = 1e-5, atol: float = 1e-9
) -> None:
    """Asserts that two ledgers agree, entry by entry."""
    left, right = read_ledger(actual), read_ledger(expected)
    wrong = {
        name: (left[name], right[name])
        for name in left
        if not (
            left[name] == pytest.approx(right[name], rel=rtol, abs=atol, nan_ok=True)
            or left[name] == right[name]
        )
    }
    assert not wrong, f"ledger entries differ: {wrong}"


# ------------------------------------------------------------------------------- problems


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


@st.composite
def specs(draw: st.DrawFn, groups: int = 1, absent: bool = False) -> Spec:
    """A tensor of any rank, order, alignment; empty, single, or around a chunk's end."""
    kind = draw(st.sampled_from(("vector", "vector", "matrix", "images", "odd")))
    if kind == "vector":
        shape: tuple[int, ...] = (draw(st.sampled_from(LENGTHS)),)
    elif kind == "matrix":
        shape = (draw(st.integers(1, 12)), draw(st.integers(1, 24)))
    elif kind == "images":
        shape = (2, draw(st.integers(1, 4)), 3, draw(st.integers(1, 5)))
    else:
        shape = draw(st.sampled_from(((), (0,), (1,), (3, 0), (0, 3), (1, 1, 7), (2, 0, 4))))
    dimensions = range(len(shape))
    order = tuple(draw(st.permutations(dimensions)))
    channels_last = (0, 2, 3, 1)
    if kind == "images" and draw(st.booleans()):
        order = channels_last
    same = draw(st.booleans())
    return Spec(
        shape=shape,
        order=order,
        grad_order=order if same else tuple(draw(st.permutations(dimensions))),
        shift=draw(st.sampled_from((0, 0, 1, 3))),
        seed=draw(st.integers(0, 999)),
        group=draw(st.integers(0, groups - 1)),
        step=draw(st.sampled_from((0, 1, 9, 1000))),
        present=not absent or draw(st.sampled_from((True, True, False))),
    )


def spec_lists(
    min_size: int = 1, max_size: int = 4, groups: int = 1, absent: bool = False
) -> st.SearchStrategy[list[Spec]]:
    """Lists of tensors for one launch."""
    return st.lists(specs(groups, absent), min_size=min_size, max_size=max_size)


PRECISIONS = (
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
)
"""Dtypes of parameter and gradient; the master of a 16-bit parameter is FP32."""


def precisions() -> st.SearchStrategy[tuple[torch.dtype, torch.dtype]]:
    """Dtypes of parameter and gradient."""
    return st.sampled_from(PRECISIONS)


GROUPS: tuple[dict[str, float], ...] = (
    {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 3e-3, "beta1": 0.0, "beta2": 0.5, "eps": 1e-3, "sign": -1.0, "horizon": 7.0},
    {"lr": 0.0, "beta1": 0.95, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.5},
)
"""Hyperparameters of three groups: defaults, maximising, and a learning rate of 0."""


def hyper_table(groups: Sequence[dict[str, float]]) -> Tensor:
    """The FP64 hyperparameter table of parameter groups."""
    start = {
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "sign": 1.0,
        "horizon": 3.0,
        "level": 0.5,
        "look_ahead": 1.0,
    }
    rows = []
    for group in groups:
        row = {"weight_decay": 0.0, **start, **group}
        for beta in ("beta1", "beta2"):
            row[f"log_{beta}"] = math.log(row[beta]) if row[beta] else -math.inf
        rows.append([row[name] for name in HYPER_FIELDS])
    return torch.tensor(rows, dtype=torch.float64)


def set_entries(ledger: Tensor, **values: float) -> Tensor:
    """Writes ledger entries by name."""
    for name, value in values.items():
        ledger[INDEX[name]] = value
    return ledger


STATE_ROWS = ("exp_avg", "exp_avg_sq", "slow_ema", "weight_ema", "snapshot")


class Problem:
    """Tensors of all roles in one arena, with the small tables the launchers take.

    The values of a tensor follow from its spec alone, so the same spec in another list, at
    another place or in another order means the same numbers.
    """

    def __init__(
        self,
        specs: Sequence[Spec],
        device: torch.device,
        *,
        precision: tuple[torch.dtype, torch.dtype] = PRECISIONS[0],
        tiling: Tiling = ONE,
        history: int = 0,
        groups: Sequence[dict[str, float]] = GROUPS,
    ) -> None:
        self.specs = list(specs)
        self.device, self.history, self.groups = device, history, groups
        self.arena = Arena(device)
        self.param_dtype, self.grad_dtype = precision
        wide = torch.float64 if self.param_dtype == torch.float64 else torch.float32
        names = [*STATE_ROWS, *(f"history_{j}" for j in range(history))]
        master = self.param_dtype != wide
        rows: dict[str, list[Tensor]] = {name: [] for name in ("param", "grad", "weight", *names)}
        for spec in self.specs:
            values = self._values(spec, history)
            place: dict[str, Any] = {"order": spec.order, "shift": spec.shift}
            weight = self.arena.carve(spec.shape, wide, **place).copy_(values["weight"])
            rows["weight"].append(weight)
            param = weight
            if master:
                param = self.arena.carve(spec.shape, self.param_dtype, **place).copy_(weight)
            rows["param"].append(param)
            grad = self.arena.carve(spec.shape, self.grad_dtype, spec.grad_order, spec.shift)
            rows["grad"].append(grad.copy_(values["grad"]))
            for name in names:
                state = self.arena.carve(spec.shape, wide, **place)
                rows[name].append(state.copy_(values[name]))
        self.rows = rows
        self.set = TensorSet({k: v for k, v in rows.items() if k != "grad"}, tiling)
        self.set_gradients()
        put = self.arena.put
        count = len(self.specs)
        self.group = put(torch.tensor([s.group for s in self.specs], dtype=torch.int32))
        self.steps = put(torch.tensor([float(s.step) for s in self.specs]))
        self.hyper = put(hyper_table(groups))
        self.ledger = put(new_ledger(torch.device("cpu")))
        self.memory = put(torch.tensor([[1.0, 0.0, 1.0]] * count))
        self.sums = self.arena.carve((count, 3), torch.float64)
        self.workspace = Workspace([self.set])
        self.workspace.partials = put(self.workspace.partials)
        self.workspace.arrivals = put(self.workspace.arrivals)

    @staticmethod
    def _values(spec: Spec, history: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(spec.seed)

        def normal() -> Tensor:
            return torch.randn(spec.shape, generator=generator, dtype=torch.float64)

        values = {"weight": normal(), "grad": normal(), "exp_avg": 0.5 * normal()}
        values["exp_avg_sq"] = (0.2 + normal().abs()).square()
        values["slow_ema"] = 0.3 * normal()
        values["snapshot"] = values["weight"] + 0.1 * normal()
        for j in range(history):
            values[f"history_{j}"] = 0.1 * normal()
        values["weight_ema"] = values["weight"] + 0.2 * normal()
        return values

    def set_gradients(self) -> None:
        """Gives the set its gradients anew, None where the spec says absent."""
        pairs = zip(self.rows["grad"], self.specs)
        self.set.set_row("grad", [grad if spec.present else None for grad, spec in pairs])

    def partials(self, columns: int = 3, every: bool = True) -> Tensor:
        """Poisoned scratch memory of one row a chunk, as small as a kernel may rely on."""
        return self.arena.carve((self.set.chunks(every).count, columns), torch.float32)

    def promoted(self) -> Problem:
        """The same problem in FP64: what the reference turns into an oracle."""
        other = Problem(
            self.specs,
            self.device,
            precision=(torch.float64, torch.float64),
            tiling=self.set.tiling,
            history=self.history,
            groups=self.groups,
        )
        other.copy_(self)
        return other

    def copy_(self, other: Problem) -> None:
        """Takes over the values of another problem over the same specs."""
        for name, tensors in self.rows.items():
            source = "weight" if name == "param" and not self.set.has_master else name
            for mine, theirs in zip(tensors, other.rows[source]):
                mine.copy_(theirs)
        for name in ("group", "steps", "hyper", "ledger", "memory"):
            getattr(self, name).copy_(getattr(other, name))
        self.set_gradients()

    def snapshot(self) -> dict[str, list[Tensor]]:
        """Copies of every tensor, and of the tables a kernel may write."""
        rows = {name: [t.clone() for t in tensors] for name, tensors in self.rows.items()}
        return {**rows, "steps": [self.steps.clone()], "memory": [self.memory.clone()]}

    def assert_unchanged(self, before: dict[str, list[Tensor]], *, but: Sequence[str] = ()) -> None:
        """Asserts that every byte is what it was in ``before``."""
        for name, tensors in self.snapshot().items():
            if name not in but:
                for index, (now, then) in enumerate(zip(tensors, before[name])):
                    assert_same_bits(now, then, f"{name}[{index}]")

    def check(self) -> None:
        """Asserts what holds after every kernel."""
        self.arena.check()
        for index, (param, weight) in enumerate(zip(self.rows["param"], self.rows["weight"])):
            rounded = weight.to(param.dtype)
            # A NaN is a NaN: hardware and torch give it different payloads.
            rounded = torch.where(param.isnan() & rounded.isnan(), param, rounded)
            assert_same_bits(param, rounded, f"param[{index}], rounded master")

    def assert_near(self, other: Problem, rows: Sequence[str], **tolerance: float) -> None:
        """Asserts that rows agree with those of another problem."""
        for name in rows:
            for index, (mine, theirs) in enumerate(zip(self.rows[name], other.rows[name])):
                assert_near(mine, theirs, f"{name}[{index}] {self.specs[index]}", **tolerance)

    def assert_same(self, other: Problem, indices: Sequence[int], rows: Sequence[str]) -> None:
        """Asserts that ``self[i]`` is ``other[indices[i]]`` bit for bit."""
        for name in rows:
            for mine, index in zip(self.rows[name], indices, strict=True):
                assert_same_bits(mine, other.rows[name][index], f"{name}[{index}]")


@dataclass
class FarAway:
    """Replaces a set's tables by ones whose elements begin beyond the 32-bit range.

    Every address is moved down and every offset up by the same distance, so that address
    plus offset is the real memory if, and only if, the sum is formed in 64 bits.
    """

    tensors: TensorSet
    distance: int = (1 << 31) + 4096
    tables: dict[bool, ChunkTable] = field(default_factory=dict)

    def __enter__(self) -> FarAway:
        real_tables, real_chunks = self.tensors.tables, self.tensors.chunks
        addresses, lengths, aligned = (table.clone() for table in real_tables())
        for row, name in enumerate(ROWS):
            if name in self.tensors.dtype:
                addresses[row] -= self.distance * self.tensors.dtype[name].itemsize
        lengths += self.distance

        def chunks(every: bool = False) -> ChunkTable:
            table = real_chunks(every)
            if every not in self.tables:
                moved = ChunkTable([], [], self.tensors.tiling.chunk, self.tensors.device)
                moved.__dict__.update(table.__dict__)
                moved.start = table.start + self.distance
                self.tables[every] = moved
            return self.tables[every]

        vars(self.tensors).update(tables=lambda: (addresses, lengths, aligned), chunks=chunks)
        return self

    def __exit__(self, *_: object) -> None:
        del vars(self.tensors)["tables"], vars(self.tensors)["chunks"]


# ------------------------------------------------------------------------------- launches


class Counted:
    """Stands in for a jitted kernel and counts its launches."""

    def __init__(self, kernel: Any, log: list[str], name: str) -> None:
        self.kernel, self.log, self.name = kernel, log, name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        self.log.append(self.name)
        launch: Callable[..., Any] = self.kernel[grid]
        return launch


@contextlib.contextmanager
def counted_launches(*further: Any) -> Iterator[list[str]]:
    """The names of all kernels launched inside the block, in order.

    Args:
        further: Modules whose kernels count too.
    """
    log: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (adamw, correct, divergence, gram, predict, settle, *further):
            for name in dir(module):
                if name.endswith("_kernel"):
                    patch.setattr(module, name, Counted(getattr(module, name), log, name))
        yield log
