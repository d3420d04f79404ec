"""The command of the package `gpu`: `python examples/benchmarks/gpu_suite.py --help`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def use_checkout() -> None:
    """Makes ``triton_hybrid`` the package of this checkout, whatever is installed.

    The root must not be on the path: its ``kernels`` would pass for a project that transformers
    uses.
    """
    name, folder = "triton_hybrid", HERE.parents[1] / "triton_hybrid"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:  # how the suite starts what may hang or crash
        from gpu.worker import serve

        serve(use_checkout)
    else:
        from gpu.command import main

        raise SystemExit(main())
