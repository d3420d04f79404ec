"""Types of command line flags, each refusing what it does not allow and saying what it does."""

from __future__ import annotations

import argparse
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

TYPE_NAMES: dict[Any, str] = {
    int: "whole numbers",
    float: "numbers",
    str: "words",
    bool: "true or false",
    type(None): "none",
}


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Returns a flag type: a whole number within limits."""
    allowed = f"whole numbers from {least}" + ("" if most is None else f" to {most}")

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text!r} is not possible; allowed: {allowed}")
        return value

    return parse


def real_number(
    least: float, below: float = math.inf, *, open_below: bool = False
) -> Callable[[str], float]:
    """Returns a flag type: a finite number, at least (or above) one limit and below another."""
    allowed = f"numbers {'above' if open_below else 'from'} {least:g}" + (
        "" if math.isinf(below) else f" and below {below:g}"
    )

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < below or (open_below and value == least):
            raise argparse.ArgumentTypeError(f"{text!r} is not possible; allowed: {allowed}")
        return value

    return parse


def device_name(text: str) -> torch.device:
    """A flag type: a device that is there."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allowed = "auto, cpu" + "".join(f", cuda:{index}" for index in range(torch.cuda.device_count()))
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or not _is_there(device):
        raise argparse.ArgumentTypeError(f"{text!r} is not here; allowed: {allowed}")
    return device


def _is_there(device: torch.device) -> bool:
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    return device.type == "cpu" and device.index in (None, 0)


def config_value(annotation: Any) -> Callable[[str], Any]:
    """Returns a flag type for a field of HybridConfig, from the field's type.

    What a value may be is for HybridConfig to say; this only turns text into the right type.
    """
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if union else (annotation,)

    def parse(text: str) -> Any:
        for member in members:
            literals = typing.get_args(member) if typing.get_origin(member) is not None else ()
            for literal in literals:
                if str(literal) == text:
                    return literal
            if member is type(None) and text.lower() == "none":
                return None
            if member is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if member in (int, float, str):
                try:
                    return member(text)
                except ValueError:
                    continue
        allowed = " or ".join(TYPE_NAMES.get(member, str(member)) for member in members)
        raise argparse.ArgumentTypeError(f"{text!r} is not possible; allowed: {allowed}")

    return parse


def refuse_flags(
    parser: argparse.ArgumentParser, rest: Sequence[str], forbidden: Mapping[str, str]
) -> set[str]:
    """Ends the program where flags that another parser would take are not possible here.

    Args:
        parser: Says so.
        rest: Arguments that it did not know.
        forbidden: Such flags, and what to do instead.

    Returns:
        The names of the other flags.
    """
    flags = {part.partition("=")[0] for part in rest}
    for flag, instead in forbidden.items():
        if flag in flags:
            parser.error(f"argument {flag}: not possible here; allowed: {instead}")
    return flags
