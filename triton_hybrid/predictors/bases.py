"""When the matrices under a quasi-Newton move get other bases (``kernels/bases.py``).

They get their first ones as soon as the pairs make the metric, and new ones every `RENEWED` pairs:
bases that are set once are worth nothing on two of three equations, for what is curved moves on
(EXPERIMENTS 25). Where the pairs are dropped, so are the bases.

None are made where the host must not ask the device (``capturable=True``), where FSDP1 has cut
parameters, and of parameters that are no matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from triton_hybrid.flat_shards import handle_of
from triton_hybrid.kernels.bases import Bases, Matrix, sides_of
from triton_hybrid.kernels.scalars import HYPER
from triton_hybrid.kernels.trial import LEAST_PAIRS, TRIAL
from triton_hybrid.shards import is_dtensor, part_of, whole_of
from triton_hybrid.state import SQUARES, Batch, Home, StateRow

if TYPE_CHECKING:
    from triton_hybrid.engine import Engine

TURNED = TRIAL.index("turned")
RENEWED = 10
"""Pairs after which the bases are renewed. On three equations (seeds 80 to 82) evaluations to
AdamW's lowest loss were 2.9 times fewer with 3 pairs, 3.8 with 5, 10 and 20, 2.4 without bases."""
BASES = (
    StateRow("left_basis", shape=SQUARES, home=Home.HOST, when=lambda plan: plan.pairs),
    StateRow("right_basis", shape=SQUARES, home=Home.HOST, when=lambda plan: plan.pairs),
)
"""Orthogonal, ``[m, m]`` and ``[n, n]`` for a matrix of m rows and n columns."""


class Passes:
    """The passes of a quasi-Newton move over batches, in bases where there are some.

    Args:
        engine: Whose batches have the rows of the pairs, or do not have them yet.
        history: Pairs that are kept.

    Attributes:
        allowed: Whether there are bases, on this rank or on others.
    """

    def __init__(self, engine: Engine, history: int) -> None:
        self._engine, self._history = engine, history
        self._bases: dict[Batch, Bases] = {}
        self._stand = False  # whether the pairs are kept in them
        self._known: dict[Batch, Any] = {}  # what `products` has found for `move`
        self._decays: dict[Batch, Tensor] = {}  # slopes along the weight decay
        self.allowed = not engine.settings.capturable and not any(
            handle_of(whole) for batch in engine.batches for whole in batch.wholes
        )
        self._away = engine.config.offload != "none"  # bases and twins, between the moves
        self._fresh = False  # whether bases were made that were not in the state
        noting = [b for b in engine.batches if b.tensors.has("last_gradient") and not b.aliased]
        found = {batch: self._matrices(batch) for batch in noting if self.allowed}
        if engine.reduce is None and not any(found.values()):
            self.allowed = False
        # Those without a matrix, too: the trust radius measures all moves alike, without decay.
        for batch, matrices in found.items() if self.allowed else ():
            self._bases[batch] = Bases(batch.tensors, matrices, history, self._away)

    def _matrices(self, batch: Batch) -> list[Matrix]:
        found = []
        for index, (param, member) in enumerate(zip(batch.tensors.shapes, batch.members)):
            shape, entry = member.whole.shape, batch.state[member.param]
            bases: list[Tensor | None] = []
            for row, side, here in zip(BASES, shape, sides_of(shape)):
                basis = entry.get(row.name)
                if here and (basis is None or basis.shape != (side, side)):
                    dtype = batch.tensors.dtype["weight"]
                    device = torch.device("cpu") if self._away else param.device
                    basis = torch.eye(side, dtype=dtype, device=device)
                    entry[row.name], self._fresh = basis, True
                bases.append(basis if here else None)
            if any(basis is not None for basis in bases):
                found.append(Matrix(index, param, bases[0], bases[1], *_gathering(member.whole)))
        return found

    def agree(self) -> bool:
        """Whether pairs in bases can be read, on every rank."""
        engine, here = self._engine, float(self._fresh or not self.allowed)
        incomplete = torch.tensor([here], dtype=torch.float64, device=engine.device)
        if engine.reduce is not None:
            incomplete = engine.reduce(incomplete)
        return not bool(incomplete > 0)

    def settle(self, orders: Tensor, trial: Tensor) -> None:
        """Notes a pair, begins anew from here, places the weights, as `judge` has ordered."""
        turned, slot = False, None
        if self.allowed and bool(trial[TURNED] > 0):
            pair, restart, _, number = orders.tolist()
            turned, slot = restart > 0, int(number) if pair else None
        for batch in self._engine.batches:
            bases = self._bases.get(batch) if turned else None
            before = [] if bases is None else bases.last_gradients()
            self.place(batch, orders)
            if bases is not None:
                bases.note(before, slot)

    def place(self, batch: Batch, orders: Tensor) -> None:
        """Does what is ordered without bases."""
        engine = self._engine
        engine.backend.settle(batch.tensors, engine.scalars, orders, self._history)

    def renew(self, trial: Tensor) -> None:
        """Gives the pairs other bases, where it is time for a move to be made in them."""
        self._stand = False
        if not self.allowed:
            return
        its = dict(zip(TRIAL, trial.tolist()))
        self._stand = its["turned"] > 0
        enough = its["pairs"] >= LEAST_PAIRS.value and its["ready"] > 0
        if not enough or 0 < its["turned"] <= RENEWED:
            return
        newest = int(its["slot"]) - 1
        slots = [(newest - back) % self._history for back in range(int(its["pairs"]))]
        for bases in self._bases.values():
            if not self._stand:
                bases.begin()
            bases.renew(slots)
        trial[TURNED], self._stand = 1.0, True

    def products(self, batch: Batch, trial: Tensor, out: Tensor) -> None:
        """Adds the inner products of a batch to others."""
        engine, bases = self._engine, self._bases.get(batch) if self._stand else None
        if bases is None:
            tensors = batch.tensors
        else:
            decay = HYPER["weight_decay"]
            bases.see(weights=any(row[decay] for row in engine.hyperparameters))
            tensors, before = bases.twin, out[-1].clone()
        self._known[batch] = engine.backend.products(
            tensors, engine.scalars, trial, out, self._history
        )
        if bases is not None:
            self._decays[batch] = out[-1] - before

    def move(self, batch: Batch, trial: Tensor, solution: Tensor) -> None:
        """Makes the move of a batch; measures it in the scalars' sums."""
        engine, bases = self._engine, self._bases.get(batch) if self._stand else None
        scalars, known = engine.scalars, self._known.pop(batch)
        if bases is None:
            engine.backend.move(batch.tensors, scalars, trial, solution, self._history, known)
            return
        bases.clear()
        engine.backend.move(bases.twin, scalars, trial, solution, self._history, known)
        bases.bring_back()
        engine.backend.shift(batch.tensors, scalars, solution)
        bases.end()
        # The twin's weights, and so the decay of its move, were 0.
        scalars.sums[batch.tensors.place][0, 0] -= solution[2] * self._decays.pop(batch)


def _gathering(param: Any) -> tuple[Callable[[Tensor], Tensor], ...]:
    """How to make a matrix of the parts that ranks hold, and to cut out this rank's."""
    if not is_dtensor(param):
        return ()

    return partial(whole_of, param=param), lambda matrix: part_of(matrix.contiguous(), param)
