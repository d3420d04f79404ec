"""Tensors beyond 2^31 elements, ten thousand small ones, empty ones: nothing of it in real memory.

Three kinds of evidence: small tensors whose addresses are moved down and offsets up (`far_away`),
tensors of their full length in memory that no page stands behind until it is written, and the
tables of tensors without memory.
"""

from __future__ import annotations

import copy
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_launches import KERNELS, RUN, chunks_in_kernel, far_away
from kernel_memory import assert_same_bits
from kernel_problems import Problem
from kernel_specs import BF16, FP32, GROUPS, ON_GPU, ONE, THREE, hyper_table, plain
from test_newton_schulz import matrices, orthogonalised
from torch import Tensor
from triton_hybrid.kernels.backend import TRITON
from triton_hybrid.kernels.matrices import FIELD
from triton_hybrid.kernels.multi_tensor import ChunkTable, TensorSet
from triton_hybrid.kernels.rows import ROW, SPLIT
from triton_hybrid.kernels.scalars import Scalars

from triton_hybrid import HybridConfig, HybridOptimizer
from triton_hybrid.rules import RULES

HALF, WHOLE = 1 << 31, 1 << 32
SPECS = plain((300,), (7, 9), (0,), ())
DISTANCES = {
    "from 2^31": HALF + 4096,  # where 32 bits with a sign end
    "across 2^31": HALF - 128,  # within the first tensor, between two of its chunks
    "from 2^32": WHOLE + 4096,  # where 32 bits without one begin anew
    "across 2^32": WHOLE - 128,
    "from 2^40": (1 << 40) + 4096,
}


PASSES = [(name, "adamw") for name in RUN if name != "step"]
PASSES += [("clipped step", "lion"), ("predict", "lion")]


@pytest.mark.parametrize(("name", "rule"), PASSES)
def test_every_pass_reaches_elements_beyond_32_bits(name: str, rule: str) -> None:
    """Each distance with one precision, each precision with one distance or two."""
    for number, precision in enumerate((FP32, BF16, BF16._replace(kept=SPLIT))):
        options: dict[str, Any] = {"precision": precision, "rule": rule}
        options["tiling"] = ONE if "step" in name else THREE
        near = Problem(SPECS, **options)
        expected = RUN[name](KERNELS, near)
        for distance in list(DISTANCES.values())[number::3]:
            far = Problem(SPECS, **options)
            with far_away(far.tensors, distance):
                found = RUN[name](KERNELS, far)
            far.assert_same(near)
            if isinstance(expected, Tensor):
                assert_same_bits(found, expected, name)


# ------------------------------------------------------ full length, without pages behind it

NO_RESERVE = 0x4000
sparse_only = pytest.mark.skipif(
    ON_GPU or sys.platform != "linux", reason="memory without pages is the host's, on Linux"
)


