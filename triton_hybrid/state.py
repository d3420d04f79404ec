"""State: every row declared once, and batches of parameters with their rows.

A `StateRow` says all there is to say of one row of optimizer state. Allocation, checkpoints,
offload, the address table of the kernels, the byte counts of the audit and of the documentation
follow from it. Rows are declared where they belong: those of a base rule in ``rules/``, those of a
predictor in ``predictors/``, and here the ones that every optimizer has.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from triton_hybrid.kernels.layout import dense_view
from triton_hybrid.kernels.ledger import PART_COLUMN, PREDICTION_COLUMNS
from triton_hybrid.kernels.multi_tensor import TensorSet, assembled, remainder_of
from triton_hybrid.kernels.rows import NONE, OWN, SPLIT, address_row
from triton_hybrid.kernels.scalars import MOVE_COLUMNS, Scalars

if TYPE_CHECKING:
    from triton_hybrid.rules.rule import Rule

State = dict[Tensor, dict[str, Any]]
Group = Mapping[str, Any]


class Home(enum.Enum):
    """Where a row is between the steps that touch it."""

    DEVICE = "device"  # always on the device
    LENT = "lent"  # there, but for long stretches of predictions that do not read it
    HOST = "host"  # in host memory, if state is offloaded


class StepPlan(NamedTuple):
    """What a step does, as far as it decides which rows it touches."""

    gradient: bool  # is it a Warmup, Full or Correct step?
    measured: bool  # does it compare update and slow direction, for the confidence?
    edge: bool  # does a stretch of predictions end, or may one begin?
    first: bool  # is it the first prediction in a row?
    trajectory: bool  # does the predictor move along the displacements of cycles?
    pairs: bool  # does it note moves and gradient changes?
    verified: bool  # does its gradient judge a prediction, if one stands?
    followed: bool  # is it a base step that another follows, with no prediction between?

    @property
    def stands(self) -> bool:
        """Whether a prediction is in the weights before it, or may be after it."""
        return self.edge or not self.gradient


ZEROS, WEIGHTS = "zeros", "weights"
"""What a new row begins as."""
SQUARES = (0, 0)
"""Shape of rows that are square matrices, as large as a side of their parameter."""

RowDtype = Callable[[Tensor, Group], torch.dtype]


def wide(param: Tensor, group: Group) -> torch.dtype:
    """The dtype of moments and masters: FP32, or FP64 for FP64 parameters."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


DECLARED: dict[str, StateRow] = {}
"""Every row by name."""


@dataclass(frozen=True)
class StateRow:
    """One row of optimizer state.

    Attributes:
        name: Key in ``optimizer.state[p]``, and name in the kernels' address table.
        dtype: Its dtype for a parameter of a group; FP32, or FP64 for FP64 parameters.
        init: What a new one begins as: ``ZEROS`` or ``WEIGHTS``.
        home: Where it is between the steps that touch it.
        when: Whether a step reads or writes it.
        shape: Of one tensor's entry, for rows that are small; None for a row like the parameter.
            The small ones of a batch are views into one tensor, so that one launch reaches them.
            ``SQUARES`` of a matrix's sides are made by who declares them.
        saved: Whether it lies in the optimizer's state; what a step works out anew does not.
        in_place: Whether it is kept only of weights that predictions move in place: not where an
            FP32 master stands behind a 16-bit parameter.
    """

    name: str
    dtype: RowDtype = wide
    init: str = ZEROS
    home: Home = Home.DEVICE
    when: Callable[[StepPlan], bool] = lambda plan: True
    shape: tuple[int, ...] | None = None
    saved: bool = True
    in_place: bool = False

    def __post_init__(self) -> None:
        DECLARED[self.name] = self
        if self.shape is None:
            address_row(self.name, own_dtype=self.dtype is not wide)

    def itemsize(self, param: torch.dtype, group: Group) -> int:
        """Bytes for each element of a parameter of a dtype; 0 for a small row."""
        like = torch.empty(0, dtype=param, device="cpu")
        return self.dtype(like, group).itemsize if self.shape is None else 0


