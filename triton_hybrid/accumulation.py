"""Adaptive accumulation: as many micro-batches as a step needs.

A window's gradient may be known well enough before the last of its micro-batches; the noise scale
(`noise_scale`) tells.

The loop calls ``backward()`` on the mean loss of each micro-batch, **not divided** by their number,
and asks `window_complete`; the optimizer divides by the number that was really used:

    for batch in loader:
        model(batch).loss.backward()
        if opt.window_complete:
            opt.step()
            opt.zero_grad()
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.checks import Configuration, is_int, require, warn
from triton_hybrid.distributed import Ranks
from triton_hybrid.flat_shards import gradient_beside
from triton_hybrid.noise_scale import NoiseScale, squared_norm
from triton_hybrid.shards import by_share, version_of

SHARE = 1 / 16
"""Longest window, as a part of the noise scale. Windows of k micro-batches take 1 + k / noise times
as many of them as single ones (McCandlish et al., equation 2.11): here 6% more at most."""
AVERAGED = 10.0
"""Gradients in AdamW's exp_avg, 1 / (1 - β1): its noise is what limits the learning rate."""
FIRST_INTERVAL, LONGEST_INTERVAL = 8, 128
"""Windows of one between two that are measured: doubled each time, but for the first again where
what was measured last would, taken alone, make windows grow."""
SAME = 1e-9
"""Relative difference up to which numbers of all ranks are one number."""

Marks = list[tuple[int, int, int]]
"""Place, serial number and version of each gradient: what a backward pass changes."""
_SERIALS = itertools.count()


@dataclass(frozen=True)
class AccumulationConfig(Configuration):
    """How many micro-batches a step may accumulate.

    The loop does not divide the loss: each ``backward()`` is of the mean loss of a micro-batch, and
    the optimizer averages over those that it really used. The learning rate is the one that suits
    windows of ``maximum``; a shorter one takes the part of it that `rate_factor` says.

    Attributes:
        maximum: Micro-batches of the longest window. At least 1.
        minimum: Micro-batches of the shortest window, at most ``maximum``; equal to it, windows are
            fixed, and nothing is measured.

    Raises:
        ValueError: A value outside its range; the message names field, value and range.
    """

    maximum: int = 4
    minimum: int = 1

    def __post_init__(self) -> None:
        require(is_int(self.maximum, 1), "maximum", self.maximum, "an integer >= 1")
        allowed = f"an integer in [1, maximum={self.maximum}]"
        require(is_int(self.minimum, 1, self.maximum), "minimum", self.minimum, allowed)