def sparse(length: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory where they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, length * dtype.itemsize, flags), dtype=dtype)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@sparse_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_one_tensor_of_more_than_2_to_the_31_elements(dtype: torch.dtype) -> None:
    """The launch as it is, but that only the chunks are worked on that hold anything."""
    length = HALF + (3 << 16) + 77
    before = resident()
    names = {"param": dtype, "grad": dtype, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}
    if dtype != torch.float32:
        names["weight"] = torch.float32
    rule = RULES["adamw"].kernels

    def stepped(rows: dict[str, Tensor], picked: list[int] | None) -> TensorSet:
        tensors = TensorSet({name: [row] for name, row in rows.items()}, rule=rule)
        scalars = Scalars([tensors])
        scalars.hyperparameters = hyper_table(GROUPS[:1], "adamw")
        whole = tensors.chunks()
        if picked is not None:
            assert whole.count == -(-length // tensors.tiling.chunk)
            few = copy.copy(whole)
            few.places, few.count = whole.places[picked].contiguous(), len(picked)
            tensors.__dict__["chunks"] = lambda every=False: few
        TRITON.step([tensors], scalars, max_norm=None, slow_beta=0.0, observed=False)
        return tensors

    huge = {name: sparse(length, kind) for name, kind in names.items()}
    chunk = 1 << 16
    # The first, the last below 2^31, the first from there on, and the one with the end in it.
    picked = [0, HALF // chunk - 1, HALF // chunk, length // chunk]
    parts = [slice(n * chunk, min((n + 1) * chunk, length)) for n in picked]
    generator = torch.Generator().manual_seed(0)
    small: dict[str, Tensor] = {}
    for name, kind in names.items():
        drawn = [torch.randn(part.stop - part.start, generator=generator) for part in parts]
        values = [(d.square() if name == "exp_avg_sq" else d).to(kind) for d in drawn]
        if name == "weight":
            values = [huge["param"][part].float() for part in parts]
        for part, value in zip(parts, values):
            huge[name][part] = value
        small[name] = torch.cat(values)
    far, near = stepped(huge, picked), stepped(small, None)
    assert far.tables()[1].tolist() == [2 * length + 1]
    assert far.steps.tolist() == near.steps.tolist() == [1.0]
    for name in names:
        found = torch.cat([huge[name][part] for part in parts])
        assert_same_bits(found, small[name], name)
        beside = slice(parts[2].stop, parts[2].stop + chunk)
        assert not huge[name][beside].any(), "what no chunk names stays as it was"
    assert resident() - before < 256 << 20, "gigabytes were touched"


@sparse_only
def test_matrices_and_their_scratch_lie_beyond_32_bits() -> None:
    shapes = ((20, 33), (33, 20), (16, 16))
    near, far = (matrices(shapes, products="bfloat16") for _ in "ab")
    expected = orthogonalised(near)
    distance = WHOLE + 4096
    held = far.tensors.matrices
    assert held is not None
    first, second, gram, square, squares = held.scratch()
    buffers = [
        sparse(part.numel() + distance, part.dtype) for part in (first, second, gram, square)
    ]
    held._scratch = (*buffers, squares)
    before = resident()
    for wave in held.waves:
        wave.table = wave.table.clone()
        for column in ("offset", "place", "gram_place"):
            wave.table[:, FIELD[column]] += distance
    with far_away(far.tensors, distance):
        found = orthogonalised(far)
    for shape, mine, theirs in zip(shapes, found, expected):
        assert_same_bits(mine, theirs, f"matrix of {shape}")
    assert near.tensors.matrices is not None
    assert_same_bits(buffers[0][distance:], near.tensors.matrices.scratch()[0], "scratch")
    assert resident() - before < 256 << 20, "gigabytes were touched"


# ------------------------------------------------------------------------------- the tables


LENGTHS = (0, 5, (1 << 33) + 8192 + 3, 0, 8192, 1)


def test_tables_of_a_tensor_of_2_to_the_33_elements_without_memory() -> None:
    """As they are made for a GPU: chunks, extents and, in a kernel, what is read of them."""
    params = [torch.empty(length, device="meta") for length in LENGTHS]
    tensors = TensorSet({"param": params})
    assert tensors.lengths == list(LENGTHS)
    table = ChunkTable(LENGTHS, [True] * len(LENGTHS), 8192, torch.device("cpu"))
    counts = [-(-length // 8192) for length in LENGTHS]
    assert table.count == sum(counts) == 2**20 + 2 + 1 + 1 + 1
    assert table.first.tolist() == [0, *torch.tensor(counts).cumsum(0).tolist()]
    own = table.places[table.first[2] : table.first[3]]
    assert (own[:, 0] == 2).all()
    assert torch.equal(own[:, 1], torch.arange(counts[2]) * 8192)
    few = copy.copy(table)
    few.places = table.places[
        [0, 1, 2**18, 2**18 + 1, 2**20 + 1, 2**20 + 2, 2**20 + 3]
    ].contiguous()
    extents = torch.tensor([2 * length + 1 for length in LENGTHS])
    device = torch.device("cuda") if ON_GPU else torch.device("cpu")
    huge = LENGTHS[2]
    assert chunks_in_kernel(few.places.to(device), extents.to(device), 1024, 8192) == [
        [1, 0, 5, 0, 5],
        [2, 0, huge, 1, 8192],
        [2, HALF - 8192, huge, 1, 8192],
        [2, HALF, huge, 1, 8192],
        [2, 2 * WHOLE, huge, 1, 8192],
        [2, 2 * WHOLE + 8192, huge, 0, 3],
        [4, 0, 8192, 1, 8192],
    ]


COUNT = 10_000


def test_tables_of_ten_thousand_tensors_empty_ones_and_a_large_one() -> None:
    lengths = [(7 * n) % 13 for n in range(COUNT)]
    lengths[4321] = 200_000
    present = [n % 17 != 0 for n in range(COUNT)]
    memory = torch.arange(sum(lengths), dtype=torch.float32)
    rows = list(memory.split(lengths))
    tensors = TensorSet({"param": rows, "grad": [r if p else None for r, p in zip(rows, present)]})
    chunk = tensors.tiling.chunk
    table, every = tensors.chunks(), tensors.chunks(every=True)
    counts = torch.tensor([-(-length // chunk) for length in lengths])
    assert every.count == int(counts.sum())
    assert table.count == int((counts * torch.tensor(present)).sum())
    assert torch.equal(every.first[1:].long(), counts.cumsum(0))
    indices = torch.arange(COUNT)
    assert torch.equal(every.places[:, 0], indices.repeat_interleave(counts))
    assert table.present.tolist() == [int(here) for here in present]
    addresses, extents = tensors.tables()
    expected = [row.data_ptr() if row.numel() else 0 for row in rows]
    assert addresses[:, ROW["param"]].tolist() == expected
    places = [0 if not here else address for here, address in zip(present, expected)]
    assert addresses[:, ROW["grad"]].tolist() == places
    aligned = [int(address % 16 == 0) for address in expected]
    assert extents.tolist() == [2 * length + a for length, a in zip(lengths, aligned)]


@pytest.mark.parametrize("predictor", ["none", "slow_ema"])
def test_ten_thousand_tensors_step_as_one(predictor: str) -> None:
    """Element-wise, a tensor may be cut anywhere: plain torch, empty tensors among them."""
    lengths = [n % 7 for n in range(COUNT)]
    torch.manual_seed(0)
    values, gradients = torch.randn(sum(lengths)), torch.randn(3, sum(lengths))
    config = HybridConfig(
        predictor=predictor, warmup_steps=1, full_steps=1, max_predict_steps=1,
        correction_interval=1, confidence_threshold=0.0, divergence_threshold=1e3,
    )  # fmt: skip
    results = []
    for cuts in (lengths, [sum(lengths)]):
        params = [torch.nn.Parameter(part.clone()) for part in values.split(cuts)]
        optimizer = HybridOptimizer(params, lr=1e-2, hybrid=config, backend="torch")
        for step in gradients:
            for param, grad in zip(params, step.split(cuts)):
                param.grad = grad.clone()
            optimizer.step()
        assert (optimizer.stats().predicted_steps > 0) == (predictor == "slow_ema")
        with optimizer.verified_weights():
            results.append(torch.cat([param.detach() for param in params]))
    many, one = results
    torch.testing.assert_close(many, one, rtol=2e-6, atol=1e-7)
    assert not torch.equal(many, values)
