"""Newton-Schulz by Gram matrices: what it would save, and what its rounding costs.

    python examples/benchmarks/gram_form.py

The kernels multiply the wide matrix in every step (`newton_schulz.py`). The Gram form iterates on
G = X Xᵀ and on Q, the product of the polynomials so far, and multiplies X by Q at the end; at a
restart it does so in between, and forms G anew. Nothing of it is built: products are rounded here
as a GPU would round them, with FP32 sums, against FP64, and FLOPs are counted for GPT-2.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton_hybrid.kernels.newton_schulz import POLAR, QUINTIC

from lib.environment import versions
from lib.files import write_json
from lib.flags import parse
from lib.gpt2_shapes import GPT2_SIZES

OUTPUT = Path(__file__).resolve().parent / "results" / "gram_form.json"
COEFFICIENTS = {"quintic": QUINTIC * 5, "polar": POLAR}
SHAPES = ((256, 512), (256, 1024))
SPECTRA = {"noise": None, "1/i": 1.0, "1/i^2": 2.0}
"""Singular values: of Gaussian noise, or falling with their number."""
RESTARTS: dict[str, tuple[int, ...] | None] = {
    "direct": None, "Gram": (), "Gram, restart at 2": (2,), "Gram, restarts at 2, 4": (2, 4),
}  # fmt: skip
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STEPS = 5
LEAST_ASPECT = 2


def iterated(x: Tensor, steps: Any, dtype: torch.dtype, restarts: Sequence[int] | None) -> Tensor:
    """Orthogonalises a wide matrix whose norm is one; every product is rounded to a dtype.

    Args:
        x: ``[rows, columns]``, in the dtype of the sums.
        steps: a, b, c of each step.
        dtype: What every stored matrix is rounded to.
        restarts: Steps before which the Gram form begins anew; None for the direct form.
    """

    def rounded(value: Tensor) -> Tensor:
        return value.to(dtype).to(x.dtype)

    x = rounded(x)
    gram, q = rounded(x @ x.mT), None
    for step, (a, b, c) in enumerate(steps):
        if step and (restarts is None or step in restarts):
            x, q = x if q is None else rounded(q @ x), None
            gram = rounded(x @ x.mT)
        polynomial = rounded(b * gram + c * (gram @ gram))
        if restarts is None:
            x = rounded(a * x + polynomial @ x)
            continue
        identity = torch.eye(len(x), dtype=x.dtype)
        q = rounded(
            a * (identity if q is None else q) + polynomial @ (identity if q is None else q)
        )
        if step + 1 < len(steps) and step + 1 not in restarts:
            # Polynomials of one matrix commute: both products are symmetric.
            half = rounded(a * gram + polynomial @ gram)
            gram = rounded(a * half + half @ polynomial)
    return x if q is None else rounded(q @ x)


def products(restarts: Sequence[int] | None, steps: int = STEPS) -> tuple[int, int]:
    """FLOPs for an h x w matrix, in h² w and in h³; of symmetric products one triangle."""
    if restarts is None:
        return 3 * steps, steps
    runs = 1 + len(restarts)
    # The square in each step; in each but the first of a run Q, and two for the Gram matrix.
    return 3 * runs, steps + 3 * (steps - runs)


def flops(blocks: Sequence[tuple[int, int]], restarts: Sequence[int] | None) -> int:
    """Of all blocks; where they are not twice as wide as high, of the direct form."""
    total = 0
    for high, wide in map(sorted, blocks):
        across, square = products(restarts if wide >= LEAST_ASPECT * high else None)
        total += across * high * high * wide + square * high**3
    return total


def drawn(shape: tuple[int, int], fall: float | None, seed: int) -> Tensor:
    """A matrix with the norm one, FP64, of numbers that BF16 has."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    if fall is not None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        matrix = u @ torch.arange(1.0, len(s) + 1, dtype=s.dtype).pow(-fall).diag() @ vh
    return (matrix / matrix.norm()).bfloat16().double()


def worst_distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """The largest relative distance in the Frobenius norm; None where it is not finite."""
    pairs = zip(found, expected)
    apart = torch.stack([(f.double() - e.double()).norm() / e.double().norm() for f, e in pairs])
    return float(apart.max()) if bool(apart.isfinite().all()) else None


def errors(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Relative distance from FP64, and from the direct form in the same dtype.

    The worst of the seeds; None where it is not finite.
    """
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for spectrum, fall in SPECTRA.items():
            matrices = [drawn(shape, fall, seed) for seed in seeds]
            for kind, steps in COEFFICIENTS.items():
                exact = [iterated(matrix, steps, torch.float64, None) for matrix in matrices]
                for dtype in DTYPES:
                    direct = [iterated(m.float(), steps, dtype, None) for m in matrices]
                    for form, restarts in RESTARTS.items():
                        found = [iterated(m.float(), steps, dtype, restarts) for m in matrices]
                        row = {"shape": "x".join(map(str, shape)), "singular values": spectrum}
                        row |= {"steps": kind, "form": form, "dtype": f"{dtype}".split(".")[1]}
                        for name, others in (("error", exact), ("from direct", direct)):
                            row[name] = worst_distance(found, others)
                        rows.append(row)
    return rows


def counts() -> list[dict[str, Any]]:
    """FLOPs of a step for GPT-2's matrices, in each form, without what whole tiles add."""
    rows = []
    for size in GPT2_SIZES:
        blocks = [m.block for m in size.matrices() for _ in range(m.grid[0] * m.grid[1])]
        every = {form: flops(blocks, restarts) for form, restarts in RESTARTS.items()}
        rows.append({"model": f"GPT-2 {size.name}", "flops": every})
    return rows


@dataclass(frozen=True)
class Options:
    """The flags."""

    seeds: tuple[int, ...] = (0, 1, 2)
    output: Path = OUTPUT  # the JSON file


def main(arguments: Sequence[str] | None = None) -> int:
    """Computes and counts, prints both, and writes the JSON file."""
    options: Options = parse(Options, arguments, prog="gram_form.py", description=__doc__)
    torch.set_num_threads(1)
    found = errors(options.seeds)
    shown = Table(title="Distance from FP64, and from the direct form: the worst of all matrices")
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    for name in ("steps", "form", *names):
        shown.add_column(name)
    for kind, form in itertools.product(COEFFICIENTS, RESTARTS):
        rows = [row for row in found if (row["steps"], row["form"]) == (kind, form)]
        cells = []
        for name in names:
            both = [
                max(math.inf if row[what] is None else row[what] for row in rows
                    if row["dtype"] == name)
                for what in ("error", "from direct")
            ]  # fmt: skip
            cells.append(", ".join(f"{value:.2g}" for value in both))
        shown.add_row(kind, form, *cells)
    console = Console(width=130)
    console.print(shown)
    counted = counts()
    for row in counted:
        direct = row["flops"]["direct"]
        words = (f"{form} {count / direct:.3f}" for form, count in row["flops"].items())
        console.print(f"{row['model']}: {direct / 1e12:.3f} TFLOP directly; {', '.join(words)}")
    content = {
        "benchmark": "gram_form",
        "kind": "errors computed on a CPU with rounded products, FLOPs counted; nothing was timed",
        "versions": versions(("torch", "triton")),
        "seeds": options.seeds,
        "errors": found,
        "counts": counted,
    }
    write_json(options.output, content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
