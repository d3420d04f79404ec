"""Counts launches and multiplications of one Muon step for GPT-2, beside ``torch.optim.Muon``'s.

    python examples/benchmarks/muon_cost.py

Needs no GPU: what the kernels compute is written in the tables of their launches, and torch's
operations are counted on tensors without memory. It is a count and no measurement: how fast a
multiplication is, and how long a launch takes, is for ``gpu_suite.py`` to tell.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from suite_gpt2_shapes import GPT2_SIZES, Gpt2Size, Matrix
from suite_records import grid
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from triton_hybrid.base.muon import MUON_DEFAULTS, schedule
from triton_hybrid.kernels.chunks import TensorSet, Tiling
from triton_hybrid.kernels.matrices import FIELD, SCRATCH_BYTES, MatrixSet, MatrixTiling, Wave

OUTPUT = Path(__file__).resolve().parent / "results" / "muon_cost.json"
META, CPU = torch.device("meta"), torch.device("cpu")
SEQUENCES, LENGTH = 16, 1024
LAUNCHES_BEFORE = 2
"""Of `orthogonalise` for each wave, before the three of each step: gathering, and dividing by
the norms."""
LAUNCHES_BESIDE = 2
"""Of `adamw_step` for a set of Muon: the statistics and the update."""
FORMULAS = {
    "flops": "a multiplication and an addition are two",
    "ours": "2 tile^2 inner for each tile that a launch computes, padding included",
    "dense": "steps (4 h^2 w + 2 h^3) for each block of h rows and w >= h columns",
    "torch.optim.Muon launches": "operations that are no views; one launch each, though some, "
    "such as addmm with its copy of the addend, take more",
    "forward and backward": "6 parameters tokens + 12 layers width length tokens",
}


@dataclass(frozen=True)
class OurCost:
    """What one step of ours launches and computes.

    Attributes:
        blocks: Matrices that are orthogonalised.
        waves: Groups of them that share launches.
        launches: Of kernels, all together.
        flops: Of the tiles that are computed.
        padded_flops: Of all tiles, as many as without the symmetric saving.
        dense_flops: Of the blocks, without padding and without the saving.
        scratch_bytes: What the products need at a time.
        update_bytes: Of the orthogonalised momentum, kept until the update has read it.
    """

    blocks: int
    waves: int
    launches: int
    flops: int
    padded_flops: int
    dense_flops: int
    scratch_bytes: int
    update_bytes: int


@dataclass(frozen=True)
class TorchCost:
    """What one step of ``torch.optim.Muon`` launches and computes.

    Attributes:
        matrices: Its parameters.
        launches: Operations that are no views.
        flops: Of the matrix products.
        operations: How often each is called.
    """

    matrices: int
    launches: int
    flops: int
    operations: dict[str, int]


def our_cost(
    matrices: Sequence[Matrix], tiling: MatrixTiling | None = None, limit: int = SCRATCH_BYTES
) -> OurCost:
    """Counts what our kernels do, by the tables that they are launched with.

    Args:
        matrices: The matrices.
        tiling: How products are cut; that of BF16 on a GPU when None.
        limit: Bytes of scratch memory.
    """
    params = [torch.empty(matrix.shape, device=META) for matrix in matrices]
    rows = {"param": params, "exp_avg": params, "update": [p.bfloat16() for p in params]}
    steps = schedule(MUON_DEFAULTS)
    # No chunk is ever made here: any tiling of the element-wise kernels serves.
    tensors = TensorSet(rows, Tiling(1024, 1024, 1))
    grids = [matrix.grid for matrix in matrices]
    count = len(matrices)
    bound = MatrixSet(tensors, grids, [steps] * count, [1.0] * count, tiling, limit)
    flops = padded_flops = launches = 0
    for planned in bound.waves:
        # The same tables again, where they can be read.
        wave = Wave(planned.blocks, planned.coefficients, bound.tiling, CPU)
        computed, padded = wave_flops(wave, bound.tiling.tile)
        flops += computed
        padded_flops += padded
        launches += LAUNCHES_BEFORE + 3 * len(wave.coefficients)
    blocks = [block for wave in bound.waves for block in wave.blocks]
    dense = sum(4 * h * h * w + 2 * h**3 for h, w in (block.shape for block in blocks))
    return OurCost(
        blocks=len(blocks),
        waves=len(bound.waves),
        launches=launches + LAUNCHES_BESIDE,
        flops=flops,
        padded_flops=padded_flops,
        dense_flops=len(steps) * dense,
        scratch_bytes=sum(part.nbytes for part in bound.scratch()),
        update_bytes=sum(view.nbytes for view in rows["update"]),
    )


def wave_flops(wave: Wave, tile: int) -> tuple[int, int]:
    """FLOPs of the tiles that a wave's products compute, and of all their tiles.

    Args:
        wave: With tables that can be read.
        tile: Rows and columns of a tile.
    """

    def inner(programs: Tensor, length: str) -> int:
        return int(wave.table[programs[:, 0].long(), FIELD[length]].sum())

    height, width = wave.table[:, FIELD["height"]], wave.table[:, FIELD["width"]]
    # The Gram matrix and its square, of which the upper triangle is a mirror.
    symmetric = inner(wave.halves, "width") + inner(wave.halves, "height")
    square = int(((height // tile) ** 2 * (width + height)).sum())
    product = inner(wave.tiles, "height")
    scale = 2 * tile * tile * len(wave.coefficients)
    return scale * (symmetric + product), scale * (square + product)


class Operations(TorchDispatchMode):
    """Counts the operations that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts an operation and runs it; torch's notes for its profiler are none."""
        if func.namespace == "aten" and not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def torch_cost(shapes: Sequence[tuple[int, int]]) -> TorchCost | None:
    """Counts what ``torch.optim.Muon`` does; None where torch has none.

    Args:
        shapes: Of its parameters.
    """
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        return None
    params = [nn.Parameter(torch.empty(shape, device=META)) for shape in shapes]
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer = muon(params, adjust_lr_fn="match_rms_adamw")
    # The first step makes the momenta.
    optimizer.step()
    products = FlopCounterMode(display=False)
    with products, Operations() as operations:
        optimizer.step()
    counts = dict(operations.counts)
    return TorchCost(len(params), sum(counts.values()), products.get_total_flops(), counts)


