"""The tie between parameter groups, which anybody may change, and what is bound for launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.checkpoint import PROGRESS, Progress
from triton_hybrid.config import Settings
from triton_hybrid.engine import Engine
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.phases import Phase, PhaseController
from triton_hybrid.rules import RULES
from triton_hybrid.state import DECLARED, Home, Member, State, StepPlan, state_bytes
from triton_hybrid.stats import HybridStats

Groups = Sequence[dict[str, Any]]


class Binding:
    """Settings and progress of an optimizer and, from the first step on, its engine."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.progress = Progress(PhaseController(settings.config))
        self.engine: Engine | None = None  # before the first step and after a change
        self._pending_loss: Tensor | None = None
        self._bound: list[Any] = []

    def bind(self, groups: Groups, state: State) -> Engine | None:
        """The engine of the parameters in the groups; None in an initialising first call.

        Parameters may be replaced in the groups between steps (accelerate does it for
        FSDP2), so what is bound is compared every time.
        """
        members = [
            Member(param, group, group_index, index)
            for group_index, group in enumerate(groups)
            for index, param in enumerate(group["params"])
            if param.requires_grad
        ]
        bound: list[Any] = [(id(member.param), member.group_index) for member in members]
        bound += [(g["base"], RULES[g["base"]].settings(g)) for g in groups]
        if self.engine is not None and bound == self._bound:
            self.engine.adopt_outside_changes()
        else:
            if not members or (not state and all(m.param.grad is None for m in members)):
                return None
            initialising = not state and _only_initialises(members)
            self.unbind()
            self.engine = Engine(members, state, len(groups), self.settings)
            self.engine.restore(self.progress.ledger, self.progress.predictor)
            if self._pending_loss is not None:
                self.engine.observe_loss(self._pending_loss)
                self._pending_loss = None
            self._bound = bound
            if initialising:
                return None
        self.engine.refresh(groups)
        return self.engine

    def unbind(self, save: bool = True) -> None:
        """Lets go of bound memory; the state stays where it is, scalars in the progress."""
        if self.engine is not None:
            self.engine.offload.close(save)
            if save:
                self._note(self.engine)
        self.engine = None

    def _note(self, engine: Engine) -> None:
        self.progress.ledger = engine.read()
        self.progress.predictor = engine.choice.state()

    def save(self, groups: Groups) -> None:
        """Writes phase, counters and ledger into the groups: what torch keeps."""
        if self.engine is not None:
            self._note(self.engine)
            self.engine.offload.synchronise()
        progress = self.progress.to_dict()
        for group in groups:
            group[PROGRESS] = progress

    def load(self, groups: Groups) -> None:
        """The inverse of `save`; without progress in the groups everything stays as it is."""
        saved = groups[0].get(PROGRESS) if groups else None
        if saved:
            self.progress = Progress.from_dict(saved, self.settings.config)

    def at_home_on_host(self, name: str) -> bool:
        """Whether state of this name is at home in host memory."""
        declared = self.settings.config.offload != "none" and name in DECLARED
        return declared and DECLARED[name].home is Home.HOST

    def observe_loss(self, loss: Tensor | float) -> None:
        """Notes the loss of the coming gradient."""
        if self.engine is None:
            self._pending_loss = torch.as_tensor(loss).detach()
        else:
            self.engine.observe_loss(loss)

    def loss_scale(self) -> Tensor | float:
        """The present loss scale, on the device where that is known."""
        if self.engine is None:
            return self.settings.scale_entries(self.progress.ledger)["loss_scale"]
        # A copy: the step moves the scale in place, and autograd may still hold this one.
        return self.engine.scalars.ledger[INDEX["loss_scale"]].float()

    def stats(self, state: State) -> HybridStats:
        """Counters and measurements. Waits for the device."""
        engine, ledger = self.engine, self.progress.ledger

        def hosted(name: str) -> bool:
            away = engine is not None and engine.offload.is_away(name)
            return away or self.at_home_on_host(name)

        on_device, on_host = state_bytes(state, hosted)
        if engine is None:
            ledger = {**ledger, **self.settings.scale_entries(ledger)}
            predictor = self.settings.config.predictor
        else:
            predictor, ledger = engine.predictor.name, engine.read()
            on_device += engine.offload.visiting_bytes()
        return HybridStats.of(self.progress, ledger, predictor, (on_device, on_host))

    def plan(self, engine: Engine) -> StepPlan:
        """What the next step does."""
        controller = self.progress.controller
        phase = controller.phase
        return StepPlan(
            gradient=phase.needs_gradient,
            measured=controller.measures,
            edge=phase is Phase.CORRECT or controller.ends_gradients,
            first=phase is Phase.PREDICT and controller.in_row == 0,
            trajectory=engine.predictor.follows_trajectory,
        )


def _only_initialises(members: Sequence[Member]) -> bool:
    """Whether a first step only creates state.

    Distributed checkpointing calls `step()` once with learning rate 0 and zero gradients, and
    expects every state key afterwards and nothing else to have moved.
    """
    if any(float(member.group["lr"]) != 0.0 for member in members):
        return False
    grads = [member.param.grad for member in members]
    return not any(bool(grad.any()) for grad in grads if grad is not None)
