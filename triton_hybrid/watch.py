"""Has anybody changed what is bound? Looked at before every step, so it must cost next to nothing.

All comparisons run inside C, over whole lists: Python compares lists and dictionaries by identity
before it asks for equality, and tensors that are not the same are not asked.
"""

from __future__ import annotations

import gc
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from triton_hybrid.checks import warn
from triton_hybrid.groups import PARAMS, every_parameter
from triton_hybrid.kernels.likeness import likeness
from triton_hybrid.rules import RULES
from triton_hybrid.shards import all_zero, is_dtensor, local, version_of
from triton_hybrid.state import State

Groups = Sequence[dict[str, Any]]
FEW = 8
"""Parameters of a group that are looked at for gradients which nobody reads."""
_TRAINED = operator.attrgetter("requires_grad")
_PROPERTIES = _TRAINED, operator.attrgetter("dtype"), operator.attrgetter("shape")


class _OtherTensorError(Exception):
    """A tensor was compared with something that is not itself."""


class _ByIdentity(TorchFunctionMode):
    """Two tensors that are not the same are different, whatever their values."""

    def __torch_function__(self, *_: Any, **__: Any) -> NoReturn:
        raise _OtherTensorError


_BY_IDENTITY = _ByIdentity()


def _same(left: Any, right: Any) -> bool:
    """Whether two nested lists hold the same tensors."""
    try:
        with _BY_IDENTITY:
            return bool(left == right)
    except (_OtherTensorError, ValueError):  # NumPy's arrays refuse to be compared as a whole
        return False


class Watch:
    """What parameters are, and where; what must stay the same of groups; the tensors of state."""

    def __init__(self, groups: Groups, state: State) -> None:
        self._lists = [params[:] for params in map(PARAMS, groups)]
        self._params = every_parameter(groups)
        self._here = here = self._read()
        self._changing = len(here) < len(self._params) or any(map(is_dtensor, self._params))
        self._trained = [*map(_TRAINED, self._params)]
        self._settings = _settings(groups)
        self._places = [*map(Tensor.data_ptr, here)]
        self._kinds, self._alike = _kinds(here), likeness(here)
        self.note(state)

    def _read(self) -> list[Tensor]:
        """What is here of the parameters."""
        return [local(param) for param in self._params if not is_lazy(param)]

    def note(self, state: State) -> None:
        """Takes the state as it is now."""
        self._entries = _entries(state)

    def sees_changes(self, groups: Groups, state: Mapping[Tensor, Any] | None) -> bool:
        """Whether parameters were replaced, moved, frozen or converted, or settings changed.

        With a state, whether that holds other tensors, too.
        """
        entries = self._entries if state is None else _entries(state)
        if not _same(([*map(PARAMS, groups)], entries), (self._lists, self._entries)):
            return True
        if _settings(groups) != self._settings:
            return True
        # Lazy parameters and parts of parameters may be others now; a part says nothing of whether
        # its parameter is frozen.
        here = self._read() if self._changing else self._here
        if self._changing and [*map(_TRAINED, self._params)] != self._trained:
            return True
        if [*map(Tensor.data_ptr, here)] != self._places:
            return True
        if not self._alike(*here):
            if _kinds(here) != self._kinds:
                return True
            self._alike = likeness(here)
        return False


class UnreadGradients:
    """Tells, once, that somebody computes gradients for Predict steps, which read none."""

    def __init__(self) -> None:
        self._told = False
        self._read: list[Any] = []

    def note(self, groups: Groups) -> None:
        """Takes note of the gradients that a step is about to read: they may be left in place."""
        if not self._told:
            self._read = _few_gradients(groups)

    def mention(self, groups: Groups) -> None:
        """Warns of gradients that no step has read; zeros are none."""
        if self._told:
            return
        found = _few_gradients(groups)
        self._told = any(found) and found != self._read
        if self._told and not all_zero(every_parameter(groups)):
            warn(
                "gradients were computed for a Predict step, which does not read them: do so only "
                "where optimizer.needs_backward is True, or use inline=True"
            )


def _few_gradients(groups: Groups) -> list[Any]:
    """Which gradients some parameters have, and how often those were written."""
    # To look at all of them would be the longest check of a Predict step.
    some = (param for its in map(PARAMS, groups) for param in its[:: len(its) // FEW + 1])
    return [param.grad is not None and (id(param.grad), version_of(param.grad)) for param in some]


def _entries(state: Mapping[Tensor, Any]) -> list[Any]:
    """The values of all dictionaries of a state, one after another."""
    # What the garbage collector would visit of them; to compare the dictionaries takes twice as
    # long.
    return gc.get_referents(*state.values())


def _settings(groups: Groups) -> list[Any]:
    return [(g["base"], RULES[g["base"]].settings(g)) for g in groups]


def _kinds(params: Sequence[Tensor]) -> list[Any]:
    return [*map(Tensor.stride, params), *(read(p) for read in _PROPERTIES for p in params)]
