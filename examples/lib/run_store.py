"""Finished runs in a file, one JSON object a line, which outlives an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY_LENGTH = 16

Line = dict[str, Any]
"""A finished run, as it was written."""


def canonical(value: Any) -> str:
    """Returns a JSON value as text that depends neither on the order of names nor on tuples."""
    return json.dumps(value, sort_keys=True, default=str)


def run_key(fields: Mapping[str, Any]) -> str:
    """Returns a short hash of everything that decides a run: 16 hexadecimal digits."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


class RunStore:
    """The runs in a file, found again by their keys. The file only grows.

    Of runs with equal keys the first counts. A line that was not written to its end, as by a
    crash, is left out with a warning, wherever it stands.

    Args:
        path: The file, there or not; its folder is made with the first run.
        key: Names of the fields that decide a run, together.

    Raises:
        ValueError: A line is JSON but not an object with these fields.
    """

    def __init__(self, path: Path, key: tuple[str, ...] = ("key",)) -> None:
        self.path = path
        self.key = key
        self._runs: dict[str, Line] = {}
        texts = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        for number, text in enumerate(texts.splitlines(), 1):
            if text.strip():
                self._read(number, text)

    def _read(self, number: int, text: str) -> None:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            warnings.warn(f"{self.path}:{number}: is not JSON and is left out", stacklevel=3)
            return
        if not isinstance(line, dict) or not line.keys() >= set(self.key):
            raise ValueError(
                f"{self.path}:{number}: {text[:40]!r} is not a JSON object with a "
                f"{' and a '.join(self.key)}"
            )
        self._runs.setdefault(self._key_of(line), line)

    def _key_of(self, line: Line) -> str:
        return canonical([line[name] for name in self.key])

    @property
    def lines(self) -> list[Line]:
        """All runs, in the order of the file."""
        return list(self._runs.values())

    def get(self, *key: Any) -> Line | None:
        """Returns a finished run by the values of the key's fields; None if it is to be done."""
        return self._runs.get(canonical(key))

    def add(self, line: Line) -> None:
        """Keeps a run, in one write, so that a reader of the file sees all of it or nothing.

        Args:
            line: Has the fields of the key. What is not a finite number must be None: JSON has
                no word for it.

        Raises:
            ValueError: It holds an infinity or NaN; nothing was written.
        """
        text = json.dumps(line, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END) > 0:
                file.seek(-1, os.SEEK_END)
                # A line that an interruption cut short must not swallow the next.
                text = text if file.read(1) == b"\n" else "\n" + text
            file.write(text.encode())
            os.fsync(file.fileno())
        self._runs.setdefault(self._key_of(line), line)