def fixed(dtype: torch.dtype) -> RowDtype:
    """A row's dtype where it is the same for every parameter."""
    return lambda param, group: dtype


STEP = StateRow("step", fixed(torch.float32), shape=())
"""Applied base updates."""
MASTER = StateRow("master", fixed(torch.float32), init=WEIGHTS)
"""FP32 weights behind 16-bit parameters (``master_weights="auto"``)."""
REMAINDER = StateRow("remainder", fixed(torch.int16))
"""What BF16 parameters lack of them (``master_weights="split"``)."""
SNAPSHOT = StateRow("snapshot", home=Home.HOST, when=lambda plan: plan.stands or plan.pairs)
"""Weights before the move, of a predictor whose move cannot be computed again."""
RESIDUE = StateRow(
    "residue", fixed(torch.int8), home=Home.HOST, when=lambda plan: plan.stands, in_place=True
)
"""What is lost of them, where it can (`kernels.residue`)."""
DIRECTION = StateRow("direction", home=Home.HOST, when=lambda plan: plan.stands)
"""What matrices are moved along, new with the first prediction in a row."""
MOVE = StateRow("move", fixed(torch.float64), shape=(MOVE_COLUMNS,))
"""What the displacement that stands is made of."""
PREDICTION = StateRow("prediction", fixed(torch.float32), shape=(PREDICTION_COLUMNS.value,))
"""A tensor's factor on the horizon, slope before the move, step fraction; whether it takes part;
the fingerprint of the parameter."""


def as_dense(param: Tensor) -> Tensor:
    """The parameter itself, or a dense copy of one that has gaps in memory."""
    try:
        dense_view(param.detach())
    except ValueError:
        return param.detach().clone()
    return param


def moved_again(entry: Group) -> bool:
    """Whether the displacement that stands in a parameter can be computed again."""
    move = entry.get(MOVE.name)
    return move is not None and move.shape == MOVE.shape and not bool(move[0].isnan())


class Member(NamedTuple):
    """A parameter, its group, which group that is, and its place in the group."""

    param: Tensor  # of a DTensor, this rank's part
    group: Group
    group_index: int
    place: int
    whole: Tensor  # as it is in the group
    share: float = 1.0  # one over the number of ranks that hold the same


