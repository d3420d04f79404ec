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

from triton_hybrid.kernels.launch import Tiling
from triton_hybrid.kernels.ledger import PREDICTION_COLUMNS
from triton_hybrid.kernels.multi_tensor import TensorSet, assembled
from triton_hybrid.kernels.rows import OWN, SPLIT, address_row
from triton_hybrid.kernels.scalars import Scalars
from triton_hybrid.precision import (
    adopt_parameter,
    kept_as,
    loaded_master,
    loaded_remainder,
    state_dtype,
)

if TYPE_CHECKING:
    from triton_hybrid.rules.rule import Rule

State = dict[Tensor, dict[str, Any]]


class Home(enum.Enum):
    """Where a row is between the steps that touch it."""

    DEVICE = "device"
    """Always on the device."""
    LENT = "lent"
    """On the device, but for long stretches of predictions that do not read it."""
    HOST = "host"
    """In host memory, if state is offloaded."""
    SCRATCH = "scratch"
    """On the device, and lost when it leaves."""


@dataclass(frozen=True)
class StepPlan:
    """What a step does, as far as it decides which rows it touches.

    Attributes:
        gradient: Whether it is a Warmup, Full or Correct step.
        measured: Whether update and slow direction are compared.
        edge: Whether a stretch of predictions ends or may begin.
        early: Whether it is one of the early steps, in which the weight EMA serves.
        first: Whether it is the first prediction in a row.
        trajectory: Whether the predictor's basis is made of cycle displacements.
    """

    gradient: bool
    measured: bool
    edge: bool
    early: bool
    first: bool
    trajectory: bool


ZEROS, WEIGHTS = "zeros", "weights"
"""What a new row begins as."""


