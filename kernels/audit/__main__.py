"""Compiles every kernel for every target, without a GPU, and looks at what came out.

    python -m triton_hybrid.kernels.audit [--target sm_90] [--kernel adamw] [--json FILE]

Nothing here repeats how a kernel is launched: the launchers themselves are called on small
CPU tensors, their launches are recorded instead of run, and what was recorded is compiled.
So a kernel is audited with the arguments, the specialisation and the options it really has.

For each launch and target the table shows registers, spills, shared memory, the widest
global access and the bytes moved for each element of a full chunk. The bytes are counted
twice: from the roles that the kernel reads and writes (``cases.py``), and from the
128-bit accesses in the assembly. The two must agree: an access that lost its alignment, or
that nobody knows of, breaks the equation.

Exits with 1 on a failed compile, a spill, a full chunk with an access narrower than 128
bits, more bytes than the table knows, or a cooperative launch whose programs cannot all be
resident together; with 2 where it cannot run.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import triton
from triton_hybrid.kernels.audit.cases import cases
from triton_hybrid.kernels.audit.findings import run
from triton_hybrid.kernels.audit.table import summary, table, write_json
from triton_hybrid.kernels.audit.targets import TARGETS, triton_version
from triton_hybrid.kernels.launch import INTERPRETED


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m triton_hybrid.kernels.audit",
        description="Compiles every kernel for every target, without a GPU, and checks registers, "
        "spills, access widths and bytes moved.",
    )
    add = parser.add_argument
    add("--target", action="append", choices=sorted(TARGETS), help="default: all; may be repeated")
    words = "a kernel (adamw, predict, ...) or part of a launch's name; may be repeated"
    add("--kernel", action="append", metavar="NAME", help=words)
    add("--json", type=Path, metavar="FILE", help="write the findings there too")
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    return parser.parse_args(arguments)


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the audit; returns the exit status."""
    options = _options(arguments)
    every = cases()
    names = options.kernel
    chosen = [c for c in every if not names or any(n == c.kernel or n in c.name for n in names)]
    if not chosen:
        known = sorted({case.kernel for case in every})
        return _refuse(f"--kernel {names}: no such launch; kernels are {known}")
    if INTERPRETED or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return _refuse(
            "TRITON_INTERPRET is set: kernels are interpreted then, and nothing can be compiled. "
            "Run the audit without it."
        )
    targets = [TARGETS[name] for name in options.target or TARGETS]
    if options.target is None:
        young = [t.name for t in targets if t.oldest_triton > triton_version()]
        targets = [t for t in targets if t.name not in young]
        if young:
            print(f"left out, too new for Triton {triton.__version__}: {', '.join(young)}")
    begin = time.perf_counter()
    log = functools.partial(print, file=sys.stderr, flush=True)
    findings = run(chosen, targets, options.jobs, log)
    print(table(findings))
    print(summary(findings, time.perf_counter() - begin))
    if options.json is not None:
        write_json(options.json, findings)
    return 1 if any(finding.failures for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
