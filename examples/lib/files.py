"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a file to write; without an exception it then takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that every reader accepts."""
    with replacing(path) as part:
        text = json.dumps(plain(content), indent=1, allow_nan=False)
        part.write_text(text + "\n", encoding="utf-8")


def save_figure(path: Path, figure: Figure, dots_per_inch: int = 110, **options: Any) -> None:
    """Writes a figure as PNG; further options are those of `Figure.savefig`."""
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=dots_per_inch, **options)


def plain(value: Any) -> Any:
    """Turns a value into what JSON has words for: NaN and infinities into null, others to text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
