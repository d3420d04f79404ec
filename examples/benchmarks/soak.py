"""The command of the package `soak`: `python examples/benchmarks/soak.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

if __name__ == "__main__":
    from soak.command import main

    raise SystemExit(main())
