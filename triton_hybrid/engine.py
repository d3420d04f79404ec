"""What a step works with: bound parameters, scalars on the device, one backend.

The engine does what the phases ask for, and knows nothing of their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.hyperparameters import Hyperparameters
from triton_hybrid.kernels.backend import BACKENDS
from triton_hybrid.kernels.ledger import INDEX, read_ledger, write_ledger
from triton_hybrid.kernels.multi_tensor import require_launchable
from triton_hybrid.kernels.scalars import Scalars
from triton_hybrid.offload import Offload, lends_moments, moves
from triton_hybrid.precision import ChangeWatch, scale_entries
from triton_hybrid.predictors import PREDICTORS
from triton_hybrid.predictors.predictor import Predictor
from triton_hybrid.rules import RULES
from triton_hybrid.settings import Settings
from triton_hybrid.state import Batch, Member, State


class Engine:
    """Parameters bound for launches, and the steps that can be taken with them.

    Args:
        members: Every parameter that may get a gradient.
        state: The optimizer's state; missing entries are created, others are kept.
        groups: How many parameter groups there are.
        settings: What the optimizer was made with.
        backend: ``"triton"`` or ``"torch"``.

    Raises:
        NotImplementedError: Parameters on several devices.
        ValueError: ``backend="triton"`` on CPU tensors without the interpreter.
    """

    def __init__(
        self,
        members: Sequence[Member],
        state: State,
        groups: int,
        settings: Settings,
        backend: str,
    ) -> None:
        devices = sorted({str(member.param.device) for member in members})
        if len(devices) > 1:
            raise NotImplementedError(f"parameters on several devices ({', '.join(devices)})")
        self.device = members[0].param.device
        self.backend = BACKENDS[backend]
        if backend == "triton":
            require_launchable(self.device)
        self.settings = settings
        self.config = config = settings.config
        self.choice = PREDICTORS[config.predictor](config)
        self.batches = self._make_batches(members, state)
        self.params = [param for batch in self.batches for param in batch.params]
        self.scalars = Scalars([batch.tensors for batch in self.batches], groups)
        self.hyperparameters = Hyperparameters(self.scalars.hyperparameters)
        for batch in self.batches:
            batch.adopt_tables(self.scalars)
        lends = lends_moments(config, self.choice.lends_moments)
        pinned = config.offload == "pinned"
        self.offload = Offload(self.batches, state, self.device, pinned, lends)
        self.choice.bind(self)
        self._watch = ChangeWatch()
        self.remember_weights()

    def _make_batches(self, members: Sequence[Member], state: State) -> list[Batch]:
        alike: dict[Any, list[Member]] = {}
        for member in members:
            rule = RULES[member.group["base"]]
            key = (member.param.dtype, rule.name, rule.batch_key(member.group))
            alike.setdefault(key, []).append(member)
        batches = []
        for (_, name, _), its in alike.items():
            rule = RULES[name]
            rows = tuple(dict.fromkeys((*rule.rows, *self.choice.rows_for(rule))))
            batch = Batch(
                its,
                rows,
                rule,
                state,
                offloaded=moves(self.config.offload, self.device),
                pinned=self.config.offload == "pinned",
                masters=self.settings.master_weights,
            )
            if self.choice.active.predicts:
                # Memory is allocated at the first step and never grows after it.
                batch.tensors.room_for(max(row.shape[0] for row in rows if row.shape))
            batches.append(batch)
        return batches

    # ------------------------------------------------------------------------- the steps

    @property
    def predictor(self) -> Predictor:
        """The predictor in use."""
        return self.choice.active

    def take_gradients(self) -> bool:
        """Reads ``.grad`` of every parameter; False when there is none at all.

        Raises:
            RuntimeError: A sparse gradient.
        """
        found = False
        for batch in self.batches:
            grads = [param.grad for param in batch.params]
            here = [grad for grad in grads if grad is not None]
            if any(grad.is_sparse for grad in here):
                raise RuntimeError("HybridOptimizer does not support sparse gradients")
            found = found or bool(here)
            if len({grad.dtype for grad in here}) > 1:
                grads = [None if grad is None else grad.float() for grad in grads]
            batch.tensors.set_row("grad", grads)
        return found

    def release_gradients(self) -> None:
        """Lets go of the gradients, so that ``zero_grad`` really frees them."""
        for batch in self.batches:
            batch.tensors.release("grad")

    def base_step(self, measured: bool, early: bool) -> None:
        """Updates moments, weights and slow EMA, unless the gradient is not finite.

        Args:
            measured: Whether update and slow direction are compared, for the confidence.
            early: Whether the average of the weights is kept up to date.
        """
        predicts = self.predictor.predicts
        self.backend.step(
            [batch.tensors for batch in self.batches],
            self.scalars,
            max_norm=self.settings.max_grad_norm,
            slow_beta=self.config.slow_beta if predicts else 0.0,
            observed=predicts,
            measured=measured,
            weight_ema=early,
        )

    def predict(self, planned: int, in_row: int, early: bool) -> None:
        """Moves the weights by one predicted step; takes the stretch back at once where it failed.

        Args:
            planned: Predicted steps in this row.
            in_row: How many of them were made.
            early: Whether the average of the weights has been kept up to date.
        """
        predictor, config = self.predictor, self.config
        predictor.predict(planned, in_row == 0, early)
        for batch in self.batches:
            self.backend.check_move(
                batch.tensors,
                self.scalars,
                threshold=config.confidence_threshold,
                limit=config.divergence_threshold * predictor.jump_limit(in_row + 1),
                cooldown=self._first_cooldown,
                last=batch is self.batches[-1],
            )

    def verify(self) -> None:
        """Judges the prediction by the gradient at the predicted point, and places the weights.

        They stay, are corrected by the residual along the displacement, or are rolled back.
        """
        for batch in self.batches:
            self.backend.slopes(batch.tensors, self.scalars, self.wants_slopes)
        self.backend.decide(self.scalars, self.config.divergence_threshold, self._first_cooldown)
        for batch in self.batches:
            restart = self.predictor.follows_trajectory
            self.backend.correct(batch.tensors, self.scalars, restart=restart)

    @property
    def wants_slopes(self) -> bool:
        """Whether the correction will look at slopes.

        It does not where noise dominates. Where reading the signal share is free, the plain-torch
        kernels then leave the slopes out; the Triton kernels measure them in passing.
        """
        if self.backend.measures_slopes_in_passing or self.device.type != "cpu":
            return True
        return float(self.scalars.ledger[INDEX["signal"]]) > 0.5

    @property
    def reads_are_free(self) -> bool:
        """Whether reading the ledger waits for nobody."""
        return self.device.type == "cpu"

    @property
    def _first_cooldown(self) -> float:
        """Gradient steps after a first rejection; each further one in a row doubles them.

        A single rejection is mostly an odd batch, so it costs a quarter of a Full phase.
        """
        return float(math.ceil(self.config.full_steps / 4))

    # ----------------------------------------------------------------------- the ledger

    def read(self) -> dict[str, float]:
        """The ledger on the host. Waits for the device."""
        values: dict[str, float] = read_ledger(self.scalars.ledger)
        return values

    def restore(self, ledger: Mapping[str, float], predictor: dict[str, int] | None) -> None:
        """Goes on from what was read before.

        Args:
            ledger: Its entries; a dynamic loss scale goes on, a fixed one is set anew.
            predictor: State of the predictor; None before the first step.
        """
        scale = scale_entries(self.settings.loss_scale, ledger)
        known = {**self.read(), **ledger, **scale}
        self.scalars.ledger.copy_(write_ledger(known, self.device))
        if predictor is not None:
            self.choice.restore(predictor)

    def observe_loss(self, loss: Tensor | float) -> None:
        """Notes the loss that belongs to the coming gradient, without waiting for it."""
        value = torch.as_tensor(loss, dtype=torch.float64).detach().to(self.device)
        # NaN in the ledger means "not observed"; an observed NaN is a divergence.
        value = torch.where(value.isnan(), torch.full_like(value, math.inf), value)
        self.scalars.ledger[INDEX["loss"]].copy_(value.reshape(()), non_blocking=True)

    def borrow_scale(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Takes over what a GradScaler says of the coming gradient."""
        for name, value in (("loss_scale", grad_scale), ("found_inf", found_inf)):
            if value is not None:
                self.scalars.ledger[INDEX[name]].copy_(torch.as_tensor(value).reshape(()))

    def return_scale(self) -> None:
        """Ends what `borrow_scale` began."""
        self.scalars.ledger[INDEX["loss_scale"]].fill_(1.0)
        self.scalars.ledger[INDEX["found_inf"]].fill_(0.0)

    # --------------------------------------------------------------- writes of others

    def remember_weights(self) -> None:
        """Takes note of the weights as this step leaves them."""
        self._watch.remember(self.params)

    def adopt_outside_changes(self) -> None:
        """Takes over what somebody else wrote into parameters since `remember_weights`."""
        changed = set(self._watch.changed(self.params))
        if changed:
            self.offload.end_visits()
        offset = 0
        for batch in self.batches:
            for index in range(len(batch.params)):
                if offset + index in changed:
                    batch.adopt(index)
            offset += len(batch.params)
