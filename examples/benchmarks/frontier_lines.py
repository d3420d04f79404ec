"""Files of finished runs: one JSON object a line, which outlives a crash."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

Outcome = dict[str, Any]


def read_lines(path: Path) -> list[Outcome]:
    """Returns the runs in a file; none where there is no file.

    A line that was not written to its end, as by a crash, is left out with a warning: it may stand
    within a file that was continued later.

    Raises:
        ValueError: If a line is JSON but not an object with a key.
    """
    if not path.is_file():
        return []
    lines = []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            warnings.warn(f"{path}:{number}: is not JSON and is left out", stacklevel=2)
            continue
        if not isinstance(line, dict) or "key" not in line:
            raise ValueError(f"{path}:{number}: {text[:40]!r} is not a JSON object with a key")
        lines.append(line)
    return lines


def append_line(path: Path, line: Outcome) -> None:
    """Adds a run to a file, in one write, so that a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(line, allow_nan=False) + "\n"
    if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        text = "\n" + text
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, text.encode())
        os.fsync(handle)
    finally:
        os.close(handle)
