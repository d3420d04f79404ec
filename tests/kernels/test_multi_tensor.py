"""Many tensors, one launch: the tables, and what they refuse."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_launches import chunks_in_kernel
from kernel_memory import DEVICE, Arena
from kernel_problems import Problem
from kernel_specs import ONE, Spec, plain, spec_lists, specs
from triton_hybrid.kernels import launch, multi_tensor
from triton_hybrid.kernels import rows as address_rows
from triton_hybrid.kernels.launch import INTERPRETED, MAX_PROGRAMS, Tiling, default_tiling
from triton_hybrid.kernels.layout import dense_view, same_layout
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.rows import MOST_ROWS, ROW, address_row


@pytest.mark.parametrize(
    ("cut", "named"),
    [
        *(((block, 2 * block, 1), f"block={block}") for block in (8, 0, -64, 96)),
        *(((64, chunk, 1), f"chunk={chunk}") for chunk in (32, 96, 0)),
        *(((64, 128, programs), f"programs={programs}") for programs in (0, MAX_PROGRAMS + 1)),
    ],
)
def test_tiling_names_what_it_refuses(cut: tuple[int, int, int], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: must be"):
        Tiling(*cut)


def test_default_tiling_is_a_tiling_which_does_not_hang_the_interpreter() -> None:
    tiling = default_tiling(DEVICE)
    assert tiling.chunk % tiling.block == 0
    assert tiling.programs == 1 or not INTERPRETED


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET=1.*backend='torch'"):
        launch.require_launchable(torch.device("cpu"))
    launch.require_launchable(torch.device("cuda"))
    monkeypatch.setattr(launch, "INTERPRETED", True)
    launch.require_launchable(torch.device("cpu"))


# ----------------------------------------------------------------------------- dense views


@given(specs())
def test_dense_view_is_the_memory_of_any_permutation(spec: Spec) -> None:
    arena = Arena()
    tensor = arena.carve(spec.shape, torch.float32, spec.order, spec.shift)
    flat = dense_view(tensor)
    assert flat.shape == (spec.numel,)
    assert flat.is_contiguous()
    if spec.numel:
        assert flat.data_ptr() == tensor.data_ptr()
    flat.copy_(torch.arange(spec.numel))
    permuted = tensor.permute(spec.order).reshape(-1)
    assert torch.equal(permuted.cpu(), torch.arange(float(spec.numel)))
    arena.check()


GAPS_OR_OVERLAPS = {
    "step": torch.zeros(8)[::2],
    "columns": torch.zeros(4, 6)[:, :3],
    "expanded rows": torch.zeros(1, 3).expand(4, 3),
    "expanded columns": torch.zeros(3, 1).expand(3, 5),
    "overlap": torch.zeros(8).as_strided((3, 3), (1, 1)),
    "gaps": torch.zeros(9).as_strided((2, 2), (5, 2)),
    "scalar": torch.zeros(()).expand(2),
}


@pytest.mark.parametrize("kind", GAPS_OR_OVERLAPS)
def test_tensors_with_gaps_or_overlaps_are_refused_by_name(kind: str) -> None:
    tensor = GAPS_OR_OVERLAPS[kind]
    with pytest.raises(ValueError, match="is not dense in memory") as caught:
        dense_view(tensor)
    assert str(tuple(tensor.shape)) in str(caught.value)
    assert str(tensor.stride()) in str(caught.value)
    with pytest.raises(ValueError, match=r"^row 'param', tensor 1: .*is not dense in memory"):
        TensorSet({"param": [torch.zeros(3), tensor]})


def test_empty_tensors_and_strides_that_address_nothing_are_dense() -> None:
    for shape in ((0,), (3, 0), (0, 3), (2, 0, 4), (2, 3, 0)):
        turned = torch.zeros(shape[::-1]).permute(*range(len(shape))[::-1])
        for tensor in (torch.zeros(shape), turned):
            assert dense_view(tensor).shape == (0,)
            assert len(TensorSet({"param": [tensor]})) == 1
    assert same_layout(torch.zeros(4, 1), torch.zeros(4, 1).as_strided((4, 1), (1, 77)))
    assert same_layout(torch.zeros(0, 3), torch.zeros(3, 0).T)
    assert not same_layout(torch.zeros(4, 4), torch.zeros(4, 4).T)


# ------------------------------------------------------------------------------ refusals


PAIR = [torch.zeros(3), torch.zeros(2, 2)]
HALVES = [tensor.half() for tensor in PAIR]
LONGS, COMPLEX = ([torch.zeros(3, dtype=dtype)] for dtype in (torch.int64, torch.complex64))
ELSEWHERE = [torch.zeros(3, device="meta"), PAIR[1]]
MUST = "must be torch.float32"


@pytest.mark.parametrize(
    ("row", "tensors", "message"),
    [
        ("param", [], r"rows\['param'\] is empty"),
        ("momentum", PAIR, "row 'momentum': must be one of"),
        ("grad", PAIR[:1], "row 'grad' has 1 tensors: must be 2"),
        ("exp_avg", [PAIR[0]] * 2, r"row 'exp_avg', tensor 1: shape \(3,\).*must be \(2, 2\)"),
        ("grad", ELSEWHERE, "row 'grad', tensor 0: .* on meta, must be .* on cpu"),
        ("grad", [PAIR[0], HALVES[1]], f"row 'grad', tensor 1: dtype torch.float16, {MUST}"),
        ("param", LONGS, "row 'param', tensor 0: dtype torch.int64, must be"),
        ("param", COMPLEX, "row 'param', tensor 0: dtype torch.complex64, must be"),
        (
            "snapshot",
            [PAIR[0], PAIR[1].T],
            r"row 'snapshot', tensor 1: strides \(1, 2\), must be those of its parameter, \(2, 1\)",
        ),
        ("exp_avg", HALVES, f"row 'exp_avg': dtype torch.float16, {MUST} as 'weight'"),
        ("exp_avg", [None, PAIR[1]], "row 'exp_avg', tensor 0: None, allowed only for 'grad'"),
        ("weight", HALVES, f"row 'weight': dtype torch.float16, {MUST} or torch.float64"),
    ],
)
def test_tensor_set_names_what_it_refuses(row: str, tensors: list[Any], message: str) -> None:
    rows = {"param": PAIR, row: tensors}
    if row == "weight":  # 16-bit parameters that are to have moments, but have no masters
        rows = {"param": tensors, "exp_avg": PAIR}
    with pytest.raises(ValueError, match=message):
        TensorSet(rows)


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
    drawn: list[Spec],
) -> None:
    problem = Problem(drawn)
    for flat, grad, param, spec in zip(
        problem.tensors.flat["grad"], problem.rows["grad"], problem.rows["param"], drawn
    ):
        if not spec.present:
            assert flat.numel() == 0
        elif spec.numel:
            assert torch.equal(flat, grad.permute(spec.order).reshape(-1))
            assert (flat.data_ptr() == grad.data_ptr()) == same_layout(grad, param)


def test_a_gradient_with_gaps_or_overlaps_is_copied() -> None:
    expanded, gaps = torch.tensor(2.0).expand(4, 3), torch.arange(24.0).view(8, 3)[::2]
    grads = (expanded, gaps, torch.ones(3, 1).expand(3, 4).T)
    for param, grad in product((torch.zeros(4, 3), torch.zeros(3, 4).T), grads):
        tensors = TensorSet({"param": [param], "grad": [grad]})
        flat = tensors.flat["grad"][0]
        assert torch.equal(flat.as_strided(param.shape, param.stride()), grad)
        assert tensors.tables()[0][0, ROW["grad"]] == flat.data_ptr()


@given(
    st.lists(st.tuples(st.integers(0, 700), st.booleans()), min_size=1, max_size=6),
    st.sampled_from((64, 128, 192)),
)
def test_the_chunk_table_covers_each_element_once(
    tensors: list[tuple[int, bool]], chunk: int
) -> None:
    lengths, present = zip(*tensors)
    table = multi_tensor.ChunkTable(lengths, present, chunk, DEVICE)
    assert table.places.dtype == torch.int64, "offsets beyond 2^31 elements"
    assert table.places.shape == (table.count, 2)
    first = table.first.tolist()
    assert first[0] == 0
    assert first[-1] == table.count
    assert len(first) == len(lengths) + 1
    for index, (length, here) in enumerate(tensors):
        own = slice(first[index], first[index + 1])
        starts = range(0, length, chunk) if here else ()
        assert table.places[own].tolist() == [[index, start] for start in starts]
    assert table.present.tolist() == [int(here) for here in present]


def test_addresses_and_alignment_are_those_of_the_tensors() -> None:
    drawn = [replace(spec, shift=index) for index, spec in enumerate(plain((64,), (64,), (0,)))]
    problem = Problem(drawn)
    addresses, extents = problem.tensors.tables()
    assert addresses.shape == (3, MOST_ROWS)
    for name, tensors in problem.rows.items():
        expected = [t.data_ptr() if t.numel() else 0 for t in tensors]
        assert addresses[:, ROW[name]].tolist() == expected
    assert extents.tolist() == [129, 128, 1], "an empty tensor has no address to be misaligned"
    shifted = problem.arena.carve((64,), torch.float32, shift=1)
    problem.tensors.set_row("exp_avg", [shifted, *problem.rows["exp_avg"][1:]])
    assert problem.tensors.tables()[1].tolist() == [128, 128, 1], "one misaligned row is enough"


@given(st.lists(st.tuples(st.integers(0, 400), st.booleans()), min_size=1, max_size=6))
def test_a_kernel_finds_its_chunks_and_which_are_full_and_aligned(
    drawn: list[tuple[int, bool]],
) -> None:
    arena = Arena()
    tensors = [arena.carve((n,), torch.float32, shift=int(odd)) for n, odd in drawn]
    whole = TensorSet({"param": tensors}, ONE)
    table, extents = whole.chunks(), whole.tables()[1]
    assert chunks_in_kernel(table.places, extents, 64, 128) == [
        [index, start, n, int(start + 128 <= n and not odd), min(n - start, 128)]
        for index, (n, odd) in enumerate(drawn)
        for start in range(0, n, 128)
    ]


def test_an_address_table_that_is_full_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address_rows, "ROW", dict(ROW))
    for number in range(len(ROW), MOST_ROWS):
        assert address_row(f"row {number}").value == number
    with pytest.raises(ValueError, match=f"row 'one more': .* room for {MOST_ROWS} rows"):
        address_row("one more")
    assert address_row("param").value == ROW["param"], "one that is known keeps its place"


def test_tables_are_uploaded_only_after_a_change() -> None:
    problem = Problem(plain((64,), (5, 7)))
    first = problem.tensors.tables()
    problem.set_gradients()
    assert all(a is b for a, b in zip(first, problem.tensors.tables()))
    other = [grad.clone() for grad in problem.rows["grad"]]
    problem.tensors.set_row("grad", other)
    addresses = problem.tensors.tables()[0]
    assert addresses is first[0], "written in the order of the stream: a graph finds it again"
    assert addresses[:, ROW["grad"]].tolist() == [grad.data_ptr() for grad in other]


def test_the_chunk_cache_does_not_grow() -> None:
    count = 7
    problem = Problem(plain(*[(3,)] * count))
    everything = problem.tensors.chunks(every=True)
    for pattern in range(1, 1 << count, 3):
        present = [bool(pattern >> bit & 1) for bit in range(count)]
        pairs = zip(problem.rows["grad"], present)
        problem.tensors.set_row("grad", [grad if here else None for grad, here in pairs])
        table = problem.tensors.chunks()
        assert table.present.tolist() == [int(here) for here in present]
        assert problem.tensors.chunks() is table
        assert problem.tensors.chunks(every=True) is everything, "in use, and so never dropped"
        assert len(problem.tensors._chunks) <= 8


def test_a_released_row_holds_no_memory_and_can_be_set_again() -> None:
    param, grad = torch.zeros(300, device=DEVICE), torch.ones(300, device=DEVICE)
    tensors = TensorSet({"param": [param], "grad": [grad]}, ONE)
    alive = weakref.ref(grad.untyped_storage())
    del grad
    tensors.release("grad")
    gc.collect()
    assert alive() is None
    assert tensors.flat["grad"][0].numel() == 0
    tensors.set_row("grad", [torch.full((300,), 2.0, device=DEVICE)])
    assert tensors.flat["grad"][0].sum() == 600
    assert tensors.tables()[0][0, ROW["grad"]] == tensors.flat["grad"][0].data_ptr()


def test_torch_blocks_cover_a_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "TORCH_BLOCK", 37)
    lengths = (0, 1, 37, 74, 100)
    tensors = TensorSet({"param": [torch.zeros(length) for length in lengths]})
    for index, length in enumerate(lengths):
        parts = tensors.torch_blocks(index)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(length))