class Windows:
    """Counts the micro-batches of a window, and chooses how long the next one is.

    Everything is decided on the host, by numbers that are the same on every rank. The squared norms
    are computed on the device (one read of the gradient a micro-batch, in windows of two or more),
    copied when the window is complete, and looked at when the next one begins, one small read. A
    window of one says nothing of the noise and is not measured; now and then one of two, ever more
    rarely while the answer stays the same, shows whether windows should grow again.

    Args:
        config: Shortest and longest window.
        ranks: Who decides together.
    """

    def __init__(self, config: AccumulationConfig, ranks: Ranks) -> None:
        self.config, self._ranks = config, ranks
        self.noise = NoiseScale()
        self.count = 0  # micro-batches in the gradients
        self.length = self._chosen = config.maximum
        self.rate = 1.0  # of the last step, relative to the one for windows of `maximum`
        self.windows = self.micro_batches = 0  # that were used
        self._begun = self._measured = self._parts = False
        self._unmeasured, self._interval = 0, FIRST_INTERVAL
        self._blank = 0  # times that it was asked without a gradient
        self._marks: Marks = []
        self._squares: Tensor | None = None  # |S_k|² of this window, FP64, and on the way to us:
        self._arriving: tuple[Tensor, int, Any] | None = None
        self._numbers: Tensor | None = None  # `count` and `rate` on the device
        self._noted: tuple[float, float] | None = None  # as they are there

    def ask(self, params: Sequence[Tensor]) -> bool:
        """Whether the gradients are those of a whole window; counts a backward pass only once."""
        marks = _marks(params)
        if marks != self._marks and marks:
            others = [mark[1] for mark in marks] != [mark[1] for mark in self._marks]
            # In place, whoever clips has written; new ones: a GradScaler has left the step out.
            if self.complete and others:
                self.restart()
            if not self.complete:
                self._take_micro_batch(params)
            self._marks = marks
        self._blank = 0 if marks else self._blank + 1
        if self._blank == self.config.maximum + 1:
            warn(
                f"window_complete was asked {self._blank} times, and no parameter has a gradient: "
                "the window does not end. fully_shard keeps gradients elsewhere until they are "
                "reduced; leave set_requires_gradient_sync(True) on"
            )
        return self.complete

    @property
    def complete(self) -> bool:
        """Whether the window is complete."""
        return 0 < self.length <= self.count

    @property
    def closing(self) -> bool:
        """Whether the coming micro-batch completes the window."""
        self._begin()
        return self.count == self.length - 1

    def _take_micro_batch(self, params: Sequence[Tensor]) -> None:
        self._begin()
        if self._measured:
            shares, self._parts = by_share(self._ranks.all_of(params), self._ranks)
            square = torch.stack([x * squared_norm(its) for x, its in shares.items()]).sum()
            if self._squares is None or self._squares.device != square.device:
                self._squares = square.new_zeros(self.config.maximum)
            self._squares[self.count] = square
        self._count_one()
        if self._measured and self.complete:
            self._send()

    def _begin(self) -> None:
        """Chooses the length of the window that begins, unless that is done."""
        if self._begun:
            return
        self._receive()
        adaptive = self.config.minimum < self.config.maximum
        self.length = self._chosen
        if adaptive and self.length == 1:
            self._unmeasured += 1
            if self._unmeasured > self._interval:
                self.length = 2
        self._measured, self._begun = adaptive and self.length > 1, True

    def _send(self) -> None:
        """Begins to copy what was measured to the host; nobody waits."""
        assert self._squares is not None
        squares = self._squares[: self.count]
        if self._parts:  # of one gradient: their sum is the same on every rank
            sums = self._ranks.reduce(squares.clone())
            pooled, ranks = torch.stack([sums, sums * sums]), 1
        else:
            pooled, ranks = self._ranks.pooled(squares)
        event = None
        if pooled.device.type == "cuda":
            host = torch.empty(pooled.shape, dtype=pooled.dtype, device="cpu", pin_memory=True)
            pooled = host.copy_(pooled, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._arriving = pooled, ranks, event

    def _receive(self) -> None:
        """Takes in what was measured, and chooses by it."""
        if self._arriving is None:
            return
        (pooled, ranks, event), self._arriving = self._arriving, None
        if event is not None:
            event.synchronize()
        squares, fourth = pooled.tolist()
        apart = [wide > (1.0 + SAME) * x * x for x, wide in zip(squares, fourth)]
        ranks_apart = [ranks if differs else 1 for differs in apart]
        latest = NoiseScale()
        for scale in (self.noise, latest):
            scale.take(squares, ranks_apart)
        before, self._chosen = self._chosen, self.choose(self.noise.micro_batches)
        steady = before == self._chosen >= self.choose(latest.micro_batches)
        self._interval = min(2 * self._interval, LONGEST_INTERVAL) if steady else FIRST_INTERVAL
        self._unmeasured = 0

    def choose(self, noise: float) -> int:
        """The length of windows at a noise scale, in micro-batches."""
        least, most = self.config.minimum, self.config.maximum
        if not noise < most / SHARE:  # NaN: nothing was measured yet
            return most
        return max(least, math.floor(SHARE * noise))

    def _count_one(self) -> None:
        self.count += 1
        self.rate = rate_factor(self.count, self.config.maximum, self.noise.micro_batches)
        if self._numbers is not None:  # a step that is replayed asks nobody
            self.numbers(self._numbers.device)

    def closure_ran(self) -> None:
        """What a closure has computed without asking is one micro-batch."""
        if not self.count:
            self._count_one()

    def numbers(self, device: torch.device) -> Tensor:
        """`count`, at least 1, and `rate`, FP64 on a device.

        They lie in one place, so that a step captured in a graph reads those of the present window.
        """
        now = float(max(self.count, 1)), self.rate  # of several ranks, one may have no data
        if self._numbers is None or self._numbers.device != device:
            self._numbers, self._noted = torch.ones(2, dtype=torch.float64, device=device), None
        if now != self._noted:
            for place, number in zip(self._numbers, now):
                place.fill_(number)
            self._noted = now
        return self._numbers

    def require_count(self) -> None:
        """Refuses gradients that nobody has counted with a RuntimeError."""
        if not self.count:
            raise RuntimeError(
                "accumulation is set, and nobody asked window_complete since the last step: how "
                "many micro-batches the gradients are the sum of is not known. Call backward() on "
                "the mean loss of each micro-batch, not divided by their number, and step() and "
                "zero_grad() when optimizer.window_complete is True"
            )

    def close(self, params: Sequence[Tensor]) -> None:
        """Ends the step of a window."""
        self.windows += 1
        self.micro_batches += self.count
        self.drop(params)

    def drop(self, params: Sequence[Tensor]) -> None:
        """Begins a new window: the gradients are used, or thrown away."""
        self.restart()
        self._marks = _marks(params)

    def restart(self) -> None:
        """Forgets the window's micro-batches; one that has none yet has been begun once."""
        self.count, self._begun = 0, self._begun and not self.count

    def state(self, params: Sequence[Tensor]) -> dict[str, Any]:
        """Everything that must survive a checkpoint, as plain numbers."""
        self._receive()
        squares = [math.nan] * self.config.maximum
        if self._measured and self._squares is not None:
            squares[: self.count] = self._squares[: self.count].tolist()
        values = {name: float(getattr(self, name)) for name in _COUNTS}
        return {
            **values,
            "counted": float(_marks(params) == self._marks),  # or a backward pass came since
            "noise": {name: float(x) for name, x in dataclasses.asdict(self.noise).items()},
            "squares": {str(k): square for k, square in enumerate(squares, 1)},
        }

    def restore(self, saved: Mapping[str, Any], params: Sequence[Tensor]) -> None:
        """The inverse of `state`; the micro-batches of a window count where its gradients are."""
        self.noise = NoiseScale(**saved["noise"])
        for name, kind in _COUNTS.items():
            setattr(self, name, kind(saved[name]))
        most, self._arriving = self.config.maximum, None
        self._chosen = min(max(self._chosen, self.config.minimum), most)  # another configuration
        marks = _marks(params)
        self._marks = marks if saved.get("counted", 1.0) else []
        squares = [float(saved["squares"].get(str(k), math.nan)) for k in range(1, most + 1)]
        self._squares = None
        if not marks:
            self.count, self._begun = 0, False
        elif self.count:
            device = params[0].device
            self._squares = torch.tensor(squares, dtype=torch.float64, device=device)

    def report(self) -> dict[str, Any]:
        """What `HybridStats` says of it."""
        noise = self.noise.micro_batches
        return {
            "windows": self.windows,
            "micro_batches": self.micro_batches,
            "micro_batches_saved": self.windows * self.config.maximum - self.micro_batches,
            "noise_scale": None if math.isnan(noise) else noise,
        }


_COUNTS: dict[str, type] = {
    **dict.fromkeys(("count", "length", "_chosen", "windows", "micro_batches"), int),
    **dict.fromkeys(("_unmeasured", "_interval"), int),
    **dict.fromkeys(("_begun", "_measured"), bool),
    "rate": float,
}
"""What else `Windows` knows."""


def rate_factor(count: int, maximum: int, noise: float) -> float:
    """Learning rate of a window of `count`, relative to one of `maximum`, at a noise scale.

    The rate that is best for gradient descent is proportional to 1 / (1 + noise / count)
    (McCandlish et al., equation 2.7); AdamW divides by √(|G|² + tr Σ / count) already, which leaves
    the root of it, with the noise of `AVERAGED` gradients: √(count / maximum) where noise is all
    there is, 1 where there is none.
    """
    if not math.isfinite(noise):
        return math.sqrt(count / maximum)
    noise /= AVERAGED
    return math.sqrt((1.0 + noise / maximum) / (1.0 + noise / count))


def _marks(params: Sequence[Tensor]) -> Marks:
    """Of the gradients that are there."""
    grads = ((place, gradient_beside(param)) for place, param in enumerate(params))
    return [(place, _serial(grad), version_of(grad)) for place, grad in grads if grad is not None]


def _serial(grad: Any) -> int:
    """A number that no other tensor has; `id` may be that of one that is no more.

    FSDP1 makes new gradients in each backward pass, often where the last ones were.
    """
    try:
        return int(grad._hybrid_serial)
    except AttributeError:
        grad._hybrid_serial = serial = next(_SERIALS)
        return serial
