"""What a step works with: bound parameters, scalars on the device, one backend.

The engine does what the phases ask for, and knows nothing of their order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.config import Settings
from triton_hybrid.flat_shards import layout_number
from triton_hybrid.hyperparameters import (
    FRESH_RATES,
    LARGEST_LR,
    LAST_LR,
    numbers_of,
    row_of,
    take_from_device,
)
from triton_hybrid.kernels.addresses import refill
from triton_hybrid.kernels.backend import BACKENDS
from triton_hybrid.kernels.capture import CAPTURED_ON
from triton_hybrid.kernels.launch import require_launchable
from triton_hybrid.kernels.layout import overlapping
from triton_hybrid.kernels.ledger import (
    FINGERPRINT_COLUMN,
    INDEX,
    SLOPE_COLUMN,
    read_ledger,
    write_ledger,
)
from triton_hybrid.kernels.scalars import HYPER, Scalars
from triton_hybrid.losses import Losses
from triton_hybrid.offload import Offload, moves
from triton_hybrid.predictors import PREDICTORS
from triton_hybrid.predictors.predictor import Predictor
from triton_hybrid.predictors.slow_ema import is_other_run
from triton_hybrid.rules import RULES
from triton_hybrid.scales import Scales
from triton_hybrid.shards import OTHERS, is_managed, is_part, local_gradient
from triton_hybrid.state import Batch, Member, State, StepPlan
from triton_hybrid.stretch import Stretches

_GRADIENT = operator.attrgetter("grad")


class Engine:
    """Parameters bound for launches, and the steps that can be taken with them.

    Args:
        members: Every parameter that may get a gradient.
        state: The optimizer's state; missing entries are created, others are kept.
        groups: How many parameter groups there are.
        settings: What the optimizer was made with.
        predictor: Its state, which `restore` takes too, as far as rows depend on it.
        reduce: Sums FP64 numbers over the ranks that hold other parts of the parameters, in place;
            None where nobody does.

    Raises:
        NotImplementedError: Parameters on several devices; offload of parts of parameters.
        ValueError: ``backend="triton"`` on CPU tensors without the interpreter.
    """

    def __init__(
        self,
        members: Sequence[Member],
        state: State,
        groups: int,
        settings: Settings,
        predictor: Mapping[str, Any] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        devices = sorted({str(member.param.device) for member in members})
        if len(devices) > 1:
            raise NotImplementedError(f"parameters on several devices ({', '.join(devices)})")
        self.device = members[0].param.device
        self.device_type = self.device.type
        self.backend = BACKENDS[settings.backend_for(self.device)]
        if self.backend.name == "triton":
            require_launchable(self.device)
        self.settings, self.reduce = settings, reduce
        self.uncapturable = not settings.capturable and self.device.type in CAPTURED_ON
        self.config = config = settings.config
        if reduce is not None and config.offload != "none":
            raise NotImplementedError(
                f"offload={config.offload!r} with parameters of which other ranks hold other parts "
                "is not built: use HybridConfig(offload='none')"
            )
        self.choice = PREDICTORS[config.predictor](config)
        self.choice.foresee(predictor or {})
        self.batches = self._make_batches(members, state)
        self.params = [param for batch in self.batches for param in batch.params]
        self._copies = [pair for batch in self.batches for pair in batch.copies]
        self._sets = tuple(batch.tensors for batch in self.batches)
        self.scalars = Scalars(self._sets, groups)
        # As the groups say; a window of fewer micro-batches takes part of the learning rates.
        table = self.scalars.hyperparameters
        if settings.accumulation is not None:
            table = torch.zeros_like(table)
        self.scales = Scales(self.scalars, table)
        self._written = self.scalars.ledger[INDEX["written"]]
        self._seen: list[Any] = []  # what the table of hyperparameters was made of
        self.hyperparameters: list[list[float]] = []  # as they are on the device
        shares = [[batch.tensors.share] for batch in self.batches for _ in batch.params]
        self._shares = torch.tensor(shares, dtype=torch.float64, device=self.device)
        its = [member.group.get(OTHERS, False) for b in self.batches for member in b.members]
        self._others = its.index(True) if any(its) else None
        self.managed = any(is_managed(member.whole) for member in members)
        self._gradient: Callable[[Tensor], Any] = local_gradient if self.managed else _GRADIENT
        self._measured = False  # whether the gradients at hand were measured
        signs = {-1.0 if member.group["maximize"] else 1.0 for member in members}
        self.beta1s: set[float] = {member.group["betas"][0] for member in members}
        self.losses = Losses(self.scalars.ledger, signs.pop() if len(signs) == 1 else None)
        for batch in self.batches:
            batch.adopt_tables(self.scalars)
        self.offload = Offload(self.batches, state, config, self.choice.lends_moments)
        self.choice.bind(self)
        self.stretches = Stretches(self)
        if self.predictor.predicts:
            # Compiled now, and its tables made: memory does not grow after the first step.
            self.fingerprints()

    def _make_batches(self, members: Sequence[Member], state: State) -> list[Batch]:
        alike: dict[Any, list[Member]] = {}
        for member, rank in zip(members, overlapping([member.param for member in members])):
            rule = RULES[member.group["base"]]
            kind = (rank, member.share, is_part(member.whole), self.choice.kind_of(rule, member))
            key = (member.param.dtype, rule.name, kind, rule.batch_key(member.group))
            alike.setdefault(key, []).append(member)
        offload = self.config.offload if moves(self.config, self.device) else "none"
        masters = self.settings.master_weights
        batches = []
        for (_, name, (rank, *_, kind), _), its in alike.items():
            rule = RULES[name]
            self.choice.check_rule(rule)
            rows = tuple(dict.fromkeys((*rule.rows, *self.choice.rows_of_kind(rule, kind))))
            batch = Batch(its, rows, rule, state, offload=offload, masters=masters)
            batch.aliased = rank > 0
            if self.predictor.predicts:
                # Memory is allocated at the first step and never grows after it.
                batch.tensors.room_for(max(row.shape[0] for row in rows if row.shape))
            batches.append(batch)
        return batches

    @property
    def predictor(self) -> Predictor:
        """The predictor in use."""
        return self.choice.active

    def take_gradients(self) -> bool:
        """Reads ``.grad`` of every parameter, and refuses sparse ones; False when there is none."""
        found = False
        for batch in self.batches:
            grads = [*map(self._gradient, batch.wholes)]
            if batch.tensors.take_gradients(grads):
                found = True
                continue
            kinds = {(grad.dtype, grad.is_sparse) for grad in grads if grad is not None}
            if any(sparse for _, sparse in kinds):
                raise RuntimeError("HybridOptimizer does not support sparse gradients")
            found = found or bool(kinds)
            if len(kinds) > 1:
                grads = [None if grad is None else grad.float() for grad in grads]
            batch.tensors.set_row("grad", grads)
        return found

    def end_gradient(self) -> None:
        """Forgets what was said of the gradient that a step takes."""
        self._measured = False
        self.losses.end()

    def forget_gradients(self) -> None:
        """Ends a step in which no rank had gradients."""
        self._measured = False
        self.scalars.ledger[INDEX["found_inf"]].fill_(0.0)

    def release_gradients(self) -> None:
        """Lets go of the gradients, so that ``zero_grad`` really frees them."""
        for batch in self.batches:
            batch.tensors.release("grad")

    def measure_gradients(self) -> None:
        """Finds norm and non-finite values of the gradients for `base_step`, in the scalars."""
        self.backend.measure(self._sets, self.scalars)
        self._measured = True

    def over_ranks(self, sums: Tensor, share: float | None = None) -> None:
        """Sums what was measured of tensors over the ranks that hold other parts, in place.

        FP64 ``[tensors, columns]``; with a ``share`` those of one batch, else of all. Where the
        ranks hold different tensors, the last row becomes that of the others.
        """
        if self.reduce is None:
            return
        if self._others is None:
            sums.copy_(self.reduce(sums * (self._shares if share is None else share)))
        elif share is None:
            sums[self._others] = 0.0
            own = sums.sum(0)
            total = self.reduce(own.clone())
            # What is not finite must be so on every rank: an infinity less another is none.
            sums[self._others] = torch.where(total.isfinite(), total - own, total)

    def over_all(self, totals: Tensor) -> None:
        """Sums what was added up over this rank's tensors, where others hold other ones."""
        if self.reduce is not None and self._others is not None:
            self.reduce(totals)

    def add_up(self, measure: Callable[[Batch, Tensor], None], out: Tensor) -> None:
        """Adds what is measured of each batch to FP64 sums over all tensors, and all ranks."""
        for batch in self.batches:
            own = out if self.reduce is None else torch.zeros_like(out)
            measure(batch, own)
            if self.reduce is not None:
                out.add_(own, alpha=batch.tensors.share)
        if self.reduce is not None:
            self.reduce(out)

    def base_step(self, plan: StepPlan) -> None:
        """Updates moments, weights and slow EMA, unless the gradient is not finite."""
        predictor, known = self.predictor, self._measured
        self.end_gradient()
        self.choice.before_step(plan.followed)
        scale = predictor.base_rates()
        if scale is not None:
            rates = self.scalars.hyperparameters[:, HYPER["lr"]]
            kept = rates.clone()
            rates.mul_(scale)
        try:
            self.backend.step(
                self._sets,
                self.scalars,
                max_norm=self.settings.max_grad_norm,
                slow_beta=predictor.slow_beta,
                observed=predictor.predicts,
                measured=plan.measured,
                known=known,
                reduce=self.reduce,
                again=predictor.take_deferred(),
            )
        finally:  # a user may interrupt a step, and go on
            if scale is not None:
                rates.copy_(kept)
        self.choice.after_step()

    def predict(self, in_row: int) -> None:
        """Moves the weights by one more predicted step, or undoes them all where that fails."""
        self.losses.forget()  # of gradients that a Predict step does not read
        self.predictor.predict(in_row)

    def verify(self, last: bool = True) -> None:
        """Decides on the prediction by the gradient at the predicted point, and places the weights.

        They stay, are corrected by the residual along the displacement, or are rolled back.
        ``last``: a prediction may follow this gradient.
        """
        self.predictor.verify(last)
        if self.settings.capturable:  # then nobody else looks
            self._written.zero_()

    @property
    def rates_on_device(self) -> bool:
        """Whether a learning rate is known to the device alone."""
        return not self._seen

    @property
    def spread(self) -> bool:
        """Whether other ranks hold other tensors, which may move where none of these do."""
        return self._others is not None

    @property
    def reads_are_free(self) -> bool:
        """Whether reading the ledger waits for nobody."""
        return self.device.type == "cpu"

    def read(self) -> dict[str, float]:
        """The ledger on the host. Waits for the device."""
        return read_ledger(self.scalars.ledger)

    def look(self) -> dict[str, float]:
        """The same with the numbers of the choice, in one copy."""
        if not self.choice.noted:
            return self.read()
        numbers = torch.cat([self.scalars.ledger, self.choice.numbers()]).tolist()
        return dict(zip((*INDEX, *self.choice.noted), numbers))

    def restore(self, ledger: Mapping[str, float], predictor: dict[str, Any] | None) -> None:
        """Goes on from ledger and predictor's state as they were read before, if they were."""
        known = {**self.read(), **ledger, **self.settings.scale_entries(ledger)}
        self.scalars.ledger.copy_(write_ledger(known, self.device))
        if predictor is not None:
            self.choice.restore(predictor)

    def refresh(self, groups: Sequence[dict[str, Any]]) -> None:
        """Brings learning rates, betas and so on to the device, if they changed.

        A learning rate that is a tensor on the device stays there.
        """
        seen = [*map(numbers_of, groups)]
        if seen == self._seen:
            return
        table, on_device, rows = self.scales.nominal, {}, []
        for index, group in enumerate(groups):
            RULES[group["base"]].follow_schedulers(group)
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                on_device[index] = lr
                rows.append(row_of(group, 0.0, 0.0, self.choice.mixes))
                continue
            lr = float(lr)
            largest, last = (float(group.get(name, FRESH_RATES[name])) for name in FRESH_RATES)
            if lr > 0:
                largest, last = lr if is_other_run(last, lr) else max(largest, lr), lr
            group[LARGEST_LR], group[LAST_LR] = largest, last
            rows.append(row_of(group, lr, largest, self.choice.mixes))
        self.beta1s = {group["betas"][0] for group in groups}
        if rows != self.hyperparameters:  # of rates on the device, what follows writes the columns
            idle = [row[HYPER["lr"]] == 0 for row in self.hyperparameters if self._seen]
            rests = [row[HYPER["lr"]] == 0 for row in rows]
            for index, rest in enumerate(rests):
                if rest and index not in on_device and not (idle and idle[index]):
                    self._stay(index)
            if rests != idle:
                self.predictor.rates_changed()
            self.hyperparameters = rows
            refill(table, torch.tensor(rows, dtype=torch.float64, device="cpu"))
        for index, lr in on_device.items():
            take_from_device(groups[index], table[index], lr)
        self._seen = [] if on_device else [*map(numbers_of, groups)]

    def _stay(self, group: int) -> None:
        """Lets the parameters of a group stay where a prediction that is accepted has put them."""
        for batch in self.batches:
            slopes = self.scalars.prediction[batch.tensors.place, SLOPE_COLUMN.value]
            slopes.masked_fill_(batch.tensors.group == group, 0.0)  # without one, no secant

    # ------------------------------------------------------------- what others do to the weights

    def begin_stretch(self) -> None:
        """Says which tensors the coming predictions move, and that nothing is noted of any."""
        self.stretches.begin()

    def note_weights(self, every: bool) -> None:
        """Notes how this step leaves the parameters, or those that a prediction has moved."""
        self.backend.note_weights(self._sets, self.scalars, every=every)

    def find_writes(self) -> None:
        """Finds out on the device which parameters are not as `note_weights` left them.

        They take no further part in the prediction, and the ledger says that there are some.
        """
        self.backend.find_writes(self._sets, self.scalars)

    def fingerprints(self) -> Tensor:
        """Of all parameters as they are, FP32 ``[tensors, 2]``."""
        found = torch.empty_like(self.scalars.prediction[:, FINGERPRINT_COLUMN.value :])
        for batch in self.batches:
            self.backend.fingerprint(batch.tensors, found[batch.tensors.place])
        return found

    def signature(self) -> int:
        """A number for the parameters as they are, or for the shapes of those that have parts.

        Waits for the device.
        """
        if self._others is not None:
            return 0
        if self.reduce is not None:
            return layout_number(whole for batch in self.batches for whole in batch.wholes)
        return int(self.fingerprints().double().sum()) + len(self.params)

    def forget_writes(self) -> None:
        """Goes on from weights that somebody else has written."""
        self.choice.forget()
        self._written.zero_()

    def gather(self) -> None:
        """Brings parameters with gaps in memory to where the kernels can read them."""
        for param, dense in self._copies:
            dense.copy_(param)

    def scatter(self) -> None:
        """The inverse of `gather`."""
        for param, dense in self._copies:
            param.copy_(dense)
