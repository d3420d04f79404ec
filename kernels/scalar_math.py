"""Functions of numbers: Python's own on the CPU, 0-dim FP64 tensors elsewhere.

An operation of torch takes 3 µs on the CPU whatever it works on, one of Python a thirtieth of it.
The programs on the ledger are written for both, with these functions and operators, and leave the
same bits. On a GPU nobody waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from triton_hybrid.kernels.capture import capturing

Number = Any
"""A float, or a 0-dim FP64 tensor."""
Truth = Any
"""A bool, or a 0-dim tensor of one."""


def numbers_of(vector: Tensor) -> list[Number]:
    """The entries of an FP64 vector; tensors on the CPU too while a graph is being captured."""
    on_host = vector.device.type == "cpu" and not capturing(vector.device)
    return vector.tolist() if on_host else [*vector.unbind()]


def named(vector: Tensor, names: Iterable[str]) -> dict[str, Number]:
    """The same by name."""
    return dict(zip(names, numbers_of(vector)))


def write(vector: Tensor, entries: Mapping[str, Number]) -> None:
    """The inverse of `named`."""
    vector.copy_(vector_of([*entries.values()], vector.device))


def vector_of(numbers: list[Number], device: torch.device) -> Tensor:
    """An FP64 vector of numbers."""
    if any(isinstance(number, Tensor) for number in numbers):
        wide: Any = {"dtype": torch.float64, "device": device}
        return torch.stack([torch.as_tensor(its, **wide) for its in numbers])
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def total(column: Tensor) -> Number:
    """The sum of a vector."""
    return number(column.sum())


def number(x: Tensor | float) -> Number:
    """What a 0-dim tensor holds, where reading it waits for nobody."""
    return numbers_of(x.reshape(1))[0] if isinstance(x, Tensor) else x


def _on_cpu(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64, device="cpu")  # whatever the default device is


def beside(x: Number, value: float) -> Number:
    """A constant, where a number like another must stand."""
    return torch.full_like(x, value) if isinstance(x, Tensor) else value


def where(condition: Truth, one: Any, other: Any) -> Any:
    """As `torch.where`."""
    if isinstance(condition, Tensor):
        return torch.where(condition, one, other)
    return one if condition else other


def negate(condition: Truth) -> Truth:
    """Logical not: ``~True`` of Python is another number."""
    return ~condition if isinstance(condition, Tensor) else not condition


def clamp(x: Number, least: float = -math.inf, most: float = math.inf) -> Number:
    """As `torch.clamp`: NaN stays."""
    return x.clamp(least, most) if isinstance(x, Tensor) else min(max(x, least), most)


def smaller(x: Number, y: Number) -> Number:
    """As `torch.minimum`: NaN if one is."""
    if isinstance(x, Tensor):
        return torch.minimum(x, y)
    return x if x < y or x != x else y


def larger(x: Number, y: Number) -> Number:
    """As `torch.maximum`: NaN if one is."""
    if isinstance(x, Tensor):
        return torch.maximum(x, y)
    return x if x > y or x != x else y


def sqrt(x: Number) -> Number:
    """The root by torch, one in a hundred of which is another than Python's."""
    return x.sqrt() if isinstance(x, Tensor) else _on_cpu(x).sqrt().item()


def log(x: Number) -> Number:
    """The logarithm by torch, which takes another one than Python."""
    return x.log() if isinstance(x, Tensor) else _on_cpu(x).log().item()


def exp(x: Number) -> Number:
    """The exponential function by torch."""
    return x.exp() if isinstance(x, Tensor) else _on_cpu(x).exp().item()


def exp2(x: Number) -> Number:
    """Two to the power of a small whole number."""
    return x.exp2() if isinstance(x, Tensor) else 2.0**x


def reciprocal(x: Number) -> Number:
    """1 / x, infinite of 0."""
    return x.reciprocal() if isinstance(x, Tensor) else divide(1.0, x)


def divide(x: Number, y: Number) -> Number:
    """X / y: 0 / 0 is NaN."""
    return x / y if isinstance(y, Tensor) or y else x * math.copysign(math.inf, y)


def rounded(x: Number) -> Number:
    """To the nearest number of FP32."""
    if isinstance(x, Tensor):
        return x.float().double()
    return _on_cpu(x).float().item()


def finite(x: Number) -> Truth:
    """Neither infinite nor NaN."""
    return abs(x) < math.inf
