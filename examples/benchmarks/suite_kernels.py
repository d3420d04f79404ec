"""The checks of each kernel: against its reference in FP64, and what must hold bit for bit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from suite_checks import STATE_TOLERANCE, SUM_TOLERANCE, Bench, ledger_error, scale
from suite_context import ANY, Context
from suite_problems import HISTORY, Problem, relative_error
from suite_records import Check, SectionResult
from triton_hybrid.kernels.adamw import adamw_step, adamw_step_reference
from triton_hybrid.kernels.correct import correct, correct_reference, slopes, slopes_reference
from triton_hybrid.kernels.divergence import FRACTION_COLUMN, judge, judge_reference
from triton_hybrid.kernels.gram import gram, gram_reference
from triton_hybrid.kernels.ledger import read_ledger, write_ledger
from triton_hybrid.kernels.predict import predict, predict_reference
from triton_hybrid.kernels.settle import settle, settle_reference

ADAMW_VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {"max_norm": None, "slow_beta": 0.0},
    "adamw+clip": {"max_norm": 3.0, "slow_beta": 0.0},
    "adamw+slow": {"max_norm": None, "slow_beta": 0.9},
    "adamw+clip+slow": {"max_norm": 3.0, "slow_beta": 0.9},
}

ADAMW_ROWS = ("weight", "exp_avg", "exp_avg_sq", "slow_ema", "weight_ema")


class KernelBench(Bench):
    """The checks of every kernel with parameters of one dtype."""

    # ------------------------------------------------------------------ adamw

    def kernels(self) -> dict[str, Callable[[], None]]:
        """The checks of every kernel."""
        adamw = {
            name: functools.partial(self.adamw, name, **options)
            for name, options in ADAMW_VARIANTS.items()
        }
        return {
            **adamw,
            "predict slow": lambda: self.predicted("predict slow", trajectory=False),
            "predict trajectory": lambda: self.predicted("predict trajectory", trajectory=True),
            "gram": self.gram,
            "slopes": self.slopes,
            "correct": self.correct,
        }

    def adamw(self, kernel: str, max_norm: float | None, slow_beta: float) -> None:
        """Two steps, by one launch and by two, against the reference and each other.

        The first one measures the update, as steps do that a prediction may follow.
        """
        options: dict[str, Any] = {
            "max_norm": max_norm, "slow_beta": slow_beta, "observed": slow_beta > 0,
        }  # fmt: skip

        def stepped(cooperative: bool) -> Problem:
            problem = self.problem()
            problem.enter(slow_count=7.0, loss=2.0, loss_previous=2.5)
            for measured in (True, False):
                run_adamw(problem, cooperative=cooperative, measured=measured, **options)
            return problem

        oracle = self.oracle()
        oracle.enter(slow_count=7.0, loss=2.0, loss_previous=2.5)
        for measured in (True, False):
            run_adamw_reference(oracle, measured=measured, **options)
        written = ADAMW_ROWS if slow_beta else ADAMW_ROWS[:3]
        two = stepped(cooperative=False)
        launches = {"two launches": two}
        if self.context.cooperative:
            launches["one launch"] = stepped(cooperative=True)
        for name, actual in launches.items():
            errors = {
                **self.rows(actual, oracle, *written),
                **self.moved(actual, oracle),
                **self.ledgers(actual, oracle),
                "steps": (float((actual.steps - oracle.steps).abs().max()), 0.0 + 1e-9),
                "arrivals": (float(actual.workspace.arrivals.abs().sum()), 1e-9),
            }
            self.near(kernel, f"{name} against FP64", errors)
            self.intact(kernel, actual)
        del oracle
        if self.context.cooperative:
            one = launches["one launch"]
            self.same(kernel, "one launch is two", one.everything(), two.everything())
        absent = [i for i, layout in enumerate(self.layouts) if not layout.present]
        untouched = [two.rows[name][i] for name in written for i in absent]
        before = [self.values[name][i] for name in written for i in absent]
        self.same(kernel, "no gradient, no change", untouched, before)
        first = list(launches.values())[-1].everything()
        launches.clear()
        del two, actual
        self.repeated(kernel, lambda: stepped(self.context.cooperative), first)
        del first
        self.nonfinite(kernel, options)

    def nonfinite(self, kernel: str, options: dict[str, Any]) -> None:
        """One NaN in one gradient must change nothing but a counter."""
        problem = self.problem()
        problem.rows["grad"][-1][-1] = math.nan
        before = problem.copies("param", *ADAMW_ROWS)
        run_adamw(problem, cooperative=self.context.cooperative, **options)
        after = problem.copies("param", *ADAMW_ROWS)
        self.same(kernel, "a NaN in the gradient changes nothing", after, before)
        skipped = read_ledger(problem.ledger)["skipped"]
        self.note(kernel, "a NaN in the gradient is counted", skipped == 1.0, skipped)

    # ------------------------------------------------------------------ predictions

    def predicted(self, kernel: str, *, trajectory: bool) -> None:
        """A predicted step and its books; then a second one that is taken back."""
        coefficients = None
        if trajectory:
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randn(len(self.layouts), HISTORY, generator=generator)
            coefficients = drawn.to(self.context.device)
        open_gate: dict[str, float] = {"confidence": 0.9, "update_square": 1.0, "horizon": 0.75}
        settled: dict[str, Any] = {"threshold": 0.5, "limit": 1e9, "cooldown": 10.0, "last": True}

        def move(problem: Problem, save: bool = True) -> None:
            problem.sums.fill_(math.nan)
            predict(
                problem.set, problem.group, problem.steps, problem.hyper, coefficients,
                problem.memory, problem.ledger, problem.partials(3), problem.sums,
                threshold=0.5, share=1.0, save=save,
            )  # fmt: skip

        def book(problem: Problem, **changes: Any) -> None:
            arrivals = problem.workspace.arrivals
            options = {**settled, **changes}
            settle(problem.set, problem.sums, problem.memory, problem.ledger, arrivals, **options)

        def once() -> Problem:
            problem = self.problem()
            problem.enter(**open_gate)
            move(problem)
            book(problem)
            return problem

        oracle = self.oracle()
        oracle.enter(**open_gate)
        predict_reference(
            oracle.set, oracle.group, oracle.steps, oracle.hyper, coefficients, oracle.memory,
            oracle.ledger, oracle.sums, threshold=0.5, share=1.0, save=True,
        )  # fmt: skip
        problem = self.problem()
        problem.enter(**open_gate)
        start = problem.copies("weight")
        rounded = [weight.to(self.dtype) for weight in start]
        move(problem)
        # The slope is a sum with two signs, so it counts against the largest of all tensors.
        slope, square, bad = ((problem.sums - oracle.sums).abs() / scale(oracle.sums)).amax(0)
        errors = {
            **self.rows(problem, oracle, "weight"),
            **self.moved(problem, oracle),
            "slopes": (float(slope), SUM_TOLERANCE),
            "squares": (float(square), SUM_TOLERANCE),
            "non-finite": (float(bad), 1e-9),
        }
        self.near(kernel, "against FP64", errors)
        self.intact(kernel, problem)
        self.same(kernel, "the snapshot is the old weights", problem.rows["snapshot"], start)

        settle_reference(oracle.set, oracle.sums, oracle.memory, oracle.ledger, **settled)
        book(problem)
        memory = float((problem.memory - oracle.memory).abs().max() / oracle.memory.abs().max())
        errors = {**self.ledgers(problem, oracle), "memory": (memory, SUM_TOLERANCE)}
        del oracle
        first = [tensor.clone() for tensor in problem.everything()]
        self.near("settle", f"{kernel}, kept, against FP64", errors)
        move(problem, save=False)
        book(problem, limit=0.0)
        taken_back = [*problem.rows["weight"], *problem.rows["param"]]
        self.same("settle", f"{kernel}, taken back", taken_back, [*start, *rounded])
        entries = read_ledger(problem.ledger)
        counted = (entries["rejected"], entries["moved"], entries["horizon"]) == (1.0, 0.0, 0.375)
        self.note("settle", f"{kernel}, taken back, in the books", counted)
        self.intact("settle", problem)
        del problem, start, rounded, taken_back
        self.repeated(kernel, once, first)

    # ------------------------------------------------------------------ the others

    def gram(self) -> None:
        """The newest displacement, and its inner products with the others."""
        slot = 2

        def once() -> Problem:
            problem = self.problem()
            if problem.has_master:
                copy_weights(problem)
            problem.rows[f"history_{slot}"][0].fill_(math.nan)
            gram(problem.set, HISTORY, slot, problem.partials(HISTORY), problem.products)
            return problem

        oracle = self.oracle()
        gram_reference(oracle.set, HISTORY, slot, oracle.products)
        problem = once()
        wrong = (problem.products - oracle.products).abs() / scale(oracle.products)
        newest = f"history_{slot}"
        errors = {
            newest: (relative_error(problem.rows[newest], oracle.rows[newest]), STATE_TOLERANCE),
            "products": (float(wrong.amax()), SUM_TOLERANCE),
        }
        self.near("gram", "against FP64", errors)
        self.intact("gram", problem)
        weights = self.values["weight"]
        self.same("gram", "the snapshot is the weights", problem.rows["snapshot"], weights)
        del oracle
        self.repeated("gram", once, problem.everything())

    def slopes(self) -> None:
        """The gradient along the displacement."""

        def once() -> Problem:
            problem = self.problem()
            if problem.has_master:
                copy_weights(problem)
            partials = problem.partials(3, every=False)
            slopes(
                problem.set, problem.group, problem.hyper, problem.ledger, partials, problem.sums
            )
            return problem

        oracle = self.oracle()
        slopes_reference(oracle.set, oracle.group, oracle.hyper, oracle.ledger, oracle.sums)
        problem = once()
        slope, square, bad = ((problem.sums - oracle.sums).abs() / scale(oracle.sums)).amax(0)
        errors = {
            "slopes": (float(slope), SUM_TOLERANCE),
            "squares": (float(square), SUM_TOLERANCE),
            "non-finite": (float(bad), 1e-9),
        }
        self.near("slopes", "against FP64", errors)
        self.intact("slopes", problem)
        del oracle
        self.repeated("slopes", once, problem.everything())

    def correct(self) -> None:
        """Weights placed between snapshot and prediction; 0 and 1 keep every bit."""
        fractions = (0.0, 1.0, 0.625, 1.9)
        column = FRACTION_COLUMN.value

        def judged(problem: Problem) -> Problem:
            problem.enter(verdict=1.0)
            for index in range(len(self.layouts)):
                problem.memory[index, column] = fractions[index % len(fractions)]
                # A fraction of 1 leaves the parameter alone, so it must be there already.
                if fractions[index % len(fractions)] == 1.0:
                    problem.rows["param"][index].copy_(problem.rows["weight"][index])
            return problem

        for restart in (False, True):

            def once(restart: bool = restart) -> Problem:
                problem = judged(self.problem())
                correct(problem.set, problem.memory, problem.ledger, restart=restart)
                return problem

            oracle = judged(self.oracle())
            correct_reference(oracle.set, oracle.memory, oracle.ledger, restart=restart)
            problem = once()
            errors = {
                **self.rows(problem, oracle, "weight", "snapshot"),
                **self.moved(problem, oracle),
            }
            del oracle
            name = "starting a cycle" if restart else "in a cycle"
            self.near("correct", f"against FP64, {name}", errors)
            self.intact("correct", problem)
            actual, expected = [], []
            for index in range(len(self.layouts)):
                source = {0.0: "snapshot", 1.0: "weight"}.get(fractions[index % len(fractions)])
                if source is not None:
                    actual.append(problem.rows["weight"][index])
                    expected.append(self.values[source][index])
            self.same("correct", f"0 and 1 keep every bit, {name}", actual, expected)
            self.repeated("correct", once, problem.everything())


def run_adamw(problem: Problem, *, cooperative: bool, **options: Any) -> None:
    """One step by the kernel."""
    adamw_step(
        [problem.set], [problem.group], [problem.steps], problem.hyper, problem.ledger,
        problem.workspace, cooperative=cooperative, **options,
    )  # fmt: skip


def run_adamw_reference(problem: Problem, **options: Any) -> None:
    """One step by the reference."""
    adamw_step_reference(
        [problem.set], [problem.group], [problem.steps], problem.hyper, problem.ledger, **options
    )


def copy_weights(problem: Problem) -> None:
    """Makes the parameters what they are between two kernels: rounded masters."""
    for param, weight in zip(problem.rows["param"], problem.rows["weight"]):
        param.copy_(weight)


def judgements(context: Context, result: SectionResult) -> None:
    """The verdict over 300 tensors: accepted, rejected by norm and loss, not finite."""
    ordinary = {
        "moved": 1.0, "stretch": 2.0, "jump_square": 0.5, "norm_count": 20.0, "loss_count": 20.0,
        "loss_previous": 2.0, "loss_variance": 0.01, "loss": math.nan, "horizon": 0.5,
        "signal": 0.75,
    }  # fmt: skip
    cases: dict[str, tuple[dict[str, float], float, float]] = {
        "accepted": ({}, 1.0, 0.0),
        "rejected by the norm": ({}, 90.0, 0.0),
        "rejected by the loss": ({"loss": 9.0}, 1.0, 0.0),
        "left to the scaler": ({}, math.nan, 1.0),
        "rejected as not finite": ({"blocked": 1.0}, math.nan, 1.0),
        "nothing to judge": ({"moved": 0.0}, 1.0, 0.0),
    }
    generator = torch.Generator().manual_seed(context.seed)
    for name, (entries, norm, bad) in cases.items():
        tensors = 300
        sums = torch.randn(tensors, 3, generator=generator, dtype=torch.float64)
        sums[:, 1], sums[:, 2] = norm * norm / tensors, 0.0
        sums[-1, 2] = bad
        memory = torch.randn(tensors, 3, generator=generator)
        memory[:, 0] = memory[:, 0].abs().clamp(0.1, 4.0)
        outcomes = []
        for decide in (judge, judge_reference):
            ledger = write_ledger({**ordinary, **entries}, context.device)
            mine, given = memory.to(context.device, copy=True), sums.to(context.device)
            decide(ledger, given, mine, 3.0, 10.0)
            outcomes.append((ledger, mine))
        error = ledger_error(outcomes[0][0], outcomes[1][0])
        error = max(error, float((outcomes[0][1] - outcomes[1][1]).abs().max()))
        context.note(result, Check(name, "judge", ANY, error <= 1e-6, error, 1e-6))
