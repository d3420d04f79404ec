"""Many tensors, one launch: the tables, and what they refuse."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import ONE, Arena, Problem, Spec, plain, spec_lists, specs
from triton_hybrid.kernels import chunks
from triton_hybrid.kernels.chunks import (
    INTERPRETED,
    MAX_PROGRAMS,
    ROW,
    ChunkTable,
    TensorSet,
    Tiling,
    default_tiling,
    dense_view,
    require_launchable,
    same_layout,
)

# --------------------------------------------------------------------------------- tiling


@pytest.mark.parametrize(
    ("block", "chunk", "programs", "named"),
    [
        (8, 64, 1, "block=8"),
        (0, 64, 1, "block=0"),
        (-64, 64, 1, "block=-64"),
        (96, 192, 1, "block=96"),
        (64, 32, 1, "chunk=32"),
        (64, 96, 1, "chunk=96"),
        (64, 0, 1, "chunk=0"),
        (64, 128, 0, "programs=0"),
        (64, 128, MAX_PROGRAMS + 1, f"programs={MAX_PROGRAMS + 1}"),
    ],
)
def test_tiling_names_what_it_refuses(block: int, chunk: int, programs: int, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: must be"):
        Tiling(block, chunk, programs)


def test_default_tiling_is_a_tiling(device: torch.device) -> None:
    tiling = default_tiling(device)
    assert tiling.chunk % tiling.block == 0
    if INTERPRETED:
        assert tiling.programs == 1, "programs that wait for each other hang the interpreter"


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET=1.*backend='torch'"):
        require_launchable(torch.device("cpu"))
    require_launchable(torch.device("cuda"))
    monkeypatch.setattr(chunks, "INTERPRETED", True)
    require_launchable(torch.device("cpu"))


# ----------------------------------------------------------------------------- dense views


@given(specs())
def test_dense_view_is_the_memory_of_any_permutation(device: torch.device, spec: Spec) -> None:
    arena = Arena(device)
    tensor = arena.carve(spec.shape, torch.float32, spec.order, spec.shift)
    flat = dense_view(tensor)
    assert flat.shape == (spec.numel,)
    assert flat.is_contiguous()
    if spec.numel:
        assert flat.data_ptr() == tensor.data_ptr()
    flat.copy_(torch.arange(spec.numel))
    permuted = tensor.permute(spec.order).reshape(-1)
    assert permuted.tolist() == list(range(spec.numel))
    arena.check()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(8)[::2],
        torch.zeros(4, 6)[:, :3],
        torch.zeros(1, 3).expand(4, 3),
        torch.zeros(3, 1).expand(3, 5),
        torch.zeros(8).as_strided((3, 3), (1, 1)),
        torch.zeros(9).as_strided((2, 2), (5, 2)),
        torch.zeros(()).expand(2),
    ],
    ids=["step", "columns", "expanded rows", "expanded columns", "overlap", "gaps", "scalar"],
)
def test_tensors_with_gaps_or_overlaps_are_refused_by_name(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="is not dense in memory") as caught:
        dense_view(tensor)
    assert str(tuple(tensor.shape)) in str(caught.value)
    assert str(tensor.stride()) in str(caught.value)
    with pytest.raises(ValueError, match=r"^row 'param', tensor 1: .*is not dense in memory"):
        TensorSet({"param": [torch.zeros(3), tensor]})


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 4), (2, 3, 0)])
def test_empty_tensors_of_any_shape_and_stride_are_dense(shape: tuple[int, ...]) -> None:
    for tensor in (torch.zeros(shape), torch.zeros(shape[::-1]).permute(*range(len(shape))[::-1])):
        assert dense_view(tensor).shape == (0,)
        assert len(TensorSet({"param": [tensor]})) == 1


def test_layout_ignores_strides_that_address_nothing() -> None:
    assert same_layout(torch.zeros(4, 1), torch.zeros(4, 1).as_strided((4, 1), (1, 77)))
    assert same_layout(torch.zeros(0, 3), torch.zeros(3, 0).T)
    assert not same_layout(torch.zeros(4, 4), torch.zeros(4, 4).T)


# ------------------------------------------------------------------------------ refusals


def rows(**changed: object) -> dict[str, object]:
    start = {"param": [torch.zeros(3), torch.zeros(2, 2)]}
    return {**start, **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"param": []}, r"rows\['param'\] is empty"),
        ({"momentum": [torch.zeros(3)] * 2}, "row 'momentum': must be one of"),
        ({"grad": [torch.zeros(3)]}, "row 'grad' has 1 tensors: must be 2"),
        (
            {"exp_avg": [torch.zeros(3), torch.zeros(4)]},
            r"row 'exp_avg', tensor 1: shape \(4,\).*must be \(2, 2\)",
        ),
        (
            {"grad": [torch.zeros(3, device="meta"), torch.zeros(2, 2)]},
            "row 'grad', tensor 0: .* on meta, must be .* on cpu",
        ),
        (
            {"grad": [torch.zeros(3), torch.zeros(2, 2, dtype=torch.float16)]},
            "row 'grad', tensor 1: dtype torch.float16, must be torch.float32",
        ),
        (
            {"param": [torch.zeros(3, dtype=torch.int64)]},
            "row 'param', tensor 0: dtype torch.int64, must be",
        ),
        (
            {"param": [torch.zeros(3, dtype=torch.complex64)]},
            "row 'param', tensor 0: dtype torch.complex64, must be",
        ),
        (
            {"snapshot": [torch.zeros(3), torch.zeros(2, 2).T]},
            r"row 'snapshot', tensor 1: strides \(1, 2\), must be those of its parameter, \(2, 1\)",
        ),
        (
            {"exp_avg": [torch.zeros(3).half(), torch.zeros(2, 2).half()]},
            "row 'exp_avg': dtype torch.float16, must be torch.float32 as 'weight'",
        ),
        (
            {"exp_avg": [None, torch.zeros(2, 2)]},
            "row 'exp_avg', tensor 0: None, allowed only for 'grad'",
        ),
        (
            {
                "param": [torch.zeros(3).half(), torch.zeros(2, 2).half()],
                "exp_avg": [torch.zeros(3), torch.zeros(2, 2)],
            },
            "row 'weight': dtype torch.float16, must be torch.float32 or torch.float64",
        ),
    ],
)
def test_tensor_set_names_what_it_refuses(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorSet(rows(**changed))  # type: ignore[arg-type]


def test_a_refused_row_leaves_the_set_as_it_was() -> None:
    tensors = TensorSet({"param": [torch.zeros(3)], "grad": [torch.ones(3)]}, ONE)
    before = [table.clone() for table in tensors.tables()]
    with pytest.raises(ValueError, match="shape"):
        tensors.set_row("grad", [torch.zeros(4)])
    assert tensors.flat["grad"][0].tolist() == [1, 1, 1]
    assert tensors.present == [True]
    assert all(torch.equal(a, b) for a, b in zip(before, tensors.tables()))


# ----------------------------------------------------------------------------- the tables


@given(spec_lists(absent=True))
def test_a_gradient_of_another_layout_is_read_in_the_order_of_its_parameter(
    device: torch.device, drawn: list[Spec]
) -> None:
    problem = Problem(drawn, device)
    for index, spec in enumerate(drawn):
        flat = problem.set.flat["grad"][index]
        if not spec.present:
            assert flat.numel() == 0
            continue
        ordered = problem.rows["grad"][index].permute(spec.order).reshape(-1)
        assert torch.equal(flat, ordered)
        shares_memory = flat.data_ptr() == problem.rows["grad"][index].data_ptr()
        if spec.numel:
            same = same_layout(problem.rows["grad"][index], problem.rows["param"][index])
            assert shares_memory == same


@pytest.mark.parametrize(
    "grad",
    [
        torch.tensor(2.0).expand(4, 3),
        torch.arange(24.0).view(8, 3)[::2],
        torch.ones(3, 1).expand(3, 4).T,
    ],
    ids=["expanded", "gaps", "transposed and expanded"],
)
def test_a_gradient_with_gaps_or_overlaps_is_copied(grad: torch.Tensor) -> None:
    for param in (torch.zeros(4, 3), torch.zeros(3, 4).T):
        tensors = TensorSet({"param": [param], "grad": [grad]})
        flat = tensors.flat["grad"][0]
        assert torch.equal(flat.as_strided(param.shape, param.stride()), grad)
        assert tensors.tables()[0][ROW["grad"], 0] == flat.data_ptr()


@given(
    st.lists(st.tuples(st.integers(0, 700), st.booleans()), min_size=1, max_size=6),
    st.sampled_from((64, 128, 192)),
)
def test_the_chunk_table_covers_each_element_once(
    device: torch.device, tensors: list[tuple[int, bool]], chunk: int
) -> None:
    lengths, present = zip(*tensors)
    table = ChunkTable(lengths, present, chunk, device)
    assert table.start.dtype == torch.int64, "offsets beyond 2^31 elements"
    assert table.count == len(table.tensor) == len(table.start)
    first = table.first.tolist()
    assert first[0] == 0
    assert first[-1] == table.count
    assert len(first) == len(lengths) + 1
    for index, (length, here) in enumerate(tensors):
        own = slice(first[index], first[index + 1])
        assert table.tensor[own].tolist() == [index] * (first[index + 1] - first[index])
        assert table.start[own].tolist() == (list(range(0, length, chunk)) if here else [])
    assert table.present.tolist() == [int(here) for here in present]


def test_addresses_and_alignment_are_those_of_the_tensors(device: torch.device) -> None:
    drawn = [replace(spec, shift=index) for index, spec in enumerate(plain((64,), (64,), (0,)))]
    problem = Problem(drawn, device)
    addresses, lengths, aligned = problem.set.tables()
    assert lengths.tolist() == [64, 64, 0]
    assert aligned.tolist() == [1, 0, 1], "an empty tensor has no address to be misaligned"
    for name, tensors in problem.rows.items():
        expected = [t.data_ptr() if t.numel() else 0 for t in tensors]
        assert addresses[ROW[name]].tolist() == expected


def test_one_misaligned_role_makes_its_tensor_misaligned(device: torch.device) -> None:
    problem = Problem(plain((64,), (64,)), device)
    assert problem.set.tables()[2].tolist() == [1, 1]
    shifted = problem.arena.carve((64,), torch.float32, shift=1)
    problem.set.set_row("exp_avg", [problem.rows["exp_avg"][0], shifted])
    assert problem.set.tables()[2].tolist() == [1, 0]


def test_tables_are_uploaded_only_after_a_change(device: torch.device) -> None:
    problem = Problem(plain((64,), (5, 7)), device)
    first = problem.set.tables()
    problem.set_gradients()
    assert all(a is b for a, b in zip(first, problem.set.tables()))
    other = [grad.clone() for grad in problem.rows["grad"]]
    problem.set.set_row("grad", other)
    addresses = problem.set.tables()[0]
    assert addresses is not first[0]
    assert addresses[ROW["grad"]].tolist() == [grad.data_ptr() for grad in other]


def test_the_chunk_cache_does_not_grow(device: torch.device) -> None:
    count = 7
    problem = Problem(plain(*[(3,)] * count), device)
    everything = problem.set.chunks(every=True)
    for pattern in range(1, 1 << count, 3):
        present = [bool(pattern >> bit & 1) for bit in range(count)]
        pairs = zip(problem.rows["grad"], present)
        problem.set.set_row("grad", [grad if here else None for grad, here in pairs])
        table = problem.set.chunks()
        assert table.present.tolist() == [int(here) for here in present]
        assert problem.set.chunks() is table
        assert problem.set.chunks(every=True) is everything, "in use, and so never dropped"
        assert len(problem.set._chunks) <= 8


def test_a_released_row_holds_no_memory_and_can_be_set_again(device: torch.device) -> None:
    param = torch.zeros(300, device=device)
    grad = torch.ones(300, device=device)
    tensors = TensorSet({"param": [param], "grad": [grad]}, ONE)
    alive = weakref.ref(grad.untyped_storage())
    del grad
    tensors.release("grad")
    gc.collect()
    assert alive() is None
    assert tensors.flat["grad"][0].numel() == 0
    tensors.set_row("grad", [torch.full((300,), 2.0, device=device)])
    assert tensors.flat["grad"][0].sum() == 600
    assert tensors.tables()[0][ROW["grad"], 0] == tensors.flat["grad"][0].data_ptr()


@pytest.mark.parametrize("length", [0, 1, 37, 74, 100])
def test_reference_blocks_cover_a_tensor_once(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(chunks, "REFERENCE_BLOCK", 37)
    tensors = TensorSet({"param": [torch.zeros(length)]})
    covered = [i for part in tensors.reference_blocks(0) for i in range(part.start, part.stop)]
    assert covered == list(range(length))
