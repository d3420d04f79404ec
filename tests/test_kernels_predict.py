"""The predicted move: who decides, what moves, and that it can be taken back bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_helpers import (
    ONE,
    PRECISIONS,
    THREE,
    FarAway,
    Problem,
    Spec,
    assert_ledgers_near,
    assert_near,
    assert_same_bits,
    counted_launches,
    fewer,
    more,
    plain,
    precisions,
    set_entries,
    spec_lists,
)
from torch import Tensor
from triton_hybrid.kernels.divergence import FRACTION_COLUMN, HORIZON_COLUMN, SLOPE_COLUMN
from triton_hybrid.kernels.ledger import read_ledger, write_ledger
from triton_hybrid.kernels.predict import predict, predict_reference
from triton_hybrid.kernels.settle import settle, settle_reference

MOVED_ROWS = ("weight", "snapshot")
SLOPE = int(SLOPE_COLUMN.value)


def move(
    problem: Problem,
    coefficients: Tensor | None = None,
    *,
    ledger: Tensor | None = None,
    threshold: float = 0.5,
    share: float = 1.0,
    save: bool = True,
    level: bool = True,
    with_slopes: bool = True,
) -> None:
    """One predicted step by the kernel, into poisoned scratch and sums."""
    problem.sums.fill_(math.nan)
    ledger = problem.ledger if ledger is None else ledger
    before = ledger.clone()
    predict(
        problem.set, problem.group, problem.steps, problem.hyper, coefficients, problem.memory,
        ledger, problem.partials(), problem.sums, threshold=threshold, share=share, save=save,
        level=level, with_slopes=with_slopes,
    )  # fmt: skip
    assert_same_bits(ledger, before, "the ledger of a move")
    problem.check()


def move_reference(
    problem: Problem,
    coefficients: Tensor | None = None,
    *,
    ledger: Tensor | None = None,
    threshold: float = 0.5,
    share: float = 1.0,
    save: bool = True,
    level: bool = True,
    with_slopes: bool = True,
) -> None:
    """One predicted step by plain torch."""
    problem.sums.fill_(math.nan)
    predict_reference(
        problem.set, problem.group, problem.steps, problem.hyper, coefficients, problem.memory,
        problem.ledger if ledger is None else ledger, problem.sums,
        threshold=threshold, share=share, save=save, level=level, with_slopes=with_slopes,
    )  # fmt: skip
    problem.check()


def book(
    problem: Problem, *, limit: float = 1e9, threshold: float = 0.5, cooldown: float = 10.0
) -> None:
    """What follows a predicted step, by the kernel."""
    arrivals = problem.workspace.arrivals
    settle(
        problem.set, problem.sums, problem.memory, problem.ledger, arrivals,
        threshold=threshold, limit=limit, cooldown=cooldown, last=True,
    )  # fmt: skip
    assert arrivals.tolist() == [0, 0], "left as it was found"
    problem.check()


def book_reference(
    problem: Problem, *, limit: float = 1e9, threshold: float = 0.5, cooldown: float = 10.0
) -> None:
    """What follows a predicted step, by plain torch."""
    settle_reference(
        problem.set, problem.sums, problem.memory, problem.ledger,
        threshold=threshold, limit=limit, cooldown=cooldown, last=True,
    )  # fmt: skip
    problem.check()


Move = Callable[..., None]
Book = Callable[..., None]
BACKENDS = pytest.mark.parametrize(
    ("move", "book"), [(move, book), (move_reference, book_reference)], ids=["triton", "torch"]
)


def sure(problem: Problem, **entries: float) -> Problem:
    """Lets the gate open: confident, calm, with a usual update to compare with."""
    start = {"confidence": 0.9, "update_square": 1.0, "horizon": 0.75}
    set_entries(problem.ledger, **{**start, **entries})
    return problem


def drawn_coefficients(problem: Problem, seed: int = 0) -> Tensor | None:
    """Coefficients of the trajectory basis; None for the slow EMA. By spec, not by place."""
    if not problem.history:
        return None
    rows = [
        torch.randn(problem.history, generator=torch.Generator().manual_seed(spec.seed + seed))
        for spec in problem.specs
    ]
    return problem.arena.put(torch.stack(rows))


# -------------------------------------------------------------------------- the reference


@given(
    drawn=spec_lists(groups=3),
    precision=precisions(),
    history=st.sampled_from((0, 0, 1, 3, 8)),
    share=st.sampled_from((1.0, 0.25)),
    save=st.booleans(),
    programs=st.booleans(),
)
def test_kernel_and_cpu_backend_match_the_fp64_oracle(
    device: torch.device,
    drawn: list[Spec],
    precision: tuple[torch.dtype, torch.dtype],
    history: int,
    share: float,
    save: bool,
    programs: bool,
) -> None:
    tiling = THREE if programs else ONE
    problem = Problem(drawn, device, precision=precision, tiling=tiling, history=history)
    sure(problem)
    problem.memory[:, HORIZON_COLUMN.value] = torch.linspace(0.2, 2.0, len(drawn))
    backend = Problem(drawn, device, precision=precision, history=history)
    backend.copy_(problem)
    oracle, before = problem.promoted(), problem.snapshot()

    for actual, step in ((problem, move), (backend, move_reference), (oracle, move_reference)):
        step(actual, drawn_coefficients(actual), share=share, save=save)

    for actual in (problem, backend):
        actual.assert_near(oracle, MOVED_ROWS, rtol=2e-6, atol=2e-6)
        actual.assert_unchanged(before, but=("param", "weight", "snapshot" if save else "weight"))
        columns = actual.sums[:, :2], oracle.sums[:, :2]
        scale = max(1e-6, float(columns[1].abs().max()))
        assert_near(*columns, "slope and squared displacement", rtol=1e-5, atol=1e-5 * scale)
        assert (actual.sums[:, 2] == 0).all()
        if save:
            for index, weight in enumerate(before["weight"]):
                assert_same_bits(actual.rows["snapshot"][index], weight, f"snapshot[{index}]")
    if share == 1.0:
        for index, weight in enumerate(before["weight"]):
            gone = oracle.rows["weight"][index] - weight.double()
            assert float(oracle.sums[index, 1]) == pytest.approx(float(gone.square().sum()))


@fewer(5)
@given(
    drawn=spec_lists(min_size=2, groups=3), precision=precisions(), history=st.sampled_from((0, 2)),
    data=st.data(),
)  # fmt: skip
def test_many_tensors_in_one_launch_are_each_alone_in_any_order(
    device: torch.device,
    drawn: list[Spec],
    precision: tuple[torch.dtype, torch.dtype],
    history: int,
    data: st.DataObject,
) -> None:
    def moved(specs: list[Spec], **options: object) -> Problem:
        problem = Problem(specs, device, precision=precision, history=history, **options)  # type: ignore[arg-type]
        move(sure(problem), drawn_coefficients(problem))
        return problem

    together = moved(drawn, tiling=THREE)
    order = data.draw(st.permutations(range(len(drawn))), label="order")
    shuffled = moved([drawn[i] for i in order])
    shuffled.assert_same(together, order, ("param", *MOVED_ROWS))
    assert_same_bits(shuffled.sums, together.sums[list(order)], "sums")
    for index, spec in enumerate(drawn):
        alone = moved([spec])
        alone.assert_same(together, [index], ("param", *MOVED_ROWS))
        assert_same_bits(alone.sums, together.sums[index : index + 1], "sums")


@pytest.mark.parametrize("history", [0, 2])
def test_five_runs_give_the_same_bits(device: torch.device, history: int) -> None:
    def once() -> Problem:
        problem = Problem(plain((300,), (7, 9), ()), device, tiling=THREE, history=history)
        move(sure(problem), drawn_coefficients(problem))
        book(problem)
        return problem

    first = once()
    for _ in range(4):
        again = once()
        again.assert_same(first, range(3), MOVED_ROWS)
        assert_same_bits(again.sums, first.sums, "sums")
        assert_same_bits(again.ledger, first.ledger, "ledger")


@pytest.mark.parametrize("history", [0, 2])
def test_offsets_beyond_32_bits(device: torch.device, history: int) -> None:
    shapes = plain((200,), (130,))
    near, far = (Problem(shapes, device, precision=PRECISIONS[1], history=history) for _ in "ab")
    for problem in (near, far):
        with FarAway(problem.set) if problem is far else pytest.MonkeyPatch.context():
            move(sure(problem), drawn_coefficients(problem))
            moved = problem.snapshot()
            book(problem, limit=0.0)
        assert not torch.equal(moved["weight"][0], problem.rows["weight"][0]), "taken back"
    far.assert_same(near, (0, 1), ("param", *MOVED_ROWS))
    assert_same_bits(far.sums, near.sums, "sums")


@BACKENDS
@fewer(5)
@given(drawn=spec_lists(), precision=precisions(), history=st.sampled_from((0, 2)))
def test_without_slopes_the_move_is_the_same_and_exp_avg_is_not_read(
    device: torch.device,
    move: Move,
    book: Book,
    drawn: list[Spec],
    precision: tuple[torch.dtype, torch.dtype],
    history: int,
) -> None:
    whole, bare = (Problem(drawn, device, precision=precision, history=history) for _ in "ab")
    move(sure(whole), drawn_coefficients(whole))
    for tensor in bare.set.flat["exp_avg"]:
        tensor.fill_(math.nan)
    sure(bare)
    move(bare, drawn_coefficients(bare), with_slopes=False)
    bare.assert_same(whole, range(len(drawn)), ("param", *MOVED_ROWS))
    assert_same_bits(bare.sums[:, 1:], whole.sums[:, 1:], "sums")
    assert bool(bare.sums[:, 0].isnan().all()), "the poison of before stays"


@BACKENDS
def test_a_trajectory_steps_along_the_same_slopes_again(
    device: torch.device, move: Move, book: Book
) -> None:
    """Why the second predicted step in a row need not measure them."""
    problem = sure(Problem(plain((300,), (7, 9), ()), device, tiling=THREE, history=2))
    slopes = []
    for step in range(3):
        move(problem, drawn_coefficients(problem), save=step == 0, share=0.3)
        slopes.append(problem.sums[:, 0].clone())
        book(problem)
    for again in slopes[1:]:
        assert_same_bits(again, slopes[0], "slopes")


def test_launch_counts(device: torch.device) -> None:
    problem = sure(Problem(plain((300,), (7, 9)), device))
    with counted_launches() as log:
        move(problem)
        book(problem)
    assert log == ["_predict_kernel", "_reduce_kernel", "_settle_kernel"]


# ------------------------------------------------------------------------------- the gate

CLOSED = (
    {"confidence": 0.25},
    {"confidence": math.nan},
    {"cooldown": 1.0},
    {"nonfinite": 1.0},
    {"stretch": 2.0, "moved": 0.0},
)
OPEN: tuple[dict[str, float], ...] = (
    {},
    {"confidence": 0.5},
    {"stretch": 1.0, "moved": 1.0, "confidence": 0.0, "cooldown": 3.0, "nonfinite": 1.0},
)


@BACKENDS
@pytest.mark.parametrize("entries", CLOSED, ids=str)
@pytest.mark.parametrize("history", [0, 2])
def test_behind_a_closed_gate_no_byte_changes(
    device: torch.device, move: Move, book: Book, entries: dict[str, float], history: int
) -> None:
    shapes = plain((130,), (0,), (3, 3))
    problem = Problem(shapes, device, precision=PRECISIONS[1], history=history)
    sure(problem, **entries)
    before, ledger = problem.snapshot(), problem.ledger.clone()
    move(problem, drawn_coefficients(problem))
    assert (problem.sums == 0).all(), "written, and zero"
    book(problem, limit=0.0)
    problem.assert_unchanged(before)
    assert_same_bits(problem.ledger, ledger, "ledger")


@BACKENDS
@pytest.mark.parametrize("entries", OPEN, ids=str)
def test_an_open_gate_lets_the_weights_move(
    device: torch.device, move: Move, book: Book, entries: dict[str, float]
) -> None:
    problem = sure(Problem(plain((130,)), device), **entries)
    before, ledger = problem.snapshot(), read_ledger(problem.ledger)
    move(problem)
    book(problem)
    after = read_ledger(problem.ledger)
    assert not torch.equal(problem.rows["weight"][0], before["weight"][0])
    assert after["moved"] == 1
    assert after["stretch"] == ledger["stretch"] + 1
    changed = {name for name in after if after[name] != after[name] or after[name] != ledger[name]}
    assert changed <= {"moved", "stretch", "jump_square", "loss", "loss_previous"}


@BACKENDS
def test_a_tensor_without_any_step_yet_does_not_move(
    device: torch.device, move: Move, book: Book
) -> None:
    shapes = [replace(spec, step=step) for spec, step in zip(plain((70,), (70,)), (0, 5))]
    problem = sure(Problem(shapes, device))
    for name in ("exp_avg", "exp_avg_sq", "slow_ema"):
        problem.rows[name][0].zero_()
    before = problem.snapshot()
    move(problem)
    book(problem)
    assert_same_bits(problem.rows["weight"][0], before["weight"][0], "weight")
    assert (problem.sums[0] == 0).all()
    assert not torch.equal(problem.rows["weight"][1], before["weight"][1])


# ------------------------------------------------------------------------------ taken back


@BACKENDS
@fewer(5)
@given(
    drawn=spec_lists(groups=3).filter(lambda list_: any(s.numel for s in list_)),
    precision=precisions(),
    history=st.sampled_from((0, 2)),
    stretch=st.integers(1, 3),
)
def test_what_is_too_far_is_taken_back_bit_for_bit(
    device: torch.device,
    move: Move,
    book: Book,
    drawn: list[Spec],
    precision: tuple[torch.dtype, torch.dtype],
    history: int,
    stretch: int,
) -> None:
    problem = sure(Problem(drawn, device, precision=precision, tiling=THREE, history=history))
    problem.memory[:, FRACTION_COLUMN.value] = 0.5
    before = problem.snapshot()
    for number in range(stretch):
        move(problem, drawn_coefficients(problem, number), save=number == 0)
        assume(float(problem.sums[:, 1].sum()) > 0)
        entries = read_ledger(problem.ledger)
        assert entries["stretch"] == number
        book(problem, limit=0.0 if number == stretch - 1 else 1e9, cooldown=7.0)
    problem.assert_unchanged(before, but=("snapshot",))
    for index, weight in enumerate(before["weight"]):
        assert_same_bits(problem.rows["snapshot"][index], weight, f"snapshot[{index}]")
    entries = read_ledger(problem.ledger)
    assert entries["cause_jump"] == entries["rejected"] == entries["rejections"] == 1
    assert entries["cause_nonfinite"] == 0
    assert (entries["moved"], entries["stretch"], entries["jump_square"]) == (0, 0, 0)
    assert entries["cooldown"] == 7
    assert entries["horizon"] == 0.75 / 2

    # The gate stays closed through the cooldown, and so within the same stretch.
    move(problem, drawn_coefficients(problem), save=False)
    book(problem)
    problem.assert_unchanged(before, but=("snapshot",))


@BACKENDS
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_taken_back_bit_for_bit(
    device: torch.device, move: Move, book: Book, index: int, value: float
) -> None:
    problem = sure(Problem(plain((130,), (3,), (300,)), device, precision=PRECISIONS[2]))
    element = problem.specs[index].numel - 1
    problem.rows["slow_ema"][index][element] = value
    before = problem.snapshot()
    move(problem)
    assert (problem.sums[:, 2] > 0).tolist() == [i == index for i in range(3)]
    assert torch.isnan(problem.rows["weight"][index][element]) == math.isnan(value)
    book(problem)
    problem.assert_unchanged(before, but=("snapshot",))
    entries = read_ledger(problem.ledger)
    assert (entries["cause_nonfinite"], entries["cause_jump"], entries["moved"]) == (1, 0, 0)


@BACKENDS
@pytest.mark.parametrize(
    ("precision", "largest"), [(PRECISIONS[1], 65504.0), (PRECISIONS[2], 3.3895e38)], ids=str
)
def test_an_overflow_of_the_16_bit_weight_alone_is_not_finite(
    device: torch.device,
    move: Move,
    book: Book,
    precision: tuple[torch.dtype, torch.dtype],
    largest: float,
) -> None:
    """The master is fine; the parameter the model would see is infinite."""
    problem = sure(Problem(plain((130,)), device, precision=precision, history=1))
    problem.rows["weight"][0].fill_(largest)
    problem.rows["param"][0].fill_(largest)
    assert problem.rows["param"][0].isfinite().all()
    problem.rows["history_0"][0].zero_()[77] = largest * 0.003
    before = problem.snapshot()
    move(problem, torch.ones(1, 1, device=device))
    assert problem.rows["weight"][0].isfinite().all()
    assert problem.rows["param"][0].isinf().nonzero().tolist() == [[77]]
    book(problem, limit=math.inf)
    problem.assert_unchanged(before, but=("snapshot",))
    assert read_ledger(problem.ledger)["cause_nonfinite"] == 1


@BACKENDS
def test_every_rejection_in_a_row_doubles_the_wait(
    device: torch.device, move: Move, book: Book
) -> None:
    problem = sure(Problem(plain((70,)), device), horizon=1.0)
    waits = []
    for _ in range(13):
        set_entries(problem.ledger, cooldown=0.0)
        move(problem)
        book(problem, limit=0.0, cooldown=3.0)
        waits.append(read_ledger(problem.ledger)["cooldown"])
    assert waits == [3.0 * 2**n for n in range(11)] + [3.0 * 2**10] * 2
    assert read_ledger(problem.ledger)["horizon"] == 2.0**-13


@BACKENDS
def test_a_stretch_adds_up(device: torch.device, move: Move, book: Book) -> None:
    """Distances add up as lengths, slopes as numbers; four quarters are the whole."""
    whole = sure(Problem(plain((130,), (5, 7)), device))
    parts = sure(Problem(plain((130,), (5, 7)), device))
    move(whole)
    book(whole)
    for number in range(4):
        move(parts, share=0.25, save=number == 0)
        book(parts)
    parts.assert_near(whole, MOVED_ROWS, rtol=1e-6, atol=1e-6)
    assert_near(parts.memory, whole.memory, "memory", rtol=1e-5)
    assert read_ledger(parts.ledger)["stretch"] == 4
    one, four = read_ledger(whole.ledger)["jump_square"], read_ledger(parts.ledger)["jump_square"]
    assert four == pytest.approx(one, rel=1e-5)
    moved = [w - s for w, s in zip(whole.rows["weight"], whole.rows["snapshot"])]
    assert one == pytest.approx(float(sum(m.double().square().sum() for m in moved)), rel=1e-4)
    # One bias-corrected gradient mean times the displacement.
    slopes = [
        float((m.double() * d.double()).sum() / (1 - 0.9**spec.step))
        for m, d, spec in zip(whole.rows["exp_avg"], moved, whole.specs)
    ]
    assert whole.memory[:, SLOPE].tolist() == pytest.approx(slopes, rel=1e-3)


@more(25)
@given(
    drawn=spec_lists(max_size=2),
    entries=st.fixed_dictionaries(
        {
            "stretch": st.sampled_from((0.0, 0.0, 2.0)),
            "moved": st.sampled_from((0.0, 1.0)),
            "cooldown": st.sampled_from((0.0, 0.0, 4.0)),
            "nonfinite": st.sampled_from((0.0, 0.0, 1.0)),
            "confidence": st.sampled_from((0.75, 0.25)),
            "jump_square": st.sampled_from((0.0, 4.0)),
            "update_square": st.sampled_from((0.0, 1.0, 9.0)),
            "horizon": st.sampled_from((1.0, 0.5)),
            "rejections": st.sampled_from((0.0, 1.0, 12.0)),
            "rejected": st.sampled_from((0.0, 3.0)),
        }
    ),
    square=st.sampled_from((0.0, 1.0, 25.0, math.inf, math.nan)),
    bad=st.sampled_from((0.0, 0.0, 2.0)),
    limit=st.sampled_from((0.0, 1.5, 4.0, math.inf)),
    rest=st.sampled_from((0, 1, 200)),
)
def test_settle_is_its_reference(
    device: torch.device,
    drawn: list[Spec],
    entries: dict[str, float],
    square: float,
    bad: float,
    limit: float,
    rest: int,
) -> None:
    """Over any ledger and sums; ``rest`` tensors belong to other sets of the device."""
    both = [Problem(drawn, device, precision=PRECISIONS[1], tiling=THREE) for _ in "ab"]
    count = len(drawn) + rest
    generator = torch.Generator().manual_seed(rest)
    sums = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    sums[:, 1:] = 0.0
    sums[-1, 1:] = torch.tensor([square, bad])
    memory = torch.randn(count, 3, generator=generator)
    for problem, step in zip(both, (book, book_reference)):
        problem.ledger.copy_(write_ledger(entries, device))
        problem.sums = problem.arena.put(sums)
        problem.memory = problem.arena.put(memory)
        step(problem, limit=limit)
    both[0].assert_same(both[1], range(len(drawn)), ("param", *MOVED_ROWS))
    assert_near(both[0].memory, both[1].memory, "memory")
    assert_ledgers_near(both[0].ledger, both[1].ledger, rtol=1e-12)


@BACKENDS
@pytest.mark.parametrize("limit", [0.0, 1e9], ids=["taken back", "kept"])
def test_two_sets_are_settled_together(
    device: torch.device, move: Move, book: Book, limit: float
) -> None:
    half = sure(Problem(plain((130,), (3,)), device, precision=PRECISIONS[1], tiling=THREE))
    single = Problem(plain((70,)), device, tiling=THREE)
    problems, before = (half, single), (half.snapshot(), single.snapshot())
    memory, ledger = torch.zeros(3, 3, device=device), half.ledger
    for problem in problems:
        move(problem, ledger=ledger)
    moved = [problem.snapshot() for problem in problems]
    sums = torch.cat([problem.sums for problem in problems])
    options = {"threshold": 0.5, "limit": limit, "cooldown": 2.0}
    for problem in problems:
        last = problem is single
        if book is not book_reference:
            arrivals = half.workspace.arrivals
            settle(problem.set, sums, memory, ledger, arrivals, last=last, **options)
        else:
            settle_reference(problem.set, sums, memory, ledger, last=last, **options)
        problem.check()
        assert (read_ledger(ledger)["rejected"] == 1) == (last and limit == 0.0)
    for problem, then in zip(problems, moved if limit else before):
        problem.assert_unchanged(then, but=("snapshot",))
    expected = sums[:, 0] if limit else torch.zeros(3, dtype=torch.float64, device=device)
    assert_near(memory[:, SLOPE], expected, "slopes")
