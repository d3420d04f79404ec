"""What a base rule declares."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.update_rule import UpdateRule
from triton_hybrid.state import Member, StateRow

Group = Mapping[str, Any]


class Betas(NamedTuple):
    """The decays of a rule's moments, and how Muon mixes momentum, slow EMA and gradient."""

    pair: tuple[float, float]  # β1 and β2 of the rule's formula
    exp_avg: float  # that of exp_avg, for its bias correction
    nesterov_mix: float = 1.0  # weight of the momentum against the gradient
    slow_mix: float = 0.0  # weight of the slow EMA beside both


class Option(NamedTuple):
    """An option of a rule's groups."""

    default: Any
    allowed: str  # as messages say it
    ok: Callable[[Any, int | None], bool]  # of a value for so many parameters, None: not yet known


@dataclass(frozen=True)
class Rule:
    """A base rule: its rows, hyperparameters, checks, and kernel functions.

    Attributes:
        name: Value of ``base``.
        kernels: What it does with a block of a tensor, for both backends.
        rows: What it keeps of every parameter.
        options: Options of a group beyond AdamW's, by name.
        check_parameter: Refuses a parameter that it cannot update: group, index, parameter.
        betas: Of a group; whether the slow EMA takes part in a momentum.
        bind: Prepares the tensors of a batch, such as matrices; None where nothing is needed.
        batch_key: What parameters of one batch share, besides dtype and rule.
        settings: Of a group: what must stay the same for its parameters to stay bound.
        follow_schedulers: Brings a group's options in line with those that schedulers write.
        checkpoint_names: Name of a row in torch's optimizer of this rule to ours.
    """

    name: str
    kernels: UpdateRule
    rows: tuple[StateRow, ...]
    options: Mapping[str, Option] = field(default_factory=dict)
    check_parameter: Callable[[Group, int, Tensor], None] = lambda group, index, param: None
    betas: Callable[[Group, bool], Betas] = lambda group, _: Betas(
        group["betas"], group["betas"][0]
    )
    bind: Callable[[TensorSet, Sequence[Member]], None] | None = None
    batch_key: Callable[[Group], Hashable] = lambda group: None
    settings: Callable[[Group], Hashable] = lambda group: None
    follow_schedulers: Callable[[dict[str, Any]], None] = lambda group: None
    checkpoint_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def defaults(self) -> dict[str, Any]:
        """Its options with their defaults."""
        return {name: option.default for name, option in self.options.items()}


@triton.jit
def no_denominator(
    addresses, tensor, begin, length, a, b, c, d,
    STATE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The denominator of rules that divide by nothing: what stands in for it is never read."""
    return a