def _wide(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    return state_dtype(param)


_DECLARED: dict[str, StateRow] = {}


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
        saved: Whether it lies in the optimizer's state; what a step works out anew does not.
    """

    name: str
    dtype: Callable[[Tensor, Mapping[str, Any]], torch.dtype] = _wide
    init: str = ZEROS
    home: Home = Home.DEVICE
    when: Callable[[StepPlan], bool] = lambda plan: True
    shape: tuple[int, ...] | None = None
    saved: bool = True

    def __post_init__(self) -> None:
        _DECLARED[self.name] = self
        if self.shape is None:
            address_row(self.name, own_dtype=self.dtype is not _wide)

    def itemsize(self, param: torch.dtype, group: Mapping[str, Any]) -> int:
        """Bytes for each element of a parameter of a dtype; 0 for a small row."""
        if self.shape is not None:
            return 0
        return self.dtype(torch.empty(0, dtype=param), group).itemsize


def at_home_on_host(name: str) -> bool:
    """Whether the row of a name lives in host memory when state is offloaded."""
    return name in _DECLARED and _DECLARED[name].home is Home.HOST


def fixed(dtype: torch.dtype) -> Callable[[Tensor, Mapping[str, Any]], torch.dtype]:
    """A row's dtype where it is the same for every parameter."""
    return lambda param, group: dtype


STEP = StateRow("step", fixed(torch.float32), shape=())
"""Applied base updates."""
MASTER = StateRow("master", fixed(torch.float32), init=WEIGHTS)
"""FP32 weights behind 16-bit parameters (``master_weights="auto"``)."""
REMAINDER = StateRow("remainder", fixed(torch.int16))
"""What BF16 parameters lack of them (``master_weights="split"``)."""
SNAPSHOT = StateRow("snapshot", home=Home.HOST, when=lambda plan: plan.edge or not plan.gradient)
"""Weights before the move."""
PREDICTION = StateRow("prediction", fixed(torch.float32), shape=(PREDICTION_COLUMNS.value,))
"""A tensor's factor on the horizon, slope before the move, step fraction."""


class Member(NamedTuple):
    """A parameter, its group, which group that is, and its place in the group."""

    param: Tensor
    group: Mapping[str, Any]
    group_index: int
    place: int


class Batch:
    """The parameters of one dtype and base rule with their rows, ready for launches.

    Args:
        members: Parameters of one dtype on one device.
        rows: What they keep, but for masters.
        rule: Their base rule.
        state: The optimizer's state; missing entries are created, others are kept.
        offloaded: Whether rows at home in host memory live there.
        pinned: Whether that memory is page-locked.
        masters: As in HybridOptimizer: how FP32 masters are kept.
        tiling: Overrides the device's default tiling.

    Attributes:
        tensors: The rows, as the kernels take them.
        travelling: Rows that move between host memory and the device, with their tensors at home
            (of scratch only the dtype matters).
        tables: Name of a small row to its tensor for the whole batch.
    """

    def __init__(
        self,
        members: Sequence[Member],
        rows: Sequence[StateRow],
        rule: Rule,
        state: State,
        *,
        offloaded: bool = False,
        pinned: bool = False,
        masters: str = "auto",
        tiling: Tiling | None = None,
    ) -> None:
        self.params = [member.param for member in members]
        self.rule = rule
        self._state = state
        self._group = members[0].group
        self._rows = rows
        self._offloaded, self._pinned = offloaded, pinned
        kept = kept_as(masters, self.params[0].dtype)
        memory: dict[str, list[Tensor]] = {"param": self.params, **self._weights(kept)}
        self.masters = memory.get("weight", [])
        for row in rows:
            if row.shape is None:
                memory[row.name] = self._allocate(row, memory)
        self.travelling = [
            (row, memory[row.name])
            for row in rows
            if offloaded and row.shape is None and row.home is not Home.DEVICE
        ]
        away = {
            row: memory.pop(row.name) for row, _ in self.travelling if row.home is not Home.LENT
        }
        groups = [member.group_index for member in members]
        self.tensors = TensorSet(memory, tiling, kept, groups, rule.kernels)
        for row, tensors in away.items():
            self.tensors.announce(row.name, tensors[0].dtype)
        if rule.bind is not None:
            rule.bind(self.tensors, members)
        self.tables: dict[str, Tensor] = {}

    def adopt_tables(self, scalars: Scalars) -> None:
        """Makes the small rows of every parameter views, keeping loaded values."""
        made = {
            STEP.name: self.tensors.steps,
            PREDICTION.name: scalars.prediction[self.tensors.place],
        }
        for row in (STEP, *self._rows):
            if row.shape is None:
                continue
            whole = made.get(row.name)
            if whole is None:
                size = (len(self.params), *row.shape)
                dtype = row.dtype(self.params[0], self._group)
                whole = torch.zeros(size, dtype=dtype, device=self.tensors.device)
            self.tables[row.name] = whole
            for view, param in zip(whole.unbind(), self.params):
                loaded = self._state[param].get(row.name)
                if loaded is not None:
                    loaded = torch.as_tensor(loaded)
                    if loaded.shape == view.shape:
                        view.copy_(loaded)
                self._state[param][row.name] = view

    def adopt(self, index: int) -> None:
        """Takes over what somebody else wrote into a parameter between two steps."""
        param = self.params[index]
        entry = self._state[param]
        if self.masters:
            adopt_parameter(param, self.masters[index])
        if REMAINDER.name in entry:
            # Which elements were written is not known: all are what the parameter says.
            entry[REMAINDER.name].zero_()
        for row in self._rows:
            if row.init == WEIGHTS:
                # An average of weights that are gone would pull the new ones back to them.
                entry[row.name].copy_((self.masters or self.params)[index])

    def _weights(self, kept: int) -> dict[str, list[Tensor]]:
        """Masters or remainders, from a checkpoint with either; other ones are dropped."""
        found: dict[str, list[Tensor]] = {}
        if kept == SPLIT:
            found["remainder"] = [loaded_remainder(p, self._state[p]) for p in self.params]
        elif kept == OWN and state_dtype(self.params[0]) != self.params[0].dtype:
            found["weight"] = [loaded_master(p, self._state[p]) for p in self.params]
        names = {"remainder": REMAINDER.name, "weight": MASTER.name}
        for index, param in enumerate(self.params):
            for name, key in names.items():
                self._state[param].pop(key, None)
                if name in found:
                    self._state[param][key] = found[name][index]
        return found

    def _allocate(self, row: StateRow, memory: Mapping[str, list[Tensor]]) -> list[Tensor]:
        """One tensor of a row for each parameter, in the parameter's memory order."""
        dtype = row.dtype(self.params[0], self._group)
        if not row.saved:
            return [torch.zeros_like(p, dtype=dtype) for p in self.params]
        if self._offloaded and row.home is Home.HOST:
            result = buffer_like(self.params, dtype, torch.device("cpu"), self._pinned)
        else:
            result = [self._present_or_new(row.name, param, dtype) for param in self.params]
        for index, (param, tensor) in enumerate(zip(self.params, result)):
            entry = self._state[param]
            loaded = entry.get(row.name)
            if isinstance(loaded, Tensor) and loaded.shape == param.shape:
                if loaded is not tensor:
                    tensor.copy_(loaded)
            elif row.init == WEIGHTS:
                tensor.copy_(_starting_weight(index, memory))
            else:
                tensor.zero_()
            entry[row.name] = tensor
        return result

    def _present_or_new(self, key: str, param: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor of state that is there, if the kernels can use it; else a new one."""
        new = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
        present = self._state[param].get(key)
        if not isinstance(present, Tensor) or present.shape != param.shape:
            return new
        suits = present.stride() == new.stride() and present.dtype == dtype
        return present if suits and present.device == param.device else new


def _starting_weight(index: int, memory: Mapping[str, list[Tensor]]) -> Tensor:
    param = memory["param"][index].detach()
    if "remainder" in memory:
        return assembled(param, memory["remainder"][index])
    return memory["weight"][index] if "weight" in memory else param


def buffer_like(
    params: Sequence[Tensor], dtype: torch.dtype, device: torch.device, pinned: bool = False
) -> list[Tensor]:
    """One tensor for each parameter, in its shape and memory order, all views of one buffer.

    Copied as a whole, a row of state is one transfer instead of one for each tensor.

    Args:
        params: The parameters.
        dtype: Of the buffer; it is not initialised.
        device: Where it lies.
        pinned: Whether it is page-locked host memory; only where there is a GPU.
    """
    # 16-byte vectors, whatever the dtype.
    sizes = [-(-param.numel() // 8) * 8 for param in params]
    lock = pinned and device.type == "cpu" and torch.cuda.is_available()
    buffer = torch.empty(sum(sizes), dtype=dtype, device=device, pin_memory=lock)
    views, begin = [], 0
    for param, size in zip(params, sizes):
        stride = torch.empty_like(param, device="meta").stride()
        views.append(buffer.as_strided(param.shape, stride, begin))
        begin += size
    return views


def state_bytes(state: State, hosted: Callable[[str], bool]) -> tuple[int, int]:
    """Bytes of all state tensors: on the device, and offloaded to host memory.

    Args:
        state: The optimizer's state.
        hosted: Whether the row of a name is in host memory.
    """
    seen: set[int] = set()
    on_device = on_host = 0
    for entry in state.values():
        for key, value in entry.items():
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            if storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            if hosted(key):
                on_host += storage.nbytes()
            else:
                on_device += storage.nbytes()
    return on_device, on_host
