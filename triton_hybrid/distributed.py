"""Deciding together: what the ranks of data-parallel training must agree on.

Every gradient step begins with one small sum over the ranks (`Ranks.agree`). It carries what the
decisions rest on and what a rank alone may know: the loss that it observed, what others wrote to
its weights, the norm of its gradients, whether one is not finite, and whether it has any. It also
carries where each rank stands, so that one that does not stand with the others is an error on all
of them. Where the ranks hold parts of the parameters (`Shards`), what is measured of these is
summed too (`Ranks.reduce`), and begins with the same small sum.
"""

from __future__ import annotations

import sys
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.kernels.scalars import Scalars

ENTRIES = ("loss", "seen", "written", "square", "bad", "present", "place", "setup", "weights")
"""What is summed. The last three must be the same everywhere: their squares are summed too."""
COMPARED = 3
_MODULUS = 1 << 20
"""What is compared is smaller, so that FP64 holds the sum of squares over 2^13 ranks exactly."""

Standing = Mapping[str, Any]
"""Where a rank stands: step, phase, how long it lasts, settings and hyperparameters."""


class Ranks:
    """The ranks that decide together.

    Args:
        group: Their process group; None is the default group, where one is initialised, and False
            this rank alone.
        apart: Whether they hold different parameters of one model.
    """

    def __init__(self, group: Any = None, apart: bool = False) -> None:
        self.group, self.apart = group, apart
        self._introduced = self._mentioned = False
        # On a GPU: the last sum on its way to the host, and what this rank had said of itself.
        self._under_way: tuple[Tensor, Any, Standing] | None = None

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """Those of an optimizer that is being made."""
        check_process_group(group)
        zero = _zero_in_the_making() if group is None else None
        return cls(group) if zero is None else cls(zero.process_group, apart=True)

    @property
    def alone(self) -> bool | None:
        """What to make another by: a group cannot be pickled, but that there is none can."""
        return False if self.group is False else None

    @property
    def size(self) -> int:
        """How many ranks there are; 1 for this rank alone."""
        ready = self.group is not False and dist.is_available() and dist.is_initialized()
        return max(dist.get_world_size(self.group), 1) if ready else 1

    @property
    def together(self) -> bool:
        """Whether there is more than this rank."""
        return self.size > 1

    def reduce(self, values: Tensor) -> Tensor:
        """Sums FP64 numbers over the ranks, in place; every rank gets the same bits."""
        if self.together:
            dist.all_reduce(values, group=self.group)
        return values

    def agree(
        self,
        scalars: Scalars,
        present: bool,
        standing: Standing,
        weights: Callable[[], int],
    ) -> bool:
        """Lets every rank go on from the same numbers, if all stand at the same place.

        Loss, written weights, norm and non-finite gradients become those of all ranks. Where some
        have gradients and others none, nobody's are applied: for all of them, this is a gradient
        that is not finite.

        Args:
            scalars: With what `measure` found of this rank's gradients; changed in place.
            present: Whether this rank has gradients.
            standing: Where it stands; its first two entries are step and phase.
            weights: A number for its parameters; in the first step they must be the same.

        Returns:
            Whether any rank has gradients.

        Raises:
            RuntimeError: A rank stands elsewhere. On the CPU before anything has changed; on a GPU,
                for which nobody waits, at the next gradient step.
            NotImplementedError: In the first step, if the ranks hold different parameters.
        """
        ledger = scalars.ledger
        loss, written, bad = (ledger[INDEX[name]] for name in ("loss", "written", "found_inf"))
        first, self._introduced = not self._introduced, True
        seen = ~loss.isnan()
        square, nonfinite = scalars.gradient.unbind()
        own = [torch.where(seen, loss, 0.0), seen.double(), written]
        own += [square, ((nonfinite + bad) > 0).double()]
        entries = self._sum(own, present, standing, weights() if first else 0)
        loss.copy_(torch.where(entries["seen"] > 0, entries["loss"] / entries["seen"], torch.nan))
        written.copy_(entries["written"].clamp(max=1.0))
        square.copy_(entries["square"])
        missing = entries["present"] < self.size
        bad.copy_((missing | (entries["bad"] > 0)).double())
        nonfinite.copy_(bad)
        # Who has some need not ask the others.
        return present or float(entries["present"]) > 0

    def meet(self, scalars: Scalars, standing: Standing) -> None:
        """`agree` for a step without a gradient: who is elsewhere is an error on all ranks.

        What others wrote to the weights of one rank ends the prediction on all of them.
        """
        written = scalars.ledger[INDEX["written"]]
        zero = torch.zeros_like(written)
        entries = self._sum([zero, zero, written, zero, zero], True, standing, 0)
        written.copy_(entries["written"].clamp(max=1.0))

    def _sum(
        self, own: list[Tensor], present: bool, standing: Standing, weights: int
    ) -> dict[str, Tensor]:
        """The one sum: always of the same length, whatever step it belongs to."""
        self._check_last()
        compared = [_number(list(standing.items())[:2]), _number(standing), weights % _MODULUS]
        known = [float(present), *compared, *(number * number for number in compared)]
        said = torch.tensor(known, dtype=torch.float64, device="cpu").to(own[0].device)
        sums = self.reduce(torch.cat([torch.stack(own), said]))
        self._send(sums, standing)
        return dict(zip(ENTRIES, sums.unbind()))

    def _send(self, sums: Tensor, standing: Standing) -> None:
        if sums.device.type == "cpu":
            self._compare(sums, standing)
        elif not torch.cuda.is_current_stream_capturing():
            host = torch.empty(sums.shape, dtype=sums.dtype, device="cpu", pin_memory=True)
            host.copy_(sums, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            self._under_way = host, arrived, standing

    def _check_last(self) -> None:
        """Looks at the sum of the last gradient step, which a forward pass ago was under way."""
        if self._under_way is not None and not torch.cuda.is_current_stream_capturing():
            (sums, arrived, standing), self._under_way = self._under_way, None
            arrived.synchronize()
            self._compare(sums, standing)

    def _compare(self, sums: Tensor, standing: Standing) -> None:
        """Raises, on every rank, if one of them differs from another."""
        totals, count = [*map(int, sums[-2 * COMPARED :].tolist())], self.size
        if 0 < sums[ENTRIES.index("present")] < count and not self._mentioned:
            self._mentioned = True
            warnings.warn(
                "some ranks called step() without any gradient and others with some: none of these "
                "gradients is applied, so that all ranks keep the same weights",
                stacklevel=6,
            )
        place, setup, weights = (
            total**2 == count * squares
            for total, squares in zip(totals[:COMPARED], totals[COMPARED:])
        )
        if not (place and setup):
            raise RuntimeError(_disagreement(self._everybody(standing)))
        if not weights:
            raise NotImplementedError(
                "the ranks hold different parameters, and nothing says that they are parts of one "
                "model: norms and decisions would be those of a part. Use "
                "DistributedDataParallel, torch.distributed.fsdp.fully_shard or "
                "ZeroRedundancyOptimizer instead of pipelines; or, where every rank trains a model "
                "of its own, process_group=False"
            )

    def _everybody(self, standing: Standing) -> list[dict[str, str]]:
        own = {name: str(value) for name, value in standing.items()}
        everybody: list[Any] = [None] * self.size
        dist.all_gather_object(everybody, own, group=self.group)
        return everybody


def _zero_in_the_making() -> Any:
    """The ZeroRedundancyOptimizer that calls for an optimizer of its part of the parameters.

    It makes one as anybody would, and says to nobody that other ranks hold other parameters; so who
    calls is looked at. None where nobody of the kind does.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    frame: Any = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if type(caller).__name__ == "ZeroRedundancyOptimizer":
            return caller
        frame = frame.f_back
    return None


def _number(said: Any) -> int:
    return zlib.crc32(repr(said).encode()) % _MODULUS


def _disagreement(everybody: list[dict[str, str]]) -> str:
    """What the ranks say of themselves, as far as they differ."""
    names = [name for name in everybody[0] if len({rank.get(name) for rank in everybody}) > 1]
    # Step and phase say where to look, whatever differs.
    shown = [*dict.fromkeys(["step", "phase", *names])]
    alike: dict[str, list[int]] = {}
    for rank, said in enumerate(everybody):
        alike.setdefault(", ".join(f"{name} {said.get(name)}" for name in shown), []).append(rank)
    sides = [
        f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {text}"
        for text, ranks in alike.items()
    ]
    return (
        "the ranks disagree, and would train apart; "
        + "; ".join(sides)
        + ". Every rank must make the same steps with the same settings; where every rank trains a "
        "model of its own, use process_group=False"
    )


def check_process_group(group: Any) -> None:
    """Refuses what is no process group with a ValueError."""
    known = group is None or group is False
    if not known and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ValueError(
            f"process_group={group!r}: must be a torch.distributed.ProcessGroup, None (the default "
            "group, where one is initialised) or False (this rank alone)"
        )
