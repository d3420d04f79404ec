"""Counts launches and multiplications of one Muon step for GPT-2, beside ``torch.optim.Muon``'s.

    python examples/benchmarks/muon_cost.py

Needs no GPU: what the kernels compute is written in the tables of their launches, and torch's
operations are counted on tensors without memory. It is a count and no measurement: how fast a
multiplication is, and how long a launch takes, is for ``gpu/`` to tell.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from triton_hybrid.kernels.launch import Tiling
from triton_hybrid.kernels.matrices import FIELD, SCRATCH_BYTES, MatrixSet, MatrixTiling, Wave
from triton_hybrid.kernels.multi_tensor import TensorSet

from lib.environment import versions
from lib.files import write_json
from lib.flags import parse
from lib.gpt2_shapes import GPT2_SIZES, Gpt2Size, Matrix

# Internals of the library, all there are here: the tables of the launches are counted.
from triton_hybrid.rules.muon import MUON, schedule

OUTPUT = Path(__file__).resolve().parent / "results" / "muon_cost.json"
META, CPU = torch.device("meta"), torch.device("cpu")
SEQUENCES, LENGTH = 16, 1024
COLUMNS = ("matrices", "launches", "TFLOP", "of dense", "of forward+backward", "scratch MiB")
LAUNCHES_BEFORE = 2  # the three of each step, in each wave: gathering, and dividing by the norms
LAUNCHES_BESIDE = 2  # of `step` for a set of Muon: the statistics and the update
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
    """What one step of ours launches and computes."""

    blocks: int  # matrices that are orthogonalised
    waves: int  # groups of them that share launches
    launches: int  # of kernels, all together
    flops: int  # of the tiles that are computed
    padded_flops: int  # of all tiles, as many as without the symmetric saving
    dense_flops: int  # of the blocks, without padding and without the saving
    scratch_bytes: int  # what the products need at a time
    update_bytes: int  # of the orthogonalised momentum, kept until the update has read it


@dataclass(frozen=True)
class TorchCost:
    """What one step of ``torch.optim.Muon`` launches and computes."""

    matrices: int  # its parameters
    launches: int  # operations that are no views
    flops: int  # of the matrix products
    operations: dict[str, int]  # how often each is called


def our_cost(
    matrices: Sequence[Matrix], tiling: MatrixTiling | None = None, limit: int = SCRATCH_BYTES
) -> OurCost:
    """Counts what our kernels do; the tiling is that of BF16 on a GPU if None, `limit` in bytes."""
    params = [torch.empty(matrix.shape, device=META) for matrix in matrices]
    rows = {"param": params, "exp_avg": params, "update": [p.bfloat16() for p in params]}
    steps = schedule(MUON.defaults)
    # No chunk is ever made here: any tiling of the element-wise kernels serves.
    tensors = TensorSet(rows, Tiling(1024, 1024, 1))
    grids = [matrix.grid for matrix in matrices]
    count = len(matrices)
    bound = MatrixSet(tensors, grids, [steps] * count, tiling, limit)
    # The same tables again, where they can be read.
    waves = [Wave(wave.blocks, wave.coefficients, bound.tiling, CPU) for wave in bound.waves]
    flops = [wave_flops(wave, bound.tiling.tile) for wave in waves]
    launches = [LAUNCHES_BEFORE + 3 * len(wave.coefficients) for wave in waves]
    blocks = [block for wave in waves for block in wave.blocks]
    dense = sum(4 * h * h * w + 2 * h**3 for h, w in (block.shape for block in blocks))
    return OurCost(
        blocks=len(blocks),
        waves=len(waves),
        launches=sum(launches) + LAUNCHES_BESIDE,
        flops=sum(computed for computed, _ in flops),
        padded_flops=sum(padded for _, padded in flops),
        dense_flops=len(steps) * dense,
        scratch_bytes=sum(part.nbytes for part in bound.scratch()),
        update_bytes=sum(view.nbytes for view in rows["update"]),
    )


def wave_flops(wave: Wave, tile: int) -> tuple[int, int]:
    """FLOPs of the tiles that a wave's products compute, and of all their tiles."""

    def inner(programs: Tensor, length: str) -> int:
        return int(wave.table[programs[:, 0].long(), FIELD[length]].sum())

    height, width = wave.table[:, FIELD["height"]], wave.table[:, FIELD["width"]]
    # The Gram matrix and its square, of which the upper triangle is a mirror.
    symmetric = inner(wave.halves, "width") + inner(wave.halves, "height")
    square = int(((height // tile) ** 2 * (width + height)).sum())
    product = inner(wave.tiles, "height")
    scale = 2 * tile * tile * len(wave.coefficients)
    return scale * (symmetric + product), scale * (square + product)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that launch something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts an operation and runs it; torch's notes for its profiler are none."""
        if func.namespace == "aten" and not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def torch_cost(shapes: Sequence[tuple[int, int]]) -> TorchCost | None:
    """Counts what ``torch.optim.Muon`` does to parameters; None where torch has none."""
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
    """FLOPs of a forward and a backward pass over some tokens in sequences of a length."""
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


def table(models: Sequence[dict[str, Any]]) -> Table:
    """The counts, as a table."""
    shown = Table(title="One step of Muon for the hidden matrices, counted and not measured")
    for name in ("model", "step"):
        shown.add_column(name)
    for name in COLUMNS:
        shown.add_column(name, justify="right")
    for model in models:
        dense, training = model["ours"]["dense_flops"], model["forward_backward_flops"]
        for name in ("ours", "torch.optim.Muon, same blocks", "torch.optim.Muon, c_attn whole"):
            cost = model[name]
            if cost is not None:
                scratch, flops = cost.get("scratch_bytes"), cost["flops"]
                shown.add_row(
                    model["model"], name, str(cost.get("blocks", cost.get("matrices"))),
                    str(cost["launches"]), f"{flops / 1e12:.3f}", f"{flops / dense:.3f}",
                    f"{flops / training:.1%}", f"{scratch / 2**20:.0f}" if scratch else "-",
                )  # fmt: skip
    return shown


def report() -> dict[str, Any]:
    """Counts for every model, with what they depend on."""
    return {
        "benchmark": "muon_cost",
        "kind": "a count of launches and multiplications, not a measurement: nothing ran on a GPU",
        "gpu": None,
        "versions": versions(("torch", "triton")),
        "ns_steps": MUON.defaults["ns_steps"],
        "batch": {"sequences": SEQUENCES, "length": LENGTH},
        "formulas": FORMULAS,
        "models": [model_cost(size) for size in GPT2_SIZES],
    }


@dataclass(frozen=True)
class Options:
    """The flags."""

    output: Path = OUTPUT  # the JSON file


def main(arguments: Sequence[str] | None = None) -> int:
    """Counts, prints the table and writes the JSON file."""
    options: Options = parse(Options, arguments, prog="muon_cost.py", description=__doc__)
    content = report()
    Console(width=130).print(table(content["models"]))  # also where the output is no terminal
    write_json(options.output, content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
