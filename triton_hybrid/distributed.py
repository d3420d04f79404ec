"""Deciding together: what the ranks of data-parallel training must agree on.

Every gradient step begins with one small sum over the ranks (`Ranks.agree`). It carries what the
decisions rest on and what a rank alone may know: the loss that it observed, what others wrote to
its weights, the norm of its gradients, whether one is not finite, and whether it has any. It also
carries where each rank stands, so that one that does not stand with the others is an error on all
of them. Where the ranks hold parts of the parameters (`Shards`), what is measured of these is
summed too (`Ranks.reduce`), and begins with the same small sum.
"""

from __future__ import annotations

import math
import sys
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from triton_hybrid.checks import warn
from triton_hybrid.kernels.capture import capturing, refuse_capture
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.kernels.scalars import Scalars

LEDGER = ("loss", "written", "found_inf")
"""Entries of the ledger that a rank alone may know."""
MICRO_BATCHES = "micro-batches"
"""Where a rank stands in this, it must have as many as every other with gradients."""
ENTRIES = (
    "seen", *LEDGER, "square", "bad", "counted", "counted_squared", "present",
    "place", "setup", "weights",
)  # fmt: skip
"""What is summed. The last three must be the same everywhere: their squares are summed too."""
COMPARED = 3
_MODULUS = 1 << 20
"""What is compared is smaller, so that FP64 holds the sum of squares over 2^13 ranks exactly."""
_WIDE: Any = {"dtype": torch.float64, "device": "cpu"}

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
        self._zero: Callable[[], Any] = lambda: None
        self._places: Tensor | None = None  # of `LEDGER`, on the device
        # On a GPU: the last sum on its way to the host, and what this rank had said of itself.
        self._under_way: tuple[Tensor, Any, Standing] | None = None

    @classmethod
    def of(cls, group: Any) -> Ranks:
        """Those of an optimizer that is being made."""
        check_process_group(group)
        zero = _zero_in_the_making() if group is None else None
        if zero is None:
            return cls(group)
        ranks = cls(zero.process_group, apart=True)
        ranks._zero = weakref.ref(zero)
        return ranks

    @property
    def alone(self) -> bool | None:
        """What to make another by: a group cannot be pickled, but that there is none can."""
        return False if self.group is False else None

    @property
    def zero(self) -> Any:
        """The ZeroRedundancyOptimizer that made the optimizer, or None."""
        return self._zero()

    def all_of(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """All parameters, where ZeroRedundancyOptimizer gives an optimizer some of them."""
        zero = self.zero
        return params if zero is None else [p for its in zero.param_groups for p in its["params"]]

    @property
    def size(self) -> int:
        """How many ranks there are; 1 for this rank alone."""
        ready = self.group is not False and dist.is_available() and dist.is_initialized()
        return max(dist.get_world_size(self.group), 1) if ready else 1

    @property
    def together(self) -> bool:
        """Whether there is more than this rank."""
        return self.size > 1

    def pooled(self, values: Tensor) -> tuple[Tensor, int]:
        """Means over the ranks, and how many ranks there are.

        Args:
            values: FP64 ``[n]``, on every rank.

        Returns:
            FP64 ``[2, n]``, of the values and of their squares: where all ranks have the same
            value, and only there, the second is the square of the first.
        """
        return self.reduce(torch.stack([values, values * values])) / self.size, self.size

    def reduce(self, values: Tensor) -> Tensor:
        """Sums FP64 numbers over the ranks, in place; every rank gets the same bits.

        Raises:
            RuntimeError: A CUDA graph is being captured, and the group's backend is not NCCL.
        """
        if self.together:
            if capturing(values.device):
                backend = dist.get_backend_config(self.group)
                if "nccl" not in backend:
                    refuse_capture(
                        values.device,
                        f"process_group with backend {backend!r} exchanges numbers through the "
                        "host; use NCCL, or process_group=False",
                    )
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
        first, self._introduced = not self._introduced, True
        ledger = scalars.ledger
        if self._places is None or self._places.device != ledger.device:
            self._places = torch.tensor([INDEX[name] for name in LEDGER], device=ledger.device)
        its = _numbers(torch.cat([ledger.index_select(0, self._places), scalars.gradient]))
        own = [its[0] == its[0], *its]
        sums = self._sum(own, ledger.device, present, standing, weights() if first else 0)
        seen, loss, written, found, square, bad, *_, some = sums[: -2 * COMPARED]
        found = found + bad + (some < self.size)
        if isinstance(seen, float):
            loss = loss / seen if seen else math.nan
            known = torch.tensor([loss, written, found, square, found], **_WIDE)
        else:  # nothing over nothing is NaN, too
            known = torch.stack([loss / seen, written, found, square, found])
        ledger.index_copy_(0, self._places, known[:3])
        scalars.gradient.copy_(known[3:])
        # Who has some need not ask the others.
        return present or float(some) > 0

    def meet(self, scalars: Scalars, standing: Standing) -> None:
        """`agree` for a step without a gradient: who is elsewhere is an error on all ranks.

        What others wrote to the weights of one rank ends the prediction on all of them.
        """
        written = scalars.ledger[INDEX["written"]]
        own: list[Any] = [0.0] * ENTRIES.index("counted")
        own[ENTRIES.index("written")] = _numbers(written.view(1))[0]
        sums = self._sum(own, written.device, True, standing, 0)
        written.copy_(torch.as_tensor(sums[ENTRIES.index("written")]))

    def _sum(
        self,
        own: list[Any],
        device: torch.device,
        present: bool,
        standing: Standing,
        weights: int,
    ) -> list[Any]:
        """The one sum: always of the same length, whatever step it belongs to.

        Takes and returns floats on the CPU, elsewhere 0-dim tensors that nobody waits for.
        """
        self._check_last()
        count = float(standing.get(MICRO_BATCHES, 0) * present)
        setup = {name: its for name, its in standing.items() if name != MICRO_BATCHES}
        compared = [_number(list(setup.items())[:2]), _number(setup), weights % _MODULUS]
        known = [count, count * count, float(present), *compared]
        known += [number * number for number in compared]
        if device.type == "cpu":
            sent = torch.tensor([*own, *known], **_WIDE)
        else:
            # Filled in on the device: a copy from pageable memory would wait for it.
            wide: Any = {"dtype": torch.float64, "device": device}
            said = [x if isinstance(x, Tensor) else torch.full((), x, **wide) for x in own + known]
            sent = torch.stack([x.double() for x in said])
        # NaN is a loss that was not observed, or a norm of gradients that are not finite anyway.
        sums = self.reduce(sent.nan_to_num_(0.0, math.inf, -math.inf))
        found = _numbers(sums)
        if device.type == "cpu":
            self._compare(found, standing)
        elif not torch.cuda.is_current_stream_capturing():
            host = torch.empty(sums.shape, dtype=sums.dtype, device="cpu", pin_memory=True)
            host.copy_(sums, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            self._under_way = host, arrived, standing
        return found

    def _check_last(self) -> None:
        """Looks at the sum of the last gradient step, which a forward pass ago was under way."""
        if self._under_way is not None and not torch.cuda.is_current_stream_capturing():
            (sums, arrived, standing), self._under_way = self._under_way, None
            arrived.synchronize()
            self._compare(sums.tolist(), standing)

    def _compare(self, sums: list[float], standing: Standing) -> None:
        """Raises, on every rank, if one of them differs from another."""
        totals, count = [*map(int, sums[-2 * COMPARED :])], self.size
        if 0 < sums[ENTRIES.index("present")] < count and not self._mentioned:
            self._mentioned = True
            warn(
                "some ranks called step() without any gradient and others with some: none of these "
                "gradients is applied, so that all ranks keep the same weights"
            )
        place, setup, weights = (
            total**2 == count * squares
            for total, squares in zip(totals[:COMPARED], totals[COMPARED:])
        )
        counts, squares, present = sums[ENTRIES.index("counted") : ENTRIES.index("present") + 1]
        if not (place and setup and counts**2 == present * squares):
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


def _numbers(vector: Tensor) -> list[Any]:
    """Its elements: floats on the CPU, elsewhere 0-dim tensors."""
    return vector.tolist() if vector.device.type == "cpu" else [*vector.unbind()]


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
