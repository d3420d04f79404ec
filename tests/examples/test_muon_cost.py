"""The count of Muon's launches and multiplications."""

from __future__ import annotations

import json
from pathlib import Path

import muon_cost
import pytest
import torch
from kernel_launches import counted_launches
from rich.console import Console
from torch import nn
from triton_hybrid.kernels.launch import INTERPRETED
from triton_hybrid.kernels.matrices import MatrixTiling

from gpu.muon import hybrid_muon
from lib.gpt2_shapes import GPT2_SIZES, PARAMETERS, Gpt2Size, Matrix

SMALL = MatrixTiling(32, 32, 32, 4)
TINY = Gpt2Size("tiny", 64, 2)
needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="this torch has no torch.optim.Muon"
)


def test_what_one_tile_costs() -> None:
    cost = muon_cost.our_cost([Matrix((32, 32))], SMALL)
    assert (cost.blocks, cost.waves, cost.launches) == (1, 1, 2 + 2 + 3 * 5)
    assert cost.flops == cost.padded_flops == cost.dense_flops == 5 * 3 * 2 * 32**3
    # The matrix twice, its Gram matrix twice, and the square of its tile.
    assert cost.scratch_bytes == 4 * 32 * 32 * 2 + 4
    assert cost.update_bytes == 32 * 32 * 2


def test_padding_counts_and_the_mirror_does_not() -> None:
    """Two tiles by three: three of four Gram tiles are computed, twice."""
    cost = muon_cost.our_cost([Matrix((40, 90))], SMALL)
    tile = 5 * 2 * 32 * 32
    assert cost.flops == tile * (3 * 96 + 3 * 64 + 6 * 64)
    assert cost.padded_flops == tile * (4 * 96 + 4 * 64 + 6 * 64)
    assert cost.dense_flops == 5 * (4 * 40 * 40 * 90 + 2 * 40**3)
    # Scratch memory holds matrices wide.
    assert muon_cost.our_cost([Matrix((90, 40))], SMALL) == cost


def test_blocks_are_matrices_and_waves_are_launches() -> None:
    fused = muon_cost.our_cost([Matrix((64, 192), (1, 3))], SMALL)
    apart = muon_cost.our_cost([Matrix((64, 64))] * 3, SMALL)
    assert fused == apart
    assert fused.waves == 1
    each = muon_cost.our_cost([Matrix((64, 64))] * 3, SMALL, limit=1)
    assert (each.waves, each.launches) == (3, 2 + 3 * 17)
    assert each.flops == apart.flops
    assert each.scratch_bytes < apart.scratch_bytes


@pytest.mark.skipif(not INTERPRETED, reason="launches are the same there")
def test_the_optimizer_launches_as_often_as_counted() -> None:
    matrices = [Matrix((24, 32)), Matrix((32, 16))]
    params = [nn.Parameter(torch.randn(matrix.shape)) for matrix in matrices]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = hybrid_muon(params, matrices)
    with counted_launches() as launches:  # from the first launch on: later ones repeat it
        optimizer.step()  # which looks at the parameters, too
        launches.clear()
        optimizer.step()
    assert len(launches) == muon_cost.our_cost(matrices).launches


@needs_muon
def test_torch_is_counted_by_its_operations() -> None:
    one = muon_cost.torch_cost([(48, 16)])
    two = muon_cost.torch_cost([(16, 48), (48, 16)])
    assert one is not None
    assert two is not None
    assert one.flops == 5 * (4 * 16 * 16 * 48 + 2 * 16**3)
    assert (two.flops, two.launches) == (2 * one.flops, 2 * one.launches)
    assert one.operations["aten.mm.default"] == 5
    assert one.operations["aten.addmm.default"] == 10
    assert not any("transpose" in name or "profiler" in name for name in one.operations)


def test_torch_without_muon_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    assert muon_cost.torch_cost([(16, 16)]) is None
    model = muon_cost.model_cost(TINY)
    assert model["torch.optim.Muon, same blocks"] is None
    console = Console(record=True, width=130)
    console.print(muon_cost.table([model]))
    assert "ours" in console.export_text()


def test_sizes_of_gpt2() -> None:
    assert GPT2_SIZES[0].parameters == PARAMETERS
    assert [size.parameters for size in GPT2_SIZES] == [PARAMETERS, 354_823_168, 1_557_611_200]
    assert [len(size.matrices()) for size in GPT2_SIZES] == [48, 96, 192]
    assert Matrix((768, 2304), (1, 3)).block == (768, 768)


def test_the_tokens_of_a_batch() -> None:
    flops = muon_cost.training_flops(TINY, tokens=10, length=5)
    assert flops == 6 * TINY.parameters * 10 + 12 * 2 * 64 * 5 * 10


def test_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(muon_cost, "GPT2_SIZES", (TINY,))
    output = tmp_path / "folder" / "cost.json"
    assert muon_cost.main(["--output", str(output)]) == 0
    content = json.loads(output.read_text(encoding="utf-8"))
    assert content["gpu"] is None
    assert "not a measurement" in content["kind"]
    assert content["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert set(content["versions"]) == {"python", "torch", "triton"}
    (model,) = content["models"]
    assert model["model"] == "GPT-2 tiny"
    assert model["ours"]["blocks"] == 2 * 6
    printed = capsys.readouterr().out
    assert "counted and not measured" in printed
    assert "GPT-2 tiny" in printed


def test_the_file_in_the_repository_is_of_these_models() -> None:
    content = json.loads(muon_cost.OUTPUT.read_text(encoding="utf-8"))
    assert [model["model"] for model in content["models"]] == [
        f"GPT-2 {size.name}" for size in GPT2_SIZES
    ]
    small = content["models"][0]
    assert small["ours"]["flops"] == muon_cost.our_cost(GPT2_SIZES[0].matrices()).flops
