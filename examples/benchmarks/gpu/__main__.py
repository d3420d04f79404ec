"""The command: `python examples/benchmarks/gpu --help`."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Not this folder itself: its `kernels` would pass for a project that transformers uses.
others = [place for place in sys.path if Path(place).resolve() != HERE]
sys.path[:] = [str(HERE.parent), str(HERE.parents[1]), *others]


def use_checkout() -> None:
    """Makes ``triton_hybrid`` the package of this checkout, whatever is installed.

    The root must not be on the path: its ``kernels``, too, would pass for that project.
    """
    name, folder = "triton_hybrid", HERE.parents[2] / "triton_hybrid"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:  # how the suite starts what may hang or crash
        from gpu.worker import serve

        use_checkout()
        serve(sys.argv[2:])
    else:
        from gpu.command import main

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # else workers would live on
        raise SystemExit(main())
