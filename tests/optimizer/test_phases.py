from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_hybrid import HybridConfig, Phase
from triton_hybrid.phases import PhaseController, Report

LETTERS = {"W": Phase.WARMUP, "F": Phase.FULL, "P": Phase.PREDICT, "C": Phase.CORRECT}


def run(
    controller: PhaseController,
    steps: int,
    reports: dict[int, Report] | None = None,
    ready: bool = True,
    refit: int = 1,
) -> str:
    letters = {phase: letter for letter, phase in LETTERS.items()}
    seen = ""
    for step in range(steps):
        seen += letters[controller.phase]
        if controller.phase is Phase.PREDICT:
            controller.after_prediction()
        else:
            controller.after_gradient((reports or {}).get(step, Report()), ready, refit)
    return seen


def config(**changes: int) -> HybridConfig:
    sizes = {"warmup_steps": 2, "full_steps": 3, "max_predict_steps": 4, "correction_interval": 2}
    return HybridConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def test_cycle_step_by_step() -> None:
    assert run(PhaseController(config()), 20) == "WWFFFPPCPPCFPPCPPCFP"


def test_source_run_is_forty_percent_predicted() -> None:
    seen = run(PhaseController(HybridConfig.quick_validation()), 50)
    assert seen == "WWWWW" + "F" * 10 + "PPCPPCPCF" * 3 + "PPCPPCPC"
    assert (seen.count("P"), 50 - seen.count("P")) == (20, 30)


def test_no_warmup() -> None:
    assert run(PhaseController(config(warmup_steps=0)), 4) == "FFFP"


def test_not_ready_stays_full() -> None:
    assert run(PhaseController(config()), 12, ready=False) == "WW" + "F" * 10


def test_low_confidence_asks_again_after_a_full_phase() -> None:
    reports = {4: Report(confident=False)}
    assert run(PhaseController(config()), 9, reports) == "WWFFFFFFP"


def test_low_confidence_at_a_correct_step_ends_the_stretch() -> None:
    reports = {7: Report(confident=False)}
    assert run(PhaseController(config()), 12, reports) == "WWFFFPPCFFFP"


def test_rejection_lasts_as_long_as_the_cooldown() -> None:
    reports = {7: Report(rejected=True, cooldown=5)}
    assert run(PhaseController(config()), 15, reports) == "WWFFFPPCFFFFFPP"


def test_cooldown_from_a_move_taken_back_in_predict() -> None:
    reports = {7: Report(cooldown=2)}
    assert run(PhaseController(config()), 11, reports) == "WWFFFPPCFFP"


def test_skipped_gradient_does_not_advance() -> None:
    for step, letter in ((0, "W"), (4, "F"), (7, "C")):
        controller = PhaseController(config())
        run(controller, step)
        assert controller.phase is LETTERS[letter]
        before = controller.state()
        controller.after_gradient(Report(skipped=True), True, 1)
        assert controller.state() == before


def test_trajectory_models_need_a_cycle_after_a_stretch() -> None:
    assert run(PhaseController(config()), 16, refit=3) == "WWFFFPPCPPCFFFPP"


@given(
    st.integers(0, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4),
    st.lists(st.sampled_from(["fine", "skip", "reject", "unsure"]), max_size=60),
)  # fmt: skip
def test_every_stretch_is_bounded_and_judged(
    warmup: int, full: int, most: int, interval: int, fates: list[str]
) -> None:
    controller = PhaseController(
        HybridConfig(
            warmup_steps=warmup,
            full_steps=full,
            max_predict_steps=most,
            correction_interval=interval,
        )
    )
    reports = {
        i: {
            "fine": Report(),
            "skip": Report(skipped=True),
            "reject": Report(rejected=True, cooldown=full),
            "unsure": Report(confident=False),
        }[fate]
        for i, fate in enumerate(fates)
    }
    seen = run(controller, 80, reports)
    for stretch in seen.replace("W", " ").replace("F", " ").split():
        assert stretch.count("P") <= most
        for row in stretch.split("C"):
            assert len(row) <= interval
    assert "FC" not in seen
    assert "PF" not in seen
    assert "PW" not in seen


@given(st.integers(0, 60))
def test_state_round_trip(steps: int) -> None:
    controller, other = PhaseController(config()), PhaseController(config())
    run(controller, steps)
    other.restore(controller.state())
    assert run(controller, 20) == run(other, 20)


@pytest.mark.parametrize("phase", list(Phase))
def test_only_predict_needs_no_gradient(phase: Phase) -> None:
    assert phase.needs_gradient is (phase is not Phase.PREDICT)


def test_steps_without_effect_are_made_up_for() -> None:
    controller = PhaseController(config(full_steps=3))
    while controller.phase is not Phase.FULL:
        controller.after_gradient(Report(), True, 1)
    for _ in range(2):
        controller.after_gradient(Report(), True, 1)
    controller.after_gradient(Report(missed=2), True, 1)
    assert (controller.phase, controller.remaining) == (Phase.FULL, 2)
    controller.after_gradient(Report(), True, 1)
    controller.after_gradient(Report(), True, 1)
    assert controller.phase is Phase.PREDICT
