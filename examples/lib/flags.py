"""Command lines: a dataclass of options, whose annotations say what each flag allows.

tyro makes the parser. What a flag does not allow ends the program with exit status 2 and a
message that names the flag, the value and what is allowed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import tyro
from tyro.constructors import PrimitiveConstructorSpec

REFUSED = 2
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C
LARGEST_SEED = 2**63 - 1

FlagType = PrimitiveConstructorSpec[Any]
T = TypeVar("T")


def parse(options: Any, arguments: Sequence[str] | None, **settings: Any) -> Any:
    """Reads a command line.

    Args:
        options: The dataclass of the flags; or of commands, by name, the dataclass of each.
        arguments: The command line; None for that of this process.
        settings: More for `tyro.cli`, such as ``prog`` and ``description``.
    """
    read = tyro.extras.subcommand_cli_from_dict if isinstance(options, dict) else tyro.cli
    return read(options, args=arguments, config=(tyro.conf.FlagCreatePairsOff,), **settings)


def refuse(flag: str, value: object, allowed: str) -> NoReturn:
    """Ends the program where the flags, or what they name, do not go together."""
    fail(f"argument {flag}: {value} is not possible; allowed: {allowed}")


def fail(error: object) -> NoReturn:
    """Ends the program with exit status 2, and says why."""
    print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    raise SystemExit(REFUSED)


def refuse_others(arguments: Sequence[str], instead: Mapping[str, str]) -> None:
    """Ends the program where flags of another example are given, and says what to do instead."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag in instead:
            refuse(flag, argument, instead[flag])


def flag_type(read: Callable[[str], Any], allowed: str, name: str, many: bool = False) -> FlagType:
    """Returns what to annotate a field with, as in ``Annotated[int, whole_number(1)]``.

    Args:
        read: Turns text into a value; raises a ValueError where it is not allowed.
        allowed: What is, in words.
        name: Stands for a value in the help.
        many: Whether the flag takes several values, each once, as a tuple.
    """

    def value_of(text: str) -> Any:
        try:
            return read(text)
        except (ValueError, RuntimeError):
            raise ValueError(f"{text!r} is not possible; allowed: {allowed}") from None

    def from_texts(texts: list[str]) -> Any:
        values = tuple(map(value_of, texts))
        if not 0 < len(set(values)) == len(values):
            given = " ".join(texts)
            raise ValueError(f"{given!r} is not possible; allowed: one or more values, each once")
        return values if many else values[0]

    def to_texts(value: Any) -> list[str]:
        values = value if isinstance(value, tuple) else (value,)
        return [f"{x:g}" if isinstance(x, float) else str(x) for x in values]

    return PrimitiveConstructorSpec(
        nargs="*" if many else 1,
        metavar=f"{name} ..." if many else name,
        instance_from_str=from_texts,
        is_instance=lambda value: True,
        str_from_instance=to_texts,
    )


def whole_number(least: int, most: float = math.inf, many: bool = False) -> FlagType:
    """A whole number within limits."""
    allowed = f"whole numbers from {least}" + ("" if most == math.inf else f" to {most}")
    return flag_type(lambda t: _checked(int(t), lambda x: least <= x <= most), allowed, "N", many)


def real_number(
    least: float, below: float = math.inf, *, above: bool = False, many: bool = False
) -> FlagType:
    """A finite number: at least (or above) one limit, and below another."""
    allowed = f"numbers {'above' if above else 'from'} {least:g}"
    allowed += "" if below == math.inf else f" and below {below:g}"

    def inside(value: float) -> bool:
        return least <= value < below and not (above and value == least)

    return flag_type(lambda text: _checked(float(text), inside), allowed, "X", many)


def choice(names: Sequence[str], many: bool = False) -> FlagType:
    """One of some names."""
    allowed = ", ".join(names)
    return flag_type(lambda t: _checked(t, names.__contains__), allowed, f"{{{allowed}}}", many)


def default_device() -> torch.device:
    """A GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device() -> FlagType:
    """A device that is there; ``auto`` is `default_device`."""
    count = torch.cuda.device_count()

    def read(text: str) -> torch.device:
        found = default_device() if text == "auto" else torch.device(text)
        there = {"cpu": 1, "cuda": count}.get(found.type, 0)
        return _checked(found, lambda x: (x.index or 0) < there)

    return flag_type(read, "auto, cpu" + "".join(f", cuda:{i}" for i in range(count)), "DEVICE")


def several_seeds() -> FlagType:
    """Several seeds that every generator takes."""
    return whole_number(0, LARGEST_SEED, many=True)


def output_folder(folder: Path, **words: str) -> Path:
    """Returns the folder for results; one that is a file ends the program.

    Args:
        folder: The folder; TIME in it stands for the time.
        words: What other words in it stand for.
    """
    for word, meaning in {**words, "TIME": f"{datetime.now():%Y%m%d-%H%M%S}"}.items():
        folder = Path(str(folder).replace(word, meaning))
    if folder.exists() and not folder.is_dir():
        refuse("--output", f"{folder}, a file,", "a folder, there or not")
    return folder


def _checked(value: T, allowed: Callable[[T], bool]) -> T:
    if not allowed(value):
        raise ValueError
    return value
