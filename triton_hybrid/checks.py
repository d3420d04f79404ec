"""Refusals that name argument, value and allowed range."""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

_NOT_THEIRS = ("triton_hybrid", "torch", "contextlib")
Its = TypeVar("Its", bound="Configuration")


class Configuration:
    """A frozen dataclass of plain values, which it checks when it is made."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain Python values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_dict(cls: type[Its], values: Mapping[str, Any]) -> Its:
        """The inverse of `to_dict`; missing fields take their defaults.

        Raises:
            ValueError: An unknown field, or a value outside its range.
        """
        require(isinstance(values, Mapping), "values", values, "a dictionary of fields")
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                raise ValueError(f"{name}={values[name]!r}: unknown field, must be one of {known}")
        return cls(**values)


def warn(message: str) -> None:
    """Warns at the line of the caller's code: the innermost that is neither ours nor torch's."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THEIRS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raises a ValueError with name, value and what is allowed, unless it is ok."""
    if not ok:
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and -math.inf < value < math.inf


def is_int(value: Any, least: int, most: float = math.inf) -> bool:
    """Whether a value is a whole number in a range."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_flag(value: Any) -> bool:
    """Whether a value is a bool."""
    return isinstance(value, bool)


def is_list(value: Any, suits: Callable[[Any], bool], count: int | None = None) -> bool:
    """Whether a value is a list of what suits, of a length if one is asked for."""
    listed = isinstance(value, (tuple, list)) and count in (None, len(value))
    return listed and all(map(suits, value))


def check_number(
    name: str, value: Any, allowed: str, ok: Callable[[float], bool] = lambda x: x >= 0
) -> None:
    """Refuses what is not a finite number, or not ok; by default negative ones."""
    require(is_number(value) and ok(value), name, value, allowed)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuses what is not one of some words."""
    words = tuple(choices)
    require(isinstance(value, str) and value in words, name, value, f"one of {words}")


def check_flag(name: str, value: Any) -> None:
    """Refuses what is not a bool."""
    require(is_flag(value), name, value, "True or False")


def check_loss(loss: Any) -> None:
    """Refuses what is not one real number: a Python one, NumPy's, or a tensor of one element."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(f"loss has shape {tuple(loss.shape)}: must have one element")
        require(not loss.is_complex(), "loss", loss, "real")
    else:
        known = hasattr(loss, "__float__") and not isinstance(loss, complex)
        require(known, "loss", loss, "a number, or a tensor of one element")
