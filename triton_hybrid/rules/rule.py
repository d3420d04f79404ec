"""What a base rule declares."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.update_rule import UpdateRule
from triton_hybrid.state import Member, StateRow


def _accept(group: Mapping[str, Any]) -> None:
    """Refuses nothing."""


def _accept_parameter(group: Mapping[str, Any], index: int, param: Tensor) -> None:
    """Refuses nothing."""


class Betas(NamedTuple):
    """The decays of a rule's moments.

    Attributes:
        beta1: As the rule's formula has it.
        beta2: As the rule's formula has it.
        exp_avg: That of ``exp_avg``, for its bias correction.
        nesterov_mix: Weight of the momentum against the gradient.
    """

    beta1: float
    beta2: float
    exp_avg: float
    nesterov_mix: float = 1.0


def _betas(group: Mapping[str, Any]) -> Betas:
    beta1, beta2 = group["betas"]
    return Betas(beta1, beta2, exp_avg=beta1)


def _nothing(group: Mapping[str, Any]) -> Hashable:
    return None


@dataclass(frozen=True)
class Rule:
    """A base rule: its rows, hyperparameters, checks, and kernel functions.

    Attributes:
        name: Value of ``base``.
        kernels: What it does with a block of a tensor, for both backends.
        rows: What it keeps of every parameter.
        along_rows: What it needs besides to be followed along the slow EMA.
        defaults: Options of a group beyond AdamW's, with their defaults.
        check: Refuses bad options of a group, by name.
        check_parameter: Refuses a parameter that it cannot update: group, index, parameter.
        betas: Of a group.
        bind: Prepares the tensors of a batch, such as matrices; None where nothing is needed.
        batch_key: What parameters of one batch share, besides dtype and rule.
        settings: Of a group: what must stay the same for its parameters to stay bound.
        checkpoint_names: Name of a row in torch's optimizer of this rule to ours.
    """

    name: str
    kernels: UpdateRule
    rows: tuple[StateRow, ...]
    along_rows: tuple[StateRow, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] = _accept
    check_parameter: Callable[[Mapping[str, Any], int, Tensor], None] = _accept_parameter
    betas: Callable[[Mapping[str, Any]], Betas] = _betas
    bind: Callable[[TensorSet, Sequence[Member]], None] | None = None
    batch_key: Callable[[Mapping[str, Any]], Hashable] = _nothing
    settings: Callable[[Mapping[str, Any]], Hashable] = _nothing
    checkpoint_names: Mapping[str, str] = field(default_factory=dict)


def check_number(name: str, value: Any, allowed: str, low: float, high: float = math.inf) -> None:
    """Refuses what is not a number with low <= value < high.

    Raises:
        ValueError: With name, value, and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r}: must be {allowed}")
    if not low <= value < high:
        raise ValueError(f"{name}={value!r}: must be {allowed}")