def training_flops(size: Gpt2Size, tokens: int = SEQUENCES * LENGTH, length: int = LENGTH) -> int:
    """FLOPs of a forward and a backward pass.

    Args:
        size: Of the model.
        tokens: In the batch.
        length: Of a sequence.
    """
    attention = 12 * size.layers * size.width * length * tokens
    return 6 * size.parameters * tokens + attention


def model_cost(size: Gpt2Size) -> dict[str, Any]:
    """Everything about one model, for the JSON file."""
    matrices = size.matrices()
    ours = our_cost(matrices)
    blocks = [m.block for m in matrices for _ in range(math.prod(m.grid))]
    torch_blocks, torch_whole = torch_cost(blocks), torch_cost([m.shape for m in matrices])
    training = training_flops(size)
    return {
        "model": f"GPT-2 {size.name}",
        "parameters": size.parameters,
        "parameters_of_muon": sum(math.prod(m.shape) for m in matrices),
        "matrices": len(matrices),
        "ours": dataclasses.asdict(ours),
        "torch.optim.Muon, same blocks": torch_blocks and dataclasses.asdict(torch_blocks),
        "torch.optim.Muon, c_attn whole": torch_whole and dataclasses.asdict(torch_whole),
        "forward_backward_flops": training,
        "our_flops_of_forward_backward": ours.flops / training,
        "our_flops_of_dense": ours.flops / ours.dense_flops,
    }


def table(models: Sequence[dict[str, Any]]) -> str:
    """The counts, as text."""
    head = (
        "model", "step", "matrices", "launches", "TFLOP", "of dense", "of forward+backward",
        "scratch MiB",
    )  # fmt: skip
    lines = []
    for model in models:
        dense, training = model["ours"]["dense_flops"], model["forward_backward_flops"]
        for name in ("ours", "torch.optim.Muon, same blocks", "torch.optim.Muon, c_attn whole"):
            cost = model[name]
            if cost is None:
                continue
            scratch = cost.get("scratch_bytes")
            flops = cost["flops"]
            lines.append((
                model["model"], name, str(cost.get("blocks", cost.get("matrices"))),
                str(cost["launches"]), f"{flops / 1e12:.3f}", f"{flops / dense:.3f}",
                f"{100 * flops / training:.1f}%", f"{scratch / 2**20:.0f}" if scratch else "-",
            ))  # fmt: skip
    return grid(head, lines)


def report() -> dict[str, Any]:
    """Counts for every model, with what they depend on."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "triton"):
        versions[package] = importlib.metadata.version(package)
    return {
        "benchmark": "muon_cost",
        "kind": "a count of launches and multiplications, not a measurement: nothing ran on a GPU",
        "gpu": None,
        "versions": versions,
        "ns_steps": MUON_DEFAULTS["ns_steps"],
        "batch": {"sequences": SEQUENCES, "length": LENGTH},
        "formulas": FORMULAS,
        "models": [model_cost(size) for size in GPT2_SIZES],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Counts, prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, metavar="FILE",
        help="the JSON file (default: muon_cost.json among the results)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    content = report()
    print("One step of Muon for the hidden matrices, counted and not measured")
    print(table(content["models"]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    options.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
