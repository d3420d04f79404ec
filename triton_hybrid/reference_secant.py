"""What `reference` has of training without noise: how it is told, and the predictor `secant`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

from torch import Tensor, cat, finfo, split, stack, where
from torch.linalg import eigh, vector_norm

from triton_hybrid.phases import Phase, Report

if TYPE_CHECKING:
    from triton_hybrid.reference import Reference

Tensors = Sequence[Tensor]


class Watch:
    """How many of the base steps, and what share, the trapezoid of two slopes explained."""

    def __init__(self, returns: int = 0) -> None:
        self.share, self.steps, self.returns = 0.0, 0, returns
        # Looked at, with a loss or without; steps to leave out; what was known at the last choice.
        self.looked_at, self.rest, self.known = 0, 0, (0, 0.0)
        # The last base step, if another follows it; loss and slope at its beginning.
        self.step: Tensor | None = None
        self.loss = self.slope = math.nan

    def compare(self, g: Tensor, loss: float) -> None:
        """Takes in the gradient and the loss at the end of the step."""
        assert self.step is not None
        after = float(g @ self.step)
        trapezoid, bend = 0.5 * (self.slope + after), 0.5 * (after - self.slope)
        error = abs(loss - self.loss - trapezoid)
        allowed = max(0.05 * abs(bend), 0.003 * abs(trapezoid)) + 1e-6 * abs(self.loss)
        self.looked_at += 1
        if math.isfinite(error):
            self.share += max(1.0 / (self.steps + 1), 0.05) * ((error <= allowed) - self.share)
            self.steps += 1

    def take_a_rest(self) -> None:
        """Looks at fewer steps where the last ones were noisy."""
        (before, last), self.known = self.known, (self.looked_at, self.share)
        enough = self.looked_at >= max(8 << self.returns, before + 1)
        self.rest = 8 if enough and self.share <= min(last, 0.5) else self.rest


class SecantReference:
    """The predictor `secant`."""

    def __init__(self, run: Reference) -> None:
        self.run = run
        # The pairs; where the last gradient was taken, loss and slope there; whether the next loss
        # is one at the same weights, and whether such a loss was another one.
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.trial = SimpleNamespace(based=False, loss=math.nan, slope=0.0, shortened=0)
        self.trial.again = self.trial.noise = False
        # Of each matrix those of its rows and columns; pairs noted since then, None without any.
        self.bases: dict[int, tuple[Tensor, Tensor]] = {}
        self.noted: int | None = None

    def step(self, gradients: Tensors, norm: float, loss: float) -> None:
        """One gradient step: judge the last move and make the next, or a base step."""
        ledger, phases, decision, moves = self.run.ledger, self.run.phases, "none", False
        if phases.phase is not Phase.WARMUP:
            decision, moves = self.judge(flat(gradients), loss)
        if not ledger.nonfinite and decision not in ("shortened", "rejected"):
            self.run.update(gradients, norm, loss, still=moves)
        report = Report(
            skipped=bool(ledger.nonfinite) and decision != "rejected",
            rejected=phases.phase is Phase.CORRECT and decision in ("none", "rejected"),
            shortened=decision == "shortened",
            cooldown=int(ledger.cooldown),
        )
        if self.run.takes_other():
            return phases.after_gradient(report, False, self.run.config.full_steps)
        phases.after_gradient(report, True, 0)
        if phases.phase is Phase.PREDICT:
            if moves:
                self.move()
            phases.after_prediction(alone=True)

    def judge(self, g: Tensor, loss: float) -> tuple[str, bool]:
        """Decides on the move on trial by sufficient decrease; whether another may follow."""
        ledger, trial, phases = self.run.ledger, self.trial, self.run.phases
        ledger.blocked = ledger.blocked + 1 if ledger.nonfinite and ledger.moved else 0
        if ledger.nonfinite and ledger.blocked < 2:
            return "none", False
        w = flat(p.w for p in self.run.tensors)
        moved = w - trial.w if trial.based else w
        after, known = float(g @ moved), not math.isnan(loss) and not math.isnan(trial.loss)
        trapezoid, enough = 0.5 * (trial.slope + after), 1e-4 * trial.slope
        change = loss - trial.loss if known else trapezoid
        rounded = known and abs(change) <= 1e-6 * abs(trial.loss) and trapezoid <= enough
        fell = not ledger.nonfinite and (change <= enough or rounded)
        curved = after > trial.slope if ledger.moved else True
        if trial.based and curved and fell | (not ledger.moved) and not ledger.nonfinite:
            self.pairs = [*self.pairs, (moved, g - trial.g)][-self.run.config.history :]
            self.noted = None if self.noted is None else self.noted + 1
        if ledger.moved and not fell:
            ledger.horizon *= 0.5
            if trial.shortened < 3:
                share = -trial.slope / (2.0 * (change - trial.slope))
                share = 0.1 if ledger.nonfinite else min(max(share, 0.1), 0.5)
                trial.slope, trial.shortened = share * trial.slope, trial.shortened + 1
                self.place(trial.w + share * moved)
                ledger.blocked = 0
                return "shortened", False
            self.place(trial.w)
            self.give_up()
            return "rejected", False
        if ledger.moved:
            ledger.horizon, ledger.rejections = min(1.2 * ledger.horizon, 1e12), 0
            ledger.accepted += 1
        if trial.again:
            trial.noise = not abs(loss - trial.loss) <= 1e-4 * abs(trial.loss)
        decision, trial.again = "accepted" if ledger.moved else "none", False
        ledger.moved = 0
        trial.based, trial.w, trial.g, trial.loss, trial.shortened = True, w, g, loss, 0
        last = phases.phase is Phase.CORRECT or phases.ends_gradients
        return decision, last and ledger.cooldown <= 1

    def move(self) -> None:
        """The two loops of L-BFGS (Nocedal 1980) in a diagonal metric, within a trust radius."""
        o, trial, g = self.run.options, self.trial, self.trial.g
        if len(self.pairs) >= 3 and (self.noted is None or self.noted >= 10):
            self.renew_bases()
        m = flat(p.m / (1.0 - o.betas[0] ** p.steps) for p in self.run.tensors)
        metric, gamma, q = o.lr / (self.second_moment().sqrt() + o.eps), 1.0, g.clone()

        def norms(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            s, y = self.turned(s), self.turned(y)
            return (s @ (s / metric)).sqrt(), (y @ (metric * y)).sqrt()

        pairs = [(s, y) for s, y in self.pairs if s @ y > 1e-8 * norms(s, y)[0] * norms(s, y)[1]]
        steps = []
        for s, y in reversed(pairs):
            steps.append(float(s @ q / (s @ y)))
            q = q - steps[-1] * y
        if pairs:
            move, change = norms(*pairs[-1])
            gamma = float(move / change)
        r = self.turned(gamma * metric * self.turned(q), back=True)
        for (s, y), step in zip(pairs, reversed(steps)):
            r = r + s * (step - float(y @ r / (s @ y)))
        decay = o.lr * o.weight_decay * trial.w
        uphill = -float(g @ decay)
        kept = min(1.0, 0.01 * float(g @ r) / uphill) if uphill > 0 else 1.0
        seen = flat(p.v for p in self.run.tensors) > 0
        moved = -(r + kept * decay) * seen
        # Where there are bases, without the decay.
        length = (self.turned(-r if self.bases else moved).square() / metric)[seen].sum().sqrt()
        radius = 3.0 * self.run.ledger.horizon * (self.turned(m).square() * metric).sum().sqrt()
        share = min(1.0, float(radius / length.clamp(min=1e-300)))
        trial.slope = share * float(g @ moved)
        if not (trial.slope < 0 and bool(moved.isfinite().all())):
            return self.give_up()
        self.run.ledger.moved = 1
        self.place(trial.w + share * moved)

    def gradients(self) -> list[Tensor]:
        """Those that the pairs remember, newest first."""
        found = [self.trial.g]
        for _, change in reversed(self.pairs):
            found.append(found[-1] - change)
        return found

    def second_moment(self) -> Tensor:
        """Their mean square, in the bases; the rule's, where there are none."""
        beta2 = self.run.options.betas[1]
        v = flat(p.v / (1.0 - beta2**p.steps) for p in self.run.tensors)
        if len(self.pairs) < 3:
            return v
        square = stack([*map(self.turned, self.gradients())]).square().mean(0)
        return where(square > 0, square, v)

    def renew_bases(self) -> None:
        """Takes the eigenvectors of ΣGGᵀ and ΣGᵀG of all matrices."""
        self.noted = 0
        every = [split(g, self.sizes) for g in self.gradients()]
        for index, p in enumerate(self.run.tensors):
            if p.w.dim() == 2 and min(p.w.shape) > 1:
                its = stack([parts[index].view(p.w.shape) for parts in every])
                left, right = (its @ its.mT).sum(0), (its.mT @ its).sum(0)
                self.bases[index] = eigh(left).eigenvectors, eigh(right).eigenvectors

    def turned(self, vector: Tensor, back: bool = False) -> Tensor:
        """A vector with its matrices in their bases, or back from there."""
        parts = list(split(vector, self.sizes))
        for index, (left, right) in self.bases.items():
            x = parts[index].view(len(left), len(right))
            x = left @ x @ right.T if back else left.T @ x @ right
            parts[index] = x * (x.abs() >= 4.0 * finfo(x.dtype).eps * vector_norm(x))
        return flat(parts)

    def give_up(self) -> None:
        """Drops the pairs, and waits twice as long with each rollback in a row."""
        ledger, self.pairs, self.trial.based, self.trial.again = self.run.ledger, [], False, True
        self.bases, self.noted = {}, None
        self.trial.shortened = ledger.moved = ledger.blocked = 0
        ledger.cooldown = self.run.config.full_steps * 2.0 ** min(ledger.rejections, 10)
        ledger.rejections, ledger.rejected = ledger.rejections + 1, ledger.rejected + 1

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        return [p.w.numel() for p in self.run.tensors]

    def place(self, w: Tensor) -> None:
        """Gives the weights the values of one long vector."""
        for p, values in zip(self.run.tensors, split(w, self.sizes)):
            p.w.copy_(values.view(p.w.shape))


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All elements in one vector, a copy."""
    return cat([tensor.flatten() for tensor in tensors])
