"""The command of the package `frontier`: `python examples/benchmarks/frontier.py --help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

if __name__ == "__main__":  # worker processes import this file too, and need nothing of it
    from frontier.command import main

    raise SystemExit(main())
