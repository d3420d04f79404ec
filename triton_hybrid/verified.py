"""The last verified weights, while a prediction stands in the parameters.

A predicted move stays in the parameters until a gradient has judged it. Who evaluates or saves in
between can have the weights as the last gradient left them: the bits that a rollback would restore.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.binding import Binding
from triton_hybrid.groups import every_parameter, with_kernels
from triton_hybrid.kernels.fingerprint import INTEGERS
from triton_hybrid.kernels.ledger import PART_COLUMN
from triton_hybrid.kernels.multi_tensor import remainder_of
from triton_hybrid.resume import (
    put_back,
    take_predictions,
    with_predictions,
    without_predictions,
)
from triton_hybrid.shards import is_managed, local, saved_parts
from triton_hybrid.standing import compare_whole, is_written, weight_before
from triton_hybrid.state import MASTER, PREDICTION, REMAINDER, moved_again
from triton_hybrid.zero import from_owners

Swap = tuple[Tensor, Tensor, Tensor]
"""A tensor, what it held, and what it holds meanwhile."""


class VerifiedWeights:
    """What an optimizer that predicts offers to those who evaluate or save."""

    param_groups: list[dict[str, Any]]
    state: Any
    _binding: Binding
    _unsent = False  # whether ZeRO's other ranks must be told what was loaded into this part

    @contextmanager
    def verified_weights(self) -> Iterator[None]:
        """Inside, parameters and their masters hold the last verified weights, bit for bit.

        A parameter that somebody has written to since the prediction shows what they wrote.
        Afterwards the prediction stands again, but for elements that were written to meanwhile. A
        `step` inside takes its gradient for one at the verified weights: the prediction is dropped,
        and nothing is blamed for it. Keeps copies of what was moved; waits for the device. With a
        ZeroRedundancyOptimizer all ranks enter and leave it together.
        """
        inner = self._binding.swaps is not None
        self.eval()
        try:
            yield
        finally:
            if not inner:
                self.train()

    @torch.no_grad()
    def eval(self) -> None:
        """`verified_weights` as a switch, until `train`; never required."""
        if self._binding.swaps is None:
            self._binding.swaps = _to_verified(self._binding, self.param_groups, self.state)

    @torch.no_grad()
    def train(self) -> None:
        """Ends `eval`: the prediction stands again where nobody has written meanwhile."""
        binding = self._binding
        swaps, binding.swaps = binding.swaps or [], None
        for tensor, held, shown in swaps:
            tensor.copy_(torch.where(_bits(tensor) == _bits(shown), held, tensor))
        put_back(binding.pending)
        if self._unsent and (zero := binding.ranks.zero) is not None:
            zero._sync_params()

    def _forget_swaps(self) -> None:
        """Goes on from the weights as they are."""
        self._binding.swaps, self._binding.pending, self._unsent = None, [], False

    def _return_predictions(self) -> None:
        """Ends `_with_predictions`, where a state was loaded."""
        pending = take_predictions(self.state, every_parameter(self.param_groups))
        put_back(pending)
        self._binding.pending = pending

    @staticmethod
    def _as_saved(optimizer: Any, made: dict[str, Any]) -> dict[str, Any]:
        """A state dict as others may load it; a hook of torch's."""
        groups, stands = optimizer.param_groups, _stands(optimizer._binding)
        return saved_parts(optimizer._with_predictions(made), groups, stands)

    def _with_predictions(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict, or what is pickled, that brings the prediction back which was put aside."""
        params, swaps = every_parameter(self.param_groups), self._binding.swaps
        if swaps is not None and any(map(is_managed, params)):
            # Other ranks may load other parts of it, and have swapped where this one has nothing.
            return without_predictions(state_dict) if _stands(self._binding) else state_dict
        if not swaps:
            return state_dict
        held = {tensor.data_ptr(): value for tensor, value, _ in swaps}
        return with_predictions(state_dict, params, held)


def _stands(binding: Binding) -> bool:
    """Whether a prediction stands, by the ledger as `Binding.save` has read it."""
    progress = binding.progress
    return progress.controller.stands and progress.ledger.get("moved", 0.0) > 0


def _to_verified(binding: Binding, groups: list[dict[str, Any]], state: Any) -> list[Swap]:
    """Puts parameters and masters back to where the last gradient left them."""
    if not binding.progress.controller.stands:
        return []
    binding.save(groups)  # host memory up to date, the ledger read
    if not _stands(binding):
        return []
    its = every_parameter(groups)
    if any([compare_whole(param, state[param]) for param in its if param in state]):
        binding.progress.ledger["written"] = 1.0
    swaps = []
    for param, rule in with_kernels(groups):
        entry = {key: local(row) for key, row in state.get(param, {}).items()}
        if PREDICTION.name not in entry or entry[PREDICTION.name][PART_COLUMN.value] <= 0:
            continue
        param = local(param)
        if not param.numel() or is_written(param, entry):
            continue
        verified = weight_before(param, entry, rule)
        swaps.append(_swap(param.detach(), verified))
        if MASTER.name in entry and not moved_again(entry):
            swaps.append(_swap(entry[MASTER.name], verified))
        if REMAINDER.name in entry:
            swaps.append(_swap(entry[REMAINDER.name], remainder_of(verified, param.detach())))
    zero = binding.ranks.zero
    for tensor, held in () if zero is None else from_owners(zero, its):
        swaps.append((tensor, held, tensor.clone()))
    return swaps


def _swap(tensor: Tensor, shown: Tensor) -> Swap:
    held = tensor.clone()
    tensor.copy_(shown)
    return tensor, held, tensor.clone()


def _bits(tensor: Tensor) -> Tensor:
    """What tells a zero from its negative, and NaNs from each other."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()][0])
