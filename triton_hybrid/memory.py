r"""Where state lives: one place for each parameter's tensors, made at the first step.

``optimizer.state[p]`` holds, for every parameter, ready for checkpoints:

    step           FP32, 0-dim      applied base updates
    exp_avg        like p           first moment (FP32; FP64 for FP64 parameters)
    exp_avg_sq     like p           second moment             not in a Muon group
    master         like p, FP32     only behind 16-bit parameters (master_weights="auto")
    remainder      like p, int16    what BF16 parameters lack of it (master_weights="split")
    slow_ema       like p           slow gradient EMA         \
    weight_ema     like p           average of the last weights (slow_ema, auto; not Muon)
    snapshot       like p           weights before the move    } unless predictor="none"
    prediction     FP32 [3]         horizon factor, slope, step fraction  /
    history_<j>    like p           cycle displacements       \
    gram           FP64 [n, n]      their inner products       } trajectory models
    coefficients   FP32 [n]         of the next displacement   |
    regression     FP64 [2]         least squares of `linear` /

The small ones are views into one tensor for all parameters, so that one launch reaches them.
Muon groups have scratch memory besides, which no checkpoint needs: the orthogonalised momentum
and (``predictor="slow_ema"``) slow EMA, in BF16 like p each, and what the products need at a
time (``kernels/matrices.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.base.muon import MatrixSettings
from triton_hybrid.kernels.adamw import Workspace
from triton_hybrid.kernels.chunks import OWN, SPLIT, TensorSet, Tiling, assembled
from triton_hybrid.kernels.divergence import FRACTION_COLUMN, HORIZON_COLUMN, MEMORY_COLUMNS
from triton_hybrid.kernels.matrices import MatrixSet
from triton_hybrid.offload import Offload, moves
from triton_hybrid.precision import (
    adopt_parameter,
    kept_as,
    loaded_master,
    loaded_remainder,
    needs_master,
    new_master,
    state_dtype,
)
from triton_hybrid.state_rows import (
    DEVICE,
    Row,
    buffer_like,
    home_of,
    kind_of,
    lives_on_host,
)

State = dict[Tensor, dict[str, Any]]


class ParameterSet:
    """The parameters of one dtype and base rule with their state, bound for launches.

    Args:
        params: Parameters of one dtype on one device.
        groups: For each, the index of its parameter group.
        state: The optimizer's state; missing entries are created, others are kept.
        predicts: Whether any dynamics model is in use.
        level: Whether the slow EMA's model is, which needs the average of the weights.
        steered: Whether the slow EMA moves matrices of Muon too.
        history: Cycle displacements to keep; 0 for none.
        memory: FP32 ``[len(params), 3]``: this set's part of the per-tensor memory.
        muon: For each, how it is orthogonalised; None for a set of AdamW.
        offload: As in HybridConfig: where state lives that AdamW does not have.
        masters: As in HybridOptimizer: how FP32 masters are kept.
        tiling: Overrides the device's default tiling.
    """

    def __init__(
        self,
        params: list[Tensor],
        groups: list[int],
        state: State,
        *,
        predicts: bool,
        level: bool,
        steered: bool,
        history: int,
        memory: Tensor,
        muon: Sequence[MatrixSettings] | None = None,
        offload: str = "none",
        masters: str = "auto",
        tiling: Tiling | None = None,
    ) -> None:
        self.params = params
        self.history = history
        self.memory = memory
        self._state = state
        self._moves = moves(offload, params[0].device)
        self._pinned = offload == "pinned"
        device, count = params[0].device, len(params)
        self.group = torch.tensor(groups, dtype=torch.int32).to(device)
        self.steps = torch.zeros(count, dtype=torch.float32, device=device)
        self._adopt("step", self.steps)
        rows: dict[str, list[Tensor]] = {"param": params}
        rows["exp_avg"] = self._like("exp_avg")
        if muon is None:
            rows["exp_avg_sq"] = self._like("exp_avg_sq")
        self.masters: list[Tensor] = []
        kept = kept_as(masters, params[0].dtype)
        if kept == SPLIT:
            rows["remainder"] = [self._remainder(param) for param in params]
        elif kept == OWN and needs_master(params[0]):
            self.masters = [self._master(param) for param in params]
            rows["weight"] = self.masters
        for param in params:
            for key in {OWN: ("remainder",), SPLIT: ("master",)}.get(kept, ("master", "remainder")):
                state[param].pop(key, None)
        self.gram: Tensor | None = None
        self.coefficients: Tensor | None = None
        self.regression: Tensor | None = None
        if predicts:
            rows["slow_ema"] = self._like("slow_ema")
            if level and muon is None:
                starts = self.masters or params
                if kept == SPLIT:
                    pairs = zip(params, rows["remainder"])
                    starts = [assembled(p.detach(), remainder) for p, remainder in pairs]
                rows["weight_ema"] = self._like("weight_ema", starts)
            rows["snapshot"] = self._like("snapshot")
            self._adopt("prediction", memory)
        if history:
            for j in range(history):
                rows[f"history_{j}"] = self._like(f"history_{j}")
            self.gram = torch.zeros(count, history, history, dtype=torch.float64, device=device)
            self.regression = torch.zeros(count, 2, dtype=torch.float64, device=device)
            self.coefficients = torch.zeros(count, history, device=device)
            self._adopt("gram", self.gram)
            self._adopt("regression", self.regression)
            self._adopt("coefficients", self.coefficients)
        if muon is not None:
            for name in ("update", "direction") if predicts and steered else ("update",):
                rows[name] = [
                    torch.zeros_like(p, dtype=muon[0].dtype, memory_format=torch.preserve_format)
                    for p in params
                ]
        moving = {name: rows[name] for name in rows if self._moves and kind_of(name)}
        away = {name: rows.pop(name) for name in moving if home_of(name) != DEVICE}
        self.tensors = TensorSet(rows, tiling, kept)
        for name, tensors in away.items():
            self.tensors.announce(name, tensors[0].dtype)
        self.moving = [Row(name, self.tensors, params, tensors) for name, tensors in moving.items()]
        self.matrices: MatrixSet | None = None
        if muon is not None:
            self.matrices = MatrixSet(
                self.tensors,
                [settings.grid for settings in muon],
                [settings.coefficients for settings in muon],
                [settings.scale for settings in muon],
            )
        self.partials = torch.empty(0, dtype=torch.float32, device=device)

    def _like(self, key: str, start: Sequence[Tensor] | None = None) -> list[Tensor]:
        """One tensor of state for each parameter, in the parameter's memory order.

        Args:
            key: Its name.
            start: What a new one begins as; None for zeros.
        """
        if self._moves and lives_on_host(key):
            dtype = state_dtype(self.params[0])
            result = buffer_like(self.params, dtype, torch.device("cpu"), self._pinned)
        else:
            result = [self._present_or_new(key, param) for param in self.params]
        for index, (param, tensor) in enumerate(zip(self.params, result)):
            entry = self._state[param]
            loaded = entry.get(key)
            if isinstance(loaded, Tensor) and loaded.shape == param.shape:
                if loaded is not tensor:
                    tensor.copy_(loaded)
            elif start is not None:
                tensor.copy_(start[index].detach())
            else:
                tensor.zero_()
            entry[key] = tensor
        return result

    def _present_or_new(self, key: str, param: Tensor) -> Tensor:
        """The tensor of state that is there, if the kernels can use it; else a new one."""
        dtype = state_dtype(param)
        new = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
        present = self._state[param].get(key)
        if not isinstance(present, Tensor) or present.shape != param.shape:
            return new
        suits = present.stride() == new.stride() and present.dtype == dtype
        return present if suits and present.device == param.device else new

    def _master(self, param: Tensor) -> Tensor:
        entry = self._state[param]
        loaded = loaded_master(param, entry)
        master = new_master(param)
        if loaded is not None:
            master.copy_(loaded)
            adopt_parameter(param, master)
        entry["master"] = master
        return master

    def _remainder(self, param: Tensor) -> Tensor:
        remainder = loaded_remainder(param, self._state[param])
        self._state[param]["remainder"] = remainder
        return remainder

    def _adopt(self, key: str, whole: Tensor) -> None:
        """Makes ``state[p][key]`` a view into ``whole``, keeping a loaded value."""
        for view, param in zip(whole.unbind(), self.params):
            loaded = self._state[param].get(key)
            if loaded is not None:
                loaded = torch.as_tensor(loaded)
                if loaded.shape == view.shape:
                    view.copy_(loaded)
            self._state[param][key] = view

    def adopt(self, index: int) -> None:
        """Takes over what somebody else wrote into a parameter between two steps."""
        param = self.params[index]
        if self.masters:
            adopt_parameter(param, self.masters[index])
        remainder = self._state[param].get("remainder")
        if remainder is not None:
            # Which elements were written is not known: all are what the parameter says.
            remainder.zero_()
        level = self._state[param].get("weight_ema")
        if level is not None:
            # The average of weights that are gone would pull the new ones back to them.
            level.copy_((self.masters or self.params)[index])

    @property
    def still(self) -> bool:
        """Whether predictions along the slow EMA leave these weights where they are."""
        return self.matrices is not None and not self.matrices.steered

    def keep_snapshot(self) -> None:
        """Keeps the weights as they are, for a set that the coming prediction leaves still."""
        for index, snapshot in enumerate(self.tensors.flat["snapshot"]):
            for part in self.tensors.reference_blocks(index):
                snapshot[part].copy_(self.tensors.weight(index, part))

    def room_for(self, columns: int) -> Tensor:
        """Scratch for the chunk sums of a kernel: FP32 ``[chunks, columns]``."""
        needed = self.tensors.chunks(every=True).count * columns
        if self.partials.numel() < needed:
            self.partials = torch.empty(needed, dtype=torch.float32, device=self.steps.device)
        return self.partials[:needed]


class StateMemory:
    """All state on the device: parameter sets, the ledger's companions, scratch.

    Args:
        params: Every parameter that may get a gradient, with its group's index.
        state: The optimizer's state.
        predicts: Whether any dynamics model is in use.
        level: Whether the slow EMA's model is.
        steered: Whether the slow EMA moves matrices of Muon too.
        history: Cycle displacements to keep; 0 for none.
        muon: How the parameters of Muon groups are orthogonalised.
        offload: As in HybridConfig.
        lends: Whether the moments leave the device in long stretches of predictions.
        masters: As in HybridOptimizer.
        tiling: Overrides the device's default tiling.

    Raises:
        NotImplementedError: Parameters on several devices.
    """

    def __init__(
        self,
        params: Sequence[tuple[Tensor, int]],
        state: State,
        *,
        predicts: bool,
        level: bool,
        steered: bool,
        history: int,
        muon: Mapping[Tensor, MatrixSettings] | None = None,
        offload: str = "none",
        lends: bool = False,
        masters: str = "auto",
        tiling: Tiling | None = None,
    ) -> None:
        muon = muon or {}
        devices = sorted({str(param.device) for param, _ in params})
        if len(devices) > 1:
            raise NotImplementedError(f"parameters on several devices ({', '.join(devices)})")
        self.device = params[0][0].device
        # By dtype and base rule; matrices of one set also share the dtype of their products.
        alike: dict[tuple[torch.dtype, torch.dtype | None], list[tuple[Tensor, int]]] = {}
        for param, group in params:
            key = (param.dtype, muon[param].dtype if param in muon else None)
            alike.setdefault(key, []).append((param, group))
        count = len(params)
        columns = MEMORY_COLUMNS.value
        self.per_tensor = torch.zeros(count, columns, dtype=torch.float32, device=self.device)
        self.per_tensor[:, HORIZON_COLUMN.value] = 1.0
        self.per_tensor[:, FRACTION_COLUMN.value] = 1.0
        self.sums = torch.zeros(count, columns, dtype=torch.float64, device=self.device)
        self.sets: list[ParameterSet] = []
        self.parts: list[slice] = []
        begin = 0
        for (_, products), members in alike.items():
            part = slice(begin, begin + len(members))
            begin = part.stop
            bound = ParameterSet(
                [param for param, _ in members],
                [group for _, group in members],
                state,
                predicts=predicts,
                level=level,
                steered=steered,
                history=history,
                memory=self.per_tensor[part],
                muon=None if products is None else [muon[param] for param, _ in members],
                offload=offload,
                masters=masters,
                tiling=tiling,
            )
            if predicts:
                bound.room_for(max(columns, history))
            self.sets.append(bound)
            self.parts.append(part)
        moving = [row for bound in self.sets for row in bound.moving]
        self.offload = Offload(moving, state, self.device, offload == "pinned", lends)
        self.workspace = Workspace([bound.tensors for bound in self.sets])
        self.params = [param for bound in self.sets for param in bound.params]

    def take_gradients(self) -> bool:
        """Reads ``.grad`` of every parameter; False when there is none at all.

        Raises:
            RuntimeError: A sparse gradient.
        """
        found = False
        for bound in self.sets:
            grads = [param.grad for param in bound.params]
            here = [grad for grad in grads if grad is not None]
            if any(grad.is_sparse for grad in here):
                raise RuntimeError("HybridOptimizer does not support sparse gradients")
            found = found or bool(here)
            dtypes = {grad.dtype for grad in here}
            if len(dtypes) > 1:
                grads = [None if grad is None else grad.float() for grad in grads]
            bound.tensors.set_row("grad", grads)
        return found

    def release_gradients(self) -> None:
        """Lets go of the gradients, so that ``zero_grad`` really frees them."""
        for bound in self.sets:
            bound.tensors.release("grad")


def state_bytes(state: State, hosted: Callable[[str], bool]) -> tuple[int, int]:
    """Bytes of all state tensors: on the device, and offloaded to host memory.

    Args:
        state: The optimizer's state.
        hosted: Whether the state of a name is in host memory.
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
