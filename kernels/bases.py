"""Matrices in the eigenbases of their gradients, in which a quasi-Newton move works on them.

A metric is diagonal in some basis. That of a matrix is taken to be diagonal in the eigenvectors of
ΣGGᵀ and ΣGᵀG, G being the gradients that the pairs remember (``pairs.py``), as Adam's is in SOAP
(Vyas et al., 2024). In bases L and R a matrix X is LᵀXR; inner products stay what they are.

Pairs and ``last_gradient`` are kept in the bases. The passes over them need not know: they work on
a *twin* of the tensor set, whose rows are seen in the bases, and whose weights begin at 0, so that
a move leaves its displacement there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton_hybrid.kernels.multi_tensor import TensorSet

LARGEST_SIDE = 1024
"""Longer sides keep the basis that they have. Eigenvectors take a core of a CPU 0.2 ms for a side
of 64, 6 for 256, 36 for 512, 290 for 1,024, and that every ten moves."""
NOISE = 4.0
"""So many roundings of a matrix's norm are no gradient: in a direction that never had one, rounding
would be measured by rounding, and move the weights as far as a gradient does."""
AT_ONCE = 1 << 20
"""Elements of rows that are turned together: small ones cost operations, large ones memory."""


def _as_it_is(matrix: Tensor) -> Tensor:
    return matrix


@dataclass(frozen=True)
class Matrix:
    """A matrix of a tensor set, and its bases: orthogonal, changed in place.

    Attributes:
        index: Its place in the set.
        like: Has shape and strides of what of it lies in the set.
        left: ``[m, m]``, or None.
        right: ``[n, n]``, or None.
        whole: Makes the whole matrix of a part of it, which the set has; other processes call it,
            too.
        part: Cuts it out again.
    """

    index: int
    like: Tensor
    left: Tensor | None
    right: Tensor | None
    whole: Callable[[Tensor], Tensor] = _as_it_is
    part: Callable[[Tensor], Tensor] = _as_it_is

    def of(self, row: Tensor) -> Tensor:
        """The matrix, or its part, in a dense view."""
        return row.as_strided(self.like.shape, self.like.stride())

    def seen(self, its: Tensor, gradient: bool = False) -> Tensor:
        """A matrix, or its part, in the bases."""
        found = turned(self.whole(its), self.left, self.right)
        return self.part(without_noise(found) if gradient else found)

    def back(self, its: Tensor) -> Tensor:
        """The inverse of `seen`."""
        left = None if self.left is None else self.left.T
        right = None if self.right is None else self.right.T
        return self.part(turned(self.whole(its), left, right))


def turned(its: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """LᵀXR of each matrix X, ``[..., m, n]``, rounded to its dtype."""
    # On a GPU in FP64: TF32, which is the user's to allow, would take three digits away.
    found = its if its.device.type == "cpu" else its.double()
    if left is not None:
        found = left.to(found).T @ found
    if right is not None:
        found = found @ right.to(found)
    return found.to(its.dtype)


def without_noise(its: Tensor) -> Tensor:
    """Matrices ``[..., m, n]`` of which what is mere rounding becomes 0, in place."""
    norm = torch.linalg.vector_norm(its, dim=(-2, -1), keepdim=True)
    return its.masked_fill_(its.abs() < NOISE * torch.finfo(its.dtype).eps * norm, 0.0)


def sides_of(shape: Sequence[int]) -> tuple[bool, bool]:
    """Whether a parameter of a shape has bases of its rows, and of its columns.

    A single row or column, and a vector, has none: with them regression and Poisson (seeds 80 to
    82) took 1.1 and 1.2 times as many evaluations.
    """
    if len(shape) != 2 or min(shape) < 2:
        return False, False
    rows, columns = (side <= LARGEST_SIDE for side in shape)
    return rows, columns


class Bases:
    """The matrices of a tensor set, and its twin.

    The twin takes a row like the parameters, and another one for the matrices.

    Args:
        tensors: With rows for so many pairs. It gets a row ``displacement``.
        matrices: Those that have bases.
        history: Pairs that are kept.
        transient: Whether the twin is made anew for each move, so that its memory is free between.
    """

    def __init__(
        self,
        tensors: TensorSet,
        matrices: Sequence[Matrix],
        history: int,
        transient: bool = False,
    ) -> None:
        self.tensors, self.matrices, self._transient = tensors, matrices, transient
        self._moves = [f"move_{slot}" for slot in range(history)]
        self._changes = [f"change_{slot}" for slot in range(history)]
        # Offloaded rows come to another place each time.
        self._brought: dict[str, Sequence[Tensor]] = {}
        self._views: dict[tuple[bool, str], tuple[Sequence[Tensor], list[Tensor]]] = {}
        self._twin: TensorSet | None = None
        if not transient:
            self._twin = self._made()

    @property
    def twin(self) -> TensorSet:
        """What `products` and `move` work on, between `see` and `bring_back`."""
        self._twin = self._twin or self._made()
        return self._twin

    def _made(self) -> TensorSet:
        tensors = self.tensors
        dtype = tensors.dtype["weight"]
        moved = [torch.zeros_like(param, dtype=dtype) for param in tensors.shapes]
        tensors.set_row("displacement", moved)
        matrices = {matrix.index for matrix in self.matrices}
        longest = max((tensors.lengths[index] for index in matrices), default=0)
        ones = torch.ones(longest, dtype=dtype, device=tensors.device)
        rows = {"param": list(tensors.flat["displacement"]), "exp_avg": [], "exp_avg_sq": []}
        for index, length in enumerate(tensors.lengths):
            average, square = (tensors.flat[name][index] for name in ("exp_avg", "exp_avg_sq"))
            turned = index in matrices
            rows["exp_avg"].append(torch.zeros_like(average) if turned else average)
            # Read where no gradient was other than 0, which then moves nothing.
            rows["exp_avg_sq"].append(ones[:length] if turned else square)
        groups = tensors.group.tolist()
        twin = TensorSet(rows, tensors.tiling, groups=groups, rule=tensors.rule)
        twin.steps, twin.place = tensors.steps, tensors.place
        return twin

    def end(self) -> None:
        """Frees what need not last until the next move."""
        if self._transient:
            self._twin = None
            self.tensors.release("displacement")
            self._brought.clear()
            self._views.clear()

    def _of(self, name: str, twin: bool = False) -> list[Tensor]:
        """What the matrices have of a row, ``[m, n]`` each."""
        flat = (self.twin if twin else self.tensors).flat[name]
        known, views = self._views.get((twin, name), (None, []))
        if known is not flat:
            views = [matrix.of(flat[matrix.index]) for matrix in self.matrices]
            self._views[twin, name] = flat, views
        return views

    def last_gradients(self) -> list[Tensor]:
        """Copies of those of the matrices, for `note`."""
        return [last.clone() for last in self._of("last_gradient")]

    def note(self, before: Sequence[Tensor], slot: int | None) -> None:
        """Brings what `settle` has noted of the matrices into the bases.

        Args:
            before: `last_gradients` before it.
            slot: That of the pair that it noted, or None.
        """
        news = self._of("last_gradient")
        for place, (matrix, last, old) in enumerate(zip(self.matrices, news, before)):
            if not self.tensors.present[matrix.index]:
                continue  # all of it is 0
            last.copy_(matrix.seen(last, gradient=True))
            if slot is not None:
                move = self._of(self._moves[slot])[place]
                move.copy_(matrix.seen(move))
                torch.sub(last, old, out=self._of(self._changes[slot])[place])

    def see(self, weights: bool) -> None:
        """Brings what `products` reads into the twin; weights only where they decay."""
        tensors, twin = self.tensors, self.twin
        for name in ("last_gradient", *self._moves, *self._changes):
            if self._brought.get(name) is not tensors.flat[name]:
                twin.set_row(name, tensors.flat[name])
                self._brought[name] = tensors.flat[name]
        averages = zip(self.matrices, self._of("exp_avg"), self._of("exp_avg", twin=True))
        for matrix, average, seen in averages:
            seen.copy_(matrix.seen(average))
        if not weights:
            return self.clear()
        torch._foreach_copy_([*twin.flat["weight"]], weights_of(tensors))
        for matrix, weight in zip(self.matrices, self._of("weight", twin=True)):
            weight.copy_(matrix.seen(weight))

    def clear(self) -> None:
        """Lets the twin's weights begin at 0."""
        torch._foreach_zero_([*self.twin.flat["weight"]])

    def bring_back(self) -> None:
        """Brings the displacement that `move` has left back to where the weights are."""
        for matrix, moved in zip(self.matrices, self._of("weight", twin=True)):
            moved.copy_(matrix.back(moved))

    def begin(self) -> None:
        """Begins with the bases in which everything is before there are any."""
        for matrix in self.matrices:
            for basis in (matrix.left, matrix.right):
                if basis is not None:
                    basis.copy_(torch.eye(len(basis), dtype=basis.dtype, device=basis.device))

    def renew(self, slots: Sequence[int]) -> None:
        """Turns the bases into those of the gradients that these pairs remember, newest first."""
        for place, matrix in enumerate(self.matrices):
            left, right = map(_turn, (matrix.left, matrix.right), self._grams(place, slots))
            at_once = max(1, AT_ONCE // max(1, matrix.like.numel()))
            for names in (self._moves, ["last_gradient", *self._changes]):
                for begin in range(0, len(names), at_once):
                    rows = [self._of(name)[place] for name in names[begin : begin + at_once]]
                    new = turned(torch.stack([*map(matrix.whole, rows)]), left, right)
                    if names is not self._moves:
                        new = without_noise(new)
                    torch._foreach_copy_(rows, [*map(matrix.part, new)])

    def _grams(self, place: int, slots: Sequence[int]) -> list[Tensor | None]:
        """ΣGGᵀ and ΣGᵀG of a matrix, FP64, of those sides that have a basis."""
        matrix, rows = self.matrices[place], ["last_gradient", *(self._changes[n] for n in slots)]
        wide: Any = {"dtype": torch.float64, "device": matrix.like.device}
        grams = [
            None if basis is None else torch.zeros(basis.shape, **wide)
            for basis in (matrix.left, matrix.right)
        ]
        # One gradient at a time: of an embedding all of them would take 100 bytes a parameter.
        g = torch.zeros((), **wide)
        for name in rows:
            its = matrix.whole(self._of(name)[place])
            g = its.double() if name == rows[0] else g - its
            for gram, along in zip(grams, (g, g.T)):
                if gram is not None:
                    gram.addmm_(along, along.T)
        return grams


def _turn(basis: Tensor | None, gram: Tensor | None) -> Tensor | None:
    """Turns a basis on into the eigenvectors of a matrix that is seen in it; returns the turn."""
    if basis is None or gram is None:
        return None
    # On the host, which waits for none of the many small steps that they take.
    known = gram.cpu()
    if not bool(known.isfinite().all()):  # squares that FP64 has no room for
        known = torch.eye(len(known), dtype=known.dtype, device="cpu")
    turn: Tensor = torch.linalg.eigh(known).eigenvectors.to(gram.device)
    basis.copy_(_orthogonal(basis.to(turn) @ turn))
    return turn.to(basis.dtype)


def _orthogonal(matrix: Tensor) -> Tensor:
    """A matrix that is orthogonal but for rounding, without it: else it would add up."""
    return 1.5 * matrix - 0.5 * matrix @ (matrix.T @ matrix)


def weights_of(tensors: TensorSet) -> list[Tensor]:
    """The weights of all tensors in the dtype of the mathematics, 1-D; views where that can be."""
    kept = tensors.flat.get("weight", ())
    if kept and not tensors.has_master:
        return [*kept]
    return [tensors.weight(index, slice(None)) for index in range(len(tensors))]
