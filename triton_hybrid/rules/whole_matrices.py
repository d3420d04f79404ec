"""Muon's matrices where the ranks hold parts of them: gathered, orthogonalised, cut again.

A part of a matrix cannot be orthogonalised by itself. Every rank moves its part of the momentum,
the parts are gathered, each matrix is orthogonalised on one rank, so that the work is spread, and
every rank takes its part of the result. In plain torch on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from triton_hybrid.flat_shards import whole_shape
from triton_hybrid.kernels.matrices import Coefficients, as_matrix
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.newton_schulz_torch import momenta_torch, newton_schulz_torch
from triton_hybrid.kernels.scalars import HYPER, Scalars
from triton_hybrid.shards import part_group, part_of, whole_of
from triton_hybrid.state import Member


class WholeMatrices:
    """The matrices of a tensor set of parts.

    Args:
        tensors: With rows ``grad``, ``exp_avg`` and ``update``, or one that is orthogonalised.
        members: Their parameters, DTensors on one mesh or pieces of FSDP1.
        grids: For each, equal blocks along its rows and columns.
        schedules: For each, the coefficients of Newton and Schulz's steps.
        dtype: What matrices are multiplied in.
    """

    def __init__(
        self,
        tensors: TensorSet,
        members: Sequence[Member],
        grids: Sequence[tuple[int, int]],
        schedules: Sequence[Coefficients],
        dtype: torch.dtype,
    ) -> None:
        self._tensors, self._members = tensors, members
        self._grids, self._schedules, self._dtype = grids, schedules, dtype
        self._owners = _owners(members)

    def orthogonalise(self, scalars: Scalars, clip: Tensor, skip: Tensor | None) -> None:
        """Moves ``exp_avg`` and writes ``update``; arguments as of `orthogonalise_torch`."""
        self._orthogonalise_parts(
            momenta_torch(self._tensors, scalars, clip, skip), scalars, "update"
        )

    def orthogonalise_row(self, scalars: Scalars, row: str) -> None:
        """Orthogonalises a row in place."""
        self._orthogonalise_parts(dict(enumerate(self._tensors.flat[row])), scalars, row, True)

    def _orthogonalise_parts(
        self, parts: dict[int, Tensor], scalars: Scalars, row: str, by_gram: bool = False
    ) -> None:
        """Orthogonalises matrices of which there are parts, and writes these to a row."""
        tensors = self._tensors
        eps = scalars.hyperparameters[tensors.group.long(), HYPER["eps"]]
        whole = {}
        for index, mixed in parts.items():
            part, like = self._members[index].param, self._members[index].whole
            mixed = mixed.as_strided(part.shape, part.stride(), mixed.storage_offset())
            whole[index] = whole_of(mixed.to(self._dtype), like)
            if self._owners[index].mine:
                whole[index] = self._orthogonal(whole[index], index, eps[index], by_gram)
        for index, matrix in whole.items():
            owner = self._owners[index]
            dist.broadcast(matrix, owner.rank, group=owner.group)
            part = self._members[index].param
            flat = tensors.flat[row][index]
            goal = flat.as_strided(part.shape, part.stride(), flat.storage_offset())
            goal.copy_(part_of(matrix, self._members[index].whole))

    def _orthogonal(self, matrix: Tensor, index: int, eps: Tensor, by_gram: bool) -> Tensor:
        """One matrix, block by block."""
        (down, across), (rows, columns) = self._grids[index], as_matrix(matrix.shape)
        blocks = matrix.view(down, rows // down, across, columns // across).transpose(1, 2)
        made = newton_schulz_torch(blocks, self._schedules[index], eps, by_gram)
        # Other ranks receive it in the order of memory, which is another of a tall matrix.
        return made.transpose(1, 2).reshape(matrix.shape).contiguous()


class _Owner(NamedTuple):
    """Who orthogonalises a matrix, and who waits for it."""

    rank: int
    group: Any
    mine: bool


def _owners(members: Sequence[Member]) -> list[_Owner]:
    """One of the ranks that hold parts of it; the largest matrices are dealt out first."""
    load: dict[int, float] = {}
    found: dict[int, _Owner] = {}
    shapes = [as_matrix(whole_shape(member.whole)) for member in members]
    for index in sorted(range(len(members)), key=lambda index: -math.prod(shapes[index])):
        group = part_group(members[index].whole)
        ranks = dist.get_process_group_ranks(group)
        owner = min(ranks, key=lambda rank: (load.get(rank, 0.0), rank))
        rows, columns = shapes[index]
        load[owner] = load.get(owner, 0.0) + float(rows * columns) * min(rows, columns)
        found[index] = _Owner(owner, group, owner == dist.get_rank())
    return [found[index] for index in range(len(members))]
