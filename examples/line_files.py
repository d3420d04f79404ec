"""Files of finished runs, one JSON value a line, which outlive an interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TORN = object()
"""Stands for a line that was not written to its end."""


def parsed_lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Yields number, text and value of every line that is not empty; nothing without a file.

    The value of a line that is not JSON is `TORN`: an interruption cut it short, and it may stand
    within a file that was continued later.
    """
    if not path.is_file():
        return
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = TORN
        yield number, text, value


def append_line(path: Path, text: str) -> None:
    """Adds a line to a file, in one write, so that a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text += "\n"
    # A line that an interruption cut short must not swallow the next.
    if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        text = "\n" + text
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, text.encode())
        os.fsync(handle)
    finally:
        os.close(handle)