class Batch:
    """The parameters of one dtype and base rule with their rows, ready for launches.

    Args:
        members: Parameters of one dtype on one device.
        rows: What they keep, but for masters. Of those that only weights moved in place need, none
            where there are.
        rule: Their base rule.
        state: The optimizer's state; missing entries are created, others are kept.
        offload: Where rows at home in host memory live, as in HybridConfig.
        masters: As in HybridOptimizer: how FP32 masters are kept.

    Attributes:
        tensors: The rows, as the kernels take them.
        state: That of all parameters.
        travelling: Rows that move between host memory and the device, with their tensors at home.
        wholes: The parameters as they are in the groups.
        tables: Name of a small row to its tensor for the whole batch.
        copies: Parameters with gaps in memory, and dense tensors that stand for them in a step.
        aliased: Whether its parameters share memory with others.
    """

    aliased = False

    def __init__(
        self,
        members: Sequence[Member],
        rows: Sequence[StateRow],
        rule: Rule,
        state: State,
        *,
        offload: str = "none",
        masters: str = "auto",
    ) -> None:
        self.params = [member.param for member in members]
        self.members, self.wholes = members, [member.whole for member in members]
        self.travelling: list[tuple[StateRow, list[Tensor]]] = []
        self.tables: dict[str, Tensor] = {}
        sixteen_bit = self.params[0].dtype in (torch.float16, torch.bfloat16)
        kept = {"split": SPLIT, "none": NONE}.get(masters, OWN) if sixteen_bit else OWN
        rows = [row for row in rows if not (row.in_place and sixteen_bit and kept == OWN)]
        self.state, self._group, self._rows = state, members[0].group, rows
        # Of another predictor's checkpoint; a matrix that has a direction needs no slow EMA.
        gone = {row.name for row in {SNAPSHOT, RESIDUE, DIRECTION, MOVE} - set(rows)}
        for name in gone | {"slow_ema"} if DIRECTION in rows else gone:
            for param in self.params:
                state[param].pop(name, None)
        groups = [member.group_index for member in members]
        dense = list(map(as_dense, self.params))
        self.copies = [(p, copy) for p, copy in zip(self.params, dense) if copy is not p]
        weights = {"param": dense, **self._weights(kept, sixteen_bit)}
        self.tensors = TensorSet(weights, None, kept, groups, rule.kernels)
        for row in rows:
            if row.shape is not None:
                continue
            memory, moves = self._allocate(row, offload), offload != "none"
            if moves and row.home is not Home.DEVICE:
                self.travelling.append((row, memory))
            if moves and row.home is Home.HOST:
                self.tensors.announce(row.name, memory[0].dtype)
            else:
                self.tensors.set_row(row.name, memory)
        self.tensors.share = members[0].share
        if rule.bind is not None:
            rule.bind(self.tensors, members)

    def adopt_tables(self, scalars: Scalars) -> None:
        """Makes the small rows of every parameter views of one tensor, keeping loaded values."""
        made = {
            STEP.name: self.tensors.steps,
            PREDICTION.name: scalars.prediction[self.tensors.place],
            MOVE.name: scalars.moves[self.tensors.place],
        }
        for row in (STEP, *self._rows):
            if row.shape is None or row.shape == SQUARES:
                continue
            whole = made.get(row.name)
            if whole is None:
                size, dtype = (len(self.params), *row.shape), row.dtype(self.params[0], self._group)
                whole = torch.zeros(size, dtype=dtype, device=self.tensors.device)
            self.tables[row.name] = whole
            for view, param in zip(whole.unbind(), self.params):
                value = self.state[param].get(row.name)
                if value is not None and not isinstance(value, Tensor):
                    value = torch.tensor(value, dtype=whole.dtype, device=whole.device)
                if value is not None and value.shape == view.shape:
                    view.copy_(value)
                self.state[param][row.name] = view

    def _weights(self, kept: int, sixteen_bit: bool) -> dict[str, list[Tensor]]:
        """Masters or remainders, from a checkpoint with either; other ones are dropped."""
        found: dict[str, list[Tensor]] = {}
        if kept == SPLIT:
            found["remainder"] = [load_remainder(p, self.state[p]) for p in self.params]
        elif kept == OWN and sixteen_bit:
            found["weight"] = [load_master(p, self.state[p]) for p in self.params]
        for name, key in (("weight", MASTER.name), ("remainder", REMAINDER.name)):
            for index, param in enumerate(self.params):
                self.state[param].pop(key, None)
                if name in found:
                    self.state[param][key] = found[name][index]
        return found

    def _weight(self, param: Tensor) -> Tensor:
        """The weight behind a parameter, after `_weights`."""
        entry = self.state[param]
        if REMAINDER.name in entry:
            return assembled(param.detach(), entry[REMAINDER.name])
        master: Tensor = entry.get(MASTER.name, param.detach())
        return master

    def _allocate(self, row: StateRow, offload: str) -> list[Tensor]:
        """One tensor of a row for each parameter, in the parameter's memory order."""
        dtype = row.dtype(self.params[0], self._group)
        if not row.saved:
            return [torch.zeros_like(param, dtype=dtype) for param in self.params]
        buffer: list[Tensor] | None = None
        if offload != "none" and row.home is Home.HOST:
            buffer = buffer_like(self.params, dtype, torch.device("cpu"), offload == "pinned")
        for index, param in enumerate(self.params):
            tensor = torch.empty_like(param, dtype=dtype) if buffer is None else buffer[index]
            present = loaded(row.name, param, self.state[param])
            if present is None and row.init == WEIGHTS:
                tensor.copy_(self._weight(param))
            elif present is None:
                tensor.zero_()
            elif buffer is None and _alike(present, tensor):
                tensor = present
            else:
                tensor.copy_(present)
            self.state[param][row.name] = tensor
        return [self.state[param][row.name] for param in self.params]


