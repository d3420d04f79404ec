"""Files of the frontier's finished runs: one JSON object a line."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from line_files import TORN, parsed_lines
from line_files import append_line as append_text

Outcome = dict[str, Any]


def read_lines(path: Path) -> list[Outcome]:
    """Returns the runs in a file; none where there is no file.

    A line that was not written to its end, as by a crash, is left out with a warning.

    Raises:
        ValueError: If a line is JSON but not an object with a key.
    """
    lines = []
    for number, text, line in parsed_lines(path):
        if line is TORN:
            warnings.warn(f"{path}:{number}: is not JSON and is left out", stacklevel=2)
            continue
        if not isinstance(line, dict) or "key" not in line:
            raise ValueError(f"{path}:{number}: {text[:40]!r} is not a JSON object with a key")
        lines.append(line)
    return lines


def append_line(path: Path, line: Outcome) -> None:
    """Adds a run to a file."""
    append_text(path, json.dumps(line, allow_nan=False))
