"""Compiles every kernel for every target, without a GPU, and looks at what came out.

    python -m triton_hybrid.kernels.audit [--target sm_90] [--kernel adamw] [--json FILE]
                                          [--mix] [--roofline] [--write]

Nothing here repeats how a kernel is launched: the launchers themselves are called on small
CPU tensors, their launches are recorded instead of run, and what was recorded is compiled.
So a kernel is audited with the arguments, the specialisation and the options it really has.

For each launch and target the table shows registers, spills, shared memory, the widest
global access and the bytes moved for each element of a full chunk. The bytes are counted
three times: from the roles that the kernel reads and writes (``cases.py``), from the
128-bit accesses in the assembly, and in Triton's IR, together with the floating-point operations.
They must agree: an access that lost its alignment, or that nobody knows of, breaks the equation.
What is worse than in the golden file (``golden.py``) fails too; ``--write`` records it anew.
``--mix`` adds resident programs and instructions by kind, ``--roofline`` the least times on
four GPUs.

Exits with 1 on a failed compile, a spill, a full chunk with an access narrower than 128
bits, more bytes than the table knows, a cooperative launch whose programs cannot all be
resident together, or anything worse than the golden file; with 2 where it cannot run.
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
from triton_hybrid.kernels.audit.golden import FILE, REWRITE, Golden
from triton_hybrid.kernels.audit.roofline import roofline
from triton_hybrid.kernels.audit.table import aligned, mix_table, summary, table, write_json
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
    add("--write", action="store_true", help="record the findings in the golden file")
    add("--mix", action="store_true", help="count instructions by kind, and resident programs")
    add("--roofline", action="store_true", help="the least time of each launch on four GPUs")
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
    findings = run(chosen, targets, options.jobs, log, options.mix)
    golden = Golden.read()
    for finding in findings:
        if not (finding.failures or finding.skipped or options.write or golden.why_not()):
            finding.failures += golden.worse(finding)
    print(table(findings))
    if options.mix:
        print(f"\n{mix_table(findings)}\n")
    if options.roofline:
        rows = roofline(chosen, findings)
        print("\nLeast times, a bound from published peaks and no measurement:")
        print(aligned(rows, "<" + ">" * (len(rows[0]) - 1)))
    print(summary(findings, time.perf_counter() - begin))
    if options.json is not None:
        write_json(options.json, findings)
    failed = any(finding.failures for finding in findings)
    names_now = [case.name for case in every]
    if options.write and not failed:
        FILE.write_text(golden.updated(findings, names_now), encoding="utf-8")
        print(f"written: {FILE}")
    elif options.write:
        print("nothing written: what failed is not recorded")
    elif golden.why_not():
        print(golden.why_not())
    elif gone := golden.gone(names_now):
        print(f"In the golden file, but launched no more: {gone}. {REWRITE}")
        failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