def _alike(left: Tensor, right: Tensor) -> bool:
    """Whether the kernels can use one in place of the other."""
    return (left.dtype, left.device, left.stride()) == (right.dtype, right.device, right.stride())


def buffer_like(
    params: Sequence[Tensor], dtype: torch.dtype, device: torch.device, pinned: bool = False
) -> list[Tensor]:
    """One tensor for each parameter, in its shape and memory order, all views of one buffer.

    Copied as a whole, a row of state is one transfer instead of one for each tensor. The buffer is
    not initialised; ``pinned`` makes host memory page-locked, where there is a GPU.
    """
    # 16-byte vectors, whatever the dtype.
    unit = max(16 // dtype.itemsize, 8)
    sizes = [-(-param.numel() // unit) * unit for param in params]
    lock = pinned and device.type == "cpu" and torch.cuda.is_available()
    buffer = torch.empty(sum(sizes), dtype=dtype, device=device, pin_memory=lock)
    views, begin = [], 0
    for param, size in zip(params, sizes):
        stride = torch.empty_like(param, device="meta").stride()
        views.append(buffer.as_strided(param.shape, stride, begin))
        begin += size
    return views


def state_bytes(state: State, hosted: Callable[[str], bool]) -> tuple[int, int]:
    """Bytes of all state tensors: on the device, and of the rows that are in host memory."""
    storages = {
        value.untyped_storage().data_ptr(): (value.untyped_storage().nbytes(), hosted(key))
        for entry in state.values()
        if isinstance(entry, dict)
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }
    on_host = sum(size for size, away in storages.values() if away)
    return sum(size for size, _ in storages.values()) - on_host, on_host


def loaded(name: str, param: Tensor, entry: Group) -> Tensor | None:
    """A tensor of a parameter's state, if it is there and has the parameter's shape."""
    value = entry.get(name)
    return value if isinstance(value, Tensor) and value.shape == param.shape else None


@torch.no_grad()
def load_master(param: Tensor, entry: Group) -> Tensor:
    """The FP32 master of a parameter, which rounded gives the parameter back.

    From a checkpoint with masters or remainders, where its elements round to the parameter's.
    """
    master, remainder = (loaded(name, param, entry) for name in ("master", "remainder"))
    fresh = param.detach().to(torch.float32, copy=True)
    if master is not None:
        fresh.copy_(master)
    elif remainder is not None:
        placed = torch.empty_like(param, dtype=torch.int16).copy_(remainder)
        fresh.copy_(assembled(param.detach(), placed))
    else:
        return fresh
    # Where a prediction may stand in the parameter alone, what others wrote is found element by
    # element when it ends (`kernels.residue`).
    prediction = entry.get(PREDICTION.name)
    if prediction is None or prediction[PART_COLUMN.value] == 0 or not moved_again(entry):
        adopt_parameter(param, fresh)
    return fresh


@torch.no_grad()
def load_remainder(param: Tensor, entry: Group) -> Tensor:
    """What a parameter lacks of its master: from a checkpoint with either of them, or zero."""
    fresh = torch.zeros_like(param, dtype=torch.int16)
    remainder = loaded("remainder", param, entry)
    if remainder is None and loaded("master", param, entry) is not None:
        remainder = remainder_of(load_master(param, entry), param.detach())
    return fresh if remainder is None else fresh.copy_(remainder)


@torch.no_grad()
def adopt_parameter(param: Tensor, master: Tensor) -> None:
    """Takes over what somebody else wrote into a parameter.

    Elements whose master still rounds to the parameter keep their master's extra bits.
    """
    kept = master.to(param.dtype) == param
    master.copy_(torch.where(kept, master, param.to(master.dtype)))
