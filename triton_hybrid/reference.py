"""The whole method in plain torch: the place to start reading, and the oracle of the tests.

`Reference.step` is `HybridOptimizer.step` in the inline drive, on the tensors of one group, in FP32
or FP64. Nothing is fused, cut, offloaded or kept on a device. Scalars have the names that they have
in the ledger; ``kernels/ledger.py`` says what each of them means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.config import HybridConfig
from triton_hybrid.phases import Phase, PhaseController, Report
from triton_hybrid.predictors.auto import AVERAGES
from triton_hybrid.reference_secant import SecantReference, Watch, flat

Tensors = Sequence[Tensor]

LEDGER = """norm_count norm_mean norm_variance norm_limited loss_count loss_mean loss_variance
    loss_limited losses loss_early loss_late loss_noise gradients
    update_square update_count gradient_square slow_count slow_noise update_slow update_update
    slow_slow confidence signal moved stretch jump_square rejections cooldown blocked nonfinite
    accepted rejected largest_lr"""


def dot(x: Tensor, y: Tensor) -> float:
    """The inner product of two tensors."""
    return float(x.flatten().double().dot(y.flatten().double()))


def orthogonalised(x: Tensor, steps: int = 5) -> Tensor:
    """A matrix with singular values near one, by so many Newton-Schulz steps."""
    x = x / x.norm().clamp(min=1e-8)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Reference:
    """The optimizer, for reading and checking.

    Args:
        weights: One tensor for each parameter, changed in place.
        config: Of the phases.
        base: ``"adamw"``, ``"lion"`` or, for wide matrices, ``"muon"``.
        options: ``lr``, ``betas``, ``eps``, ``weight_decay``, ``momentum``, ``max_grad_norm``.
    """

    def __init__(
        self, weights: Tensors, config: HybridConfig, base: str = "adamw", **options: Any
    ) -> None:
        defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
        defaults |= {"momentum": 0.95, "max_grad_norm": math.inf}
        self.options = SimpleNamespace(**{**defaults, **options})
        self.config, self.base, self.phases = config, base, PhaseController(config)
        self.linear, self.cycles, self.last_lr = config.predictor == "linear", -1, -1.0
        entries = {**dict.fromkeys(LEDGER.split(), 0.0), "horizon": 1.0, "loss_previous": math.nan}
        self.ledger = SimpleNamespace(**entries)
        self.tensors = [
            SimpleNamespace(w=w, m=0.0 * w, v=0.0 * w, slow=0.0 * w, start=0.0 * w, moved=0.0 * w,
                            last=0.0 * w, ratio=0.0, cross=0.0, past=0.0,
                            square=0.0, steps=0, factor=1.0, slope=0.0)
            for w in weights
        ]  # fmt: skip
        self.model = "slow_ema" if config.predictor == "auto" else config.predictor
        self.secant, self.watch = SecantReference(self), Watch()

    @property
    def mixes(self) -> bool:
        """Whether the slow EMA predicts, and is a part of Muon's momentum."""
        return self.model == "slow_ema"

    # ------------------------------------------------------------------ one step, all phases

    def step(self, gradients: Sequence[Tensor], loss: float = math.nan) -> None:
        """One gradient step, and the predictions that follow it."""
        o, ledger, phases = self.options, self.ledger, self.phases
        other_run = o.lr > 2.0 * self.last_lr or o.lr < self.last_lr / 20.0
        ledger.largest_lr = o.lr if other_run else max(ledger.largest_lr, o.lr)
        self.last_lr, norm = o.lr, math.sqrt(sum(dot(g, g) for g in gradients))
        ledger.nonfinite = not all(bool(g.isfinite().all()) for g in gradients)
        correct, decision = phases.phase is Phase.CORRECT, "none"
        watch, before = self.watch, flat(p.w for p in self.tensors)
        if watch.step is not None:
            watch.compare(flat(gradients), loss)
        followed, watch.step = phases.base_step_follows and self.model == "slow_ema", None
        followed, watch.rest = followed and not watch.rest, max(watch.rest - followed, 0)
        if self.model == "secant":
            return self.secant.step(gradients, norm, loss)
        if correct:
            decision = self.verify(gradients, norm, loss)
        if not ledger.nonfinite and decision != "rejected":
            self.update(gradients, norm, loss)
        if followed and not ledger.nonfinite:
            watch.step, watch.loss = flat(p.w for p in self.tensors) - before, loss
            watch.slope = float(flat(gradients) @ watch.step)
        ledger.gradients += not (ledger.nonfinite and decision != "rejected")
        if phases.ends_gradients and self.linear and not ledger.nonfinite:
            self.end_cycle()
        if correct and decision == "accepted":
            self.cycles = 0
        report = Report(
            skipped=bool(ledger.nonfinite) and decision != "rejected",
            rejected=correct and decision != "accepted",
            confident=self.sure(),
            cooldown=int(ledger.cooldown),
        )
        if self.takes_other():
            return phases.after_gradient(report, False, self.config.full_steps)
        slow = self.mixes and self.base != "muon"
        ready, refit = (self.cycles >= 2, self.config.full_steps) if self.linear else (slow, 2)
        phases.after_gradient(report, ready, refit)
        while phases.phase is Phase.PREDICT:
            self.predict(first=phases.in_row == 0)
            phases.after_prediction()

    def takes_other(self) -> bool:
        """Lets `auto` take the other predictor, if it should; whether it did."""
        ledger, watch, secant = self.ledger, self.watch, self.secant
        if self.config.predictor != "auto" or not self.phases.wants_report or ledger.moved:
            return False
        quiet = watch.steps >= 8 << watch.returns and watch.share > 0.5
        watch.take_a_rest()
        if not (secant.trial.noise if self.model == "secant" else quiet and self.base == "adamw"):
            return False
        begins = self.model == "secant"
        self.model = "slow_ema" if begins else "secant"
        self.watch, self.secant = Watch(watch.returns + begins), SecantReference(self)
        ledger.horizon, ledger.rejections, ledger.cooldown = 1.0, 0.0, 0.0
        for name in AVERAGES if begins else ():
            setattr(ledger, name, 0.0)
        return True

    # ----------------------------------------------------- Warmup, Full, Correct: base update

    def update(self, gradients: Tensors, norm: float, loss: float, still: bool = False) -> None:
        """The base update, the slow EMA, and what is measured of both; ``still``: no step."""
        o, ledger, n = self.options, self.ledger, self.ledger.slow_count
        clip = min(o.max_grad_norm / (norm + 1e-6), 1.0)
        usual = 2.0 * math.exp(ledger.norm_mean) / (norm + 1e-30)
        steady = min(clip, usual) / clip if ledger.norm_count else 1.0  # outliers count double
        beta = min(n / (n + 4), self.config.slow_beta)
        uu = us = ss = ee = 0.0
        for p, g in zip(self.tensors, (clip * g for g in gradients)):
            p.steps += 1
            momentum = p.m.clone()
            update = (size := self.size(p)) * self.direction(p, g)
            if not still:
                p.w.mul_(1.0 - o.lr * o.weight_decay).sub_(update)
            if self.base != "muon":  # whose matrices no prediction moves along the slow EMA
                ahead = size * self.along(p, momentum if self.turns(p) else p.slow)
                uu, us = uu + dot(update, update), us + dot(update, ahead)
                ss += dot(ahead, ahead)
            if not self.turns(p):
                p.slow += (1.0 - beta) * (steady * g - p.slow)
            ee += dot(p.slow, p.slow)
        self.observe(norm, loss)
        if self.phases.measures:  # the confidence is the cosine of update and slow direction
            rate = max(1.0 / (ledger.update_count + 1.0), 0.05)
            ledger.update_square += rate * (uu - ledger.update_square)
            ledger.update_count += 1
            for name, value in (("update_slow", us), ("update_update", uu), ("slow_slow", ss)):
                setattr(ledger, name, 0.8 * getattr(ledger, name) + 0.2 * value)
            product = math.sqrt(ledger.update_update * ledger.slow_slow + 1e-300)
            ledger.confidence = min(max(ledger.update_slow / product, 0.0), 1.0)
        used = norm * clip * steady
        ledger.gradient_square += (1.0 - beta) * (used**2 - ledger.gradient_square)
        noise = ledger.slow_noise = beta**2 * ledger.slow_noise + (1.0 - beta) ** 2
        if self.phases.measures:  # E|g|² = s + n, E|slow EMA|² = s + noise · n
            share = ee / (ledger.gradient_square + 1e-300) - noise
            ledger.signal = min(max(share / max(1.0 - noise, 1e-9), 0.0), 1.0) * (noise < 0.999)
        ledger.slow_count += 1
        ledger.cooldown = max(ledger.cooldown - 1.0, 0.0)

    def size(self, p: SimpleNamespace) -> float:
        """What a direction is multiplied with."""
        if self.base == "adamw":
            return float(self.options.lr / (1.0 - self.options.betas[0] ** p.steps))
        factor = 0.2 * math.sqrt(max(p.w.shape)) if self.base == "muon" else 1.0
        return float(self.options.lr) * factor

    def direction(self, p: SimpleNamespace, g: Tensor) -> Tensor:
        """Updates the moments; the direction of the base rule's step."""
        (beta1, beta2), momentum = self.options.betas, self.options.momentum
        if self.base == "muon" and self.mixes:
            p.m.lerp_(g, 1.0 - momentum**3)
            part = 0.6 * min(self.ledger.slow_count / 1000.0, 1.0)
            return orthogonalised(torch.lerp(torch.lerp(g, p.m, momentum**3), p.slow, part))
        if self.base == "muon":
            p.m.lerp_(g, 1.0 - momentum)
            return orthogonalised(torch.lerp(g, p.m, momentum))
        if self.base == "lion":
            sign = torch.lerp(p.m, g, 1.0 - beta1).sign()
            p.m.lerp_(g, 1.0 - beta2)
            return sign
        p.m.lerp_(g, 1.0 - beta1)
        p.v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        return self.along(p, p.m)

    def along(self, p: SimpleNamespace, x: Tensor) -> Tensor:
        """The direction that the base rule would take for a gradient ``x``."""
        if self.base == "lion":
            return x.sign()
        correction2 = 1.0 - self.options.betas[1] ** max(p.steps, 1)
        scaled: Tensor = x / ((p.v / correction2).sqrt() + self.options.eps)
        return scaled

    def observe(self, norm: float, loss: float) -> None:
        """Running mean and variance of the gradient's logarithmic norm and the loss's change."""
        ledger, change = self.ledger, loss - self.ledger.loss_previous
        logarithm = math.log(norm) if norm > 0 else math.nan
        least, taken = 1e-3 * abs(ledger.loss_previous), 0.0
        for name, value, floor in (("norm", logarithm, 0.4), ("loss", change, least)):
            if math.isfinite(value):
                parts = [f"{name}_{part}" for part in ("count", "mean", "variance", "limited")]
                count, mean, variance, last = (getattr(ledger, part) for part in parts)
                rate, far = max(1.0 / (count + 1.0), 0.05), 5.0 * max(math.sqrt(variance), floor)
                limited = count > 1 and far > 0 and not last and abs(value - mean) > far
                deviation = math.copysign(far, value - mean) if limited else value - mean
                variance = (1.0 - rate) * (variance + rate * deviation**2)
                news = count + 1, mean + rate * deviation, variance, limited
                for part, new in zip(parts, news):
                    setattr(ledger, part, new)
                taken = value - mean - deviation  # of the loss, which is the last
        if math.isfinite(loss):
            self.follow(loss - taken)

    def follow(self, loss: float) -> None:
        """Means of earlier and of later losses, and half the squared changes: their noise."""
        ledger, n = self.ledger, self.ledger.losses
        change = loss - ledger.loss_previous if math.isfinite(ledger.loss_previous) else 0.0
        ledger.loss_noise += 4.0 / (n + 4.0) * (0.5 * change**2 - ledger.loss_noise)
        ledger.loss_late += 10.0 / (n + 10.0) * (loss - ledger.loss_late)
        apart = ledger.loss_early + 4.0 / (n + 4.0) * (loss - ledger.loss_early) - ledger.loss_late
        reach = math.sqrt(50.2 * ledger.loss_noise / (n + 1))
        ledger.loss_early = ledger.loss_late + min(max(apart, -reach), reach)
        ledger.losses, ledger.loss_previous = n + 1, loss

    def sure(self) -> bool:
        """Whether the model is confident enough, which is worth nothing where losses are flat."""
        ledger, threshold = self.ledger, self.config.confidence_threshold
        apart = (ledger.loss_early - ledger.loss_late) ** 2 * ledger.losses
        flat = ledger.losses >= 400 and apart < 5.58 * ledger.loss_noise
        return bool((0.0 if flat else ledger.confidence) >= threshold)

    # ------------------------------------------------------------------------------- Predict

    def end_cycle(self) -> None:
        """Notes how far the weights came in this cycle, and fits the ratio of `linear`."""
        begins, known, total = self.cycles < 0, 0.0, 0.0
        self.cycles = min(self.cycles + 1, 2)
        for p in self.tensors:
            newest, square = p.w - p.start, p.square
            cross, p.square = dot(newest, p.last), dot(newest, newest)
            p.last, p.start = newest, p.w.clone()
            total += p.square
            if self.cycles < 2:
                p.cross = p.past = p.ratio = 0.0
                continue
            ratio = p.cross / p.past if p.past > 0 else 1.0
            known += 2.0 * ratio * cross - ratio**2 * square
            p.cross, p.past = 0.5 * p.cross + cross, 0.5 * p.past + square
            p.ratio = min(max(p.cross / p.past, -2.0), 2.0) if p.past > 0 else 0.0
        if not begins:
            self.ledger.confidence = math.sqrt(min(max(known / max(total, 1e-300), 0.0), 1.0))

    def predict(self, first: bool) -> None:
        """Moves the weights by one predicted step, unless the ledger forbids it."""
        o, ledger, config = self.options, self.ledger, self.config
        fresh = not ledger.stretch and not ledger.cooldown and not ledger.nonfinite and self.sure()
        if not (fresh or (ledger.stretch and ledger.moved)):
            return
        decayed = 1.0 - o.lr / ledger.largest_lr if ledger.largest_lr else 0.0
        square, slopes, decay = 0.0, [], o.betas[self.base == "lion"]
        decay = o.momentum if self.base == "muon" else decay
        for p in self.tensors:
            factor, steps = ledger.horizon * p.factor, 0.25 + 3.0 * decayed
            if first and not self.linear:
                p.start, p.moved = p.w.clone(), torch.zeros_like(p.w)
            if self.linear:
                move = factor / config.full_steps * p.ratio * p.last * (p.slow != 0)
            elif self.turns(p):
                p.turned = self.orthogonal(p) if first else p.turned
                move = -factor * 3.0 * o.lr * p.turned
            else:
                move = -factor * o.lr * steps * self.along(p, p.slow)
            p.moved = p.moved + move
            p.w.copy_(p.w + move if self.linear else findable(p.start, p.moved))
            square += dot(move, move)
            slopes.append(dot(p.m, move) / (1.0 - decay ** max(p.steps, 1)))
        distance = math.sqrt(ledger.jump_square) + math.sqrt(square)
        limit = config.divergence_threshold * 10.0 * (self.phases.in_row + 1)
        if not math.isfinite(distance) or distance > limit * math.sqrt(ledger.update_square):
            return self.reject()
        if sum(slopes) > 0:
            return self.roll_back()
        for p, slope in zip(self.tensors, slopes):
            p.slope += slope
        ledger.moved, ledger.stretch, ledger.jump_square = 1, ledger.stretch + 1, distance**2

    def turns(self, p: SimpleNamespace) -> bool:
        """Whether a parameter moves along its orthogonalised momentum: a matrix or a filter.

        One between layers: with about as many outputs as inputs.
        """
        if p.w.ndim < 2 or not self.mixes or self.base == "muon":
            return False
        least, most = sorted(map(int, p.w.shape[:2]))
        return least > 1 and most < 6 * least

    def orthogonal(self, p: SimpleNamespace) -> Tensor:
        """The direction along the momentum, orthogonalised; a row for each output."""
        x = self.along(p, p.m).flatten(1)
        rows, columns = x.shape
        x = orthogonalised(x.mT, 3).mT if rows > columns else orthogonalised(x, 3)
        x = 0.2 * math.sqrt(max(rows, columns)) * x.reshape(p.w.shape)
        return torch.where(p.m != 0, x, 0.0)

    # ------------------------------------------------------------------------------- Correct

    def verify(self, gradients: Sequence[Tensor], norm: float, loss: float) -> str:
        """Accepts the prediction and corrects it, or rolls it back."""
        ledger, threshold = self.ledger, self.config.divergence_threshold
        blocked = ledger.blocked + 1 if ledger.nonfinite else 0
        if not ledger.moved:
            ledger.blocked = 0
            return "none"
        deviation = max(math.sqrt(ledger.norm_variance), 0.4)
        spread = max(math.sqrt(ledger.loss_variance), 1e-3 * abs(ledger.loss_previous))
        excess = loss - (ledger.loss_previous + ledger.loss_mean)
        too_long = math.log(norm + 1e-30) - ledger.norm_mean > threshold * deviation
        too_high = ledger.loss_count > 1.5 and excess > threshold * spread
        along = sum(dot(g, p.w - p.start) for p, g in zip(self.tensors, gradients))
        back = ledger.norm_variance < 1e-4 and along > 0.5 * norm * math.sqrt(ledger.jump_square)
        bad = ((too_long or back) and ledger.norm_count > 1.5) or too_high or math.isinf(loss)
        if blocked >= 2 if ledger.nonfinite else bad:
            self.reject()
            return "rejected"
        ledger.blocked = blocked
        if ledger.nonfinite:
            return "none"
        trust = min(max(2.0 * ledger.signal - 1.0, 0.0), 1.0)
        for p, g in zip(self.tensors, gradients):
            after, fraction = dot(g, p.w - p.start), 1.0
            if p.slope < 0 and after > p.slope:  # where the slope along the move vanishes
                secant = p.slope / (p.slope - after)
                fraction = 1.0 + trust * (min(max(secant, 0.1), 2.0) - 1.0)
            if abs(fraction - 1.0) >= 1e-3:
                p.w.copy_(p.start + fraction * (p.w - p.start))
            else:
                fraction = 1.0
            p.factor = min(max((1.0 + 0.9 * (p.factor - 1.0)) * fraction, 0.125), 4.0)
            p.slope, p.start = 0.0, p.w.clone() if self.linear else p.start
        ledger.horizon, ledger.rejections = min(1.25 * ledger.horizon, 1.0), 0
        ledger.moved = ledger.stretch = ledger.jump_square = 0
        ledger.accepted += 1
        return "accepted"

    def roll_back(self) -> None:
        """Puts the weights back."""
        for p in self.tensors:
            p.w.copy_(p.start)
            p.slope = 0.0
        self.ledger.moved = self.ledger.stretch = self.ledger.jump_square = 0

    def reject(self) -> None:
        """Rolls back; halves the horizon, and waits twice as long with each rejection in a row."""
        ledger = self.ledger
        self.roll_back()
        ledger.cooldown = math.ceil(self.config.full_steps / 4) * 2.0 ** min(ledger.rejections, 10)
        ledger.horizon, ledger.rejections = 0.5 * ledger.horizon, ledger.rejections + 1
        ledger.blocked, ledger.rejected = 0, ledger.rejected + 1


def findable(start: Tensor, moved: Tensor) -> Tensor:
    """Weights after a displacement, but where one byte might not tell what was there before.

    It has room for 127 units in the last place by which a subtraction misses it.
    """
    bits = torch.int64 if start.dtype == torch.float64 else torch.int32
    after = start + moved
    lost = start.view(bits) - (after - moved).view(bits)
    near = (moved.abs() <= start.abs() * 127.0) | (start == 0)
    return torch.where(near & (lost.abs() < 128), after, start)
