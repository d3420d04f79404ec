"""The tie between parameter groups, which anybody may change, and what is bound for launches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from triton_hybrid.checkpoint import PROGRESS, Progress
from triton_hybrid.config import Settings
from triton_hybrid.distributed import Ranks, Standing
from triton_hybrid.engine import Engine
from triton_hybrid.groups import check_parameter
from triton_hybrid.kernels.fingerprint import fingerprint_of
from triton_hybrid.kernels.layout import dense_view
from triton_hybrid.kernels.ledger import FINGERPRINT_COLUMN, INDEX, PART_COLUMN
from triton_hybrid.phases import Phase, PhaseController
from triton_hybrid.shards import Shards, is_part, local
from triton_hybrid.state import (
    DECLARED,
    PREDICTION,
    Home,
    Member,
    State,
    StepPlan,
    as_dense,
    restore_snapshot,
    state_bytes,
)
from triton_hybrid.stats import HybridStats
from triton_hybrid.watch import Groups, Watch

FEW = 8
"""Parameters of a group that are looked at for gradients which nobody reads."""


class Binding:
    """Settings and progress of an optimizer and, from the first step on, its engine."""

    def __init__(self, settings: Settings, ranks: Ranks) -> None:
        self.settings, self.ranks = settings, ranks
        self._described = repr(settings)
        self.progress = Progress(PhaseController(settings.config))
        self.engine: Engine | None = None  # before the first step and after a change
        self._pending_losses: list[Tensor | float] = []
        self._watch: Watch | None = None
        self._params: list[Tensor] = []
        self._state: State = {}
        self._installs = 0
        self._mentioned = False

    def bind(self, groups: Groups, state: State) -> Engine | None:
        """The engine of the parameters in the groups; None in an initialising first call.

        Anybody may replace parameters in the groups, their memory or their state between steps, so
        what is bound is compared every time.
        """
        if self.engine is None or self._sees_changes(groups, state):
            members = [
                Member(param, group, group_index, index, param)
                for group_index, group in enumerate(groups)
                for index, param in enumerate(group["params"])
                if param.requires_grad and not is_lazy(param)
            ]
            if self.progress.gradients and not any(state.get(m.param) for m in members):
                self.unbind()
                self.restart()  # nothing is left of the state that the ledger is about
            nothing = not state and all(m.param.grad is None for m in members)
            if self.ranks.apart and self.ranks.together and not members:
                raise ValueError(
                    "params: this rank has none, and the others would wait for it: "
                    "ZeroRedundancyOptimizer needs at least as many parameters as ranks"
                )
            # Of several ranks, another may have gradients and wait for this one.
            if not members or (nothing and not self.ranks.together):
                return None
            masters = self.settings.master_weights
            for member in members:
                check_parameter(member.group, member.place, member.param, masters)
            initialising = not state and not nothing and self._only_initialises(members)
            self._rebind(members, state, groups)
            if initialising:
                return None
        assert self.engine is not None
        self.engine.refresh(groups)
        return self.engine

    def _only_initialises(self, members: Sequence[Member]) -> bool:
        """Whether a first step only creates state.

        Distributed checkpointing calls `step()` once with learning rate 0 and zero gradients, and
        expects every state key afterwards and nothing else to have moved.
        """
        if any(float(member.group["lr"]) != 0.0 for member in members):
            return False
        zero = all_zero(member.param for member in members)
        if self.ranks.apart or any(is_part(member.param) for member in members):
            # Zero here alone may be the part of a gradient that is not.
            others = torch.tensor([float(not zero)], dtype=torch.float64)
            zero = not bool(self.ranks.reduce(others.to(local(members[0].param).device)))
        return zero

    def _rebind(self, members: Sequence[Member], state: State, groups: Groups) -> None:
        self.unbind()
        ledger, old = self.progress.ledger, self._params
        self._params = [member.param for member in members]
        standing = ledger.get("moved", 0.0) > 0
        known, present = set(map(id, old)), set(map(id, self._params))
        for param in old:
            if id(param) not in present and param in state:
                _leave(param, state[param], standing)
        if standing and old and known != present:
            ledger["written"] = 1.0  # those who stay are verified, but nothing is learnt from it
        shards = Shards(members, state, self.ranks)
        reduce = self.ranks.reduce if shards.some and self.ranks.together else None
        parts, held = shards.members, shards.state
        self.engine = Engine(parts, held, len(groups), self.settings, reduce)
        shards.publish()
        self.engine.restore(self.progress.ledger, self.progress.predictor)
        for loss in self._pending_losses:
            self.engine.observe_loss(loss)
        self._pending_losses.clear()
        self._state, self._installs = state, self.engine.offload.installs
        self._watch = Watch(groups, state)

    def restart(self) -> None:
        """Begins anew with Warmup; counters and the loss scale go on."""
        before, self.progress = self.progress, Progress(PhaseController(self.settings.config))
        self.progress.steps, self.progress.seconds = before.steps, before.seconds
        kept = ("loss_scale", "growth_tracker")
        self.progress.ledger = {k: v for k, v in before.ledger.items() if k in kept}

    def _sees_changes(self, groups: Groups, state: State) -> bool:
        """Whether anything of what is bound is not as it was."""
        assert self.engine is not None
        assert self._watch is not None
        ours = self.engine.offload.installs != self._installs
        if not ours and self._watch.sees_other_tensors(state):
            return True
        return self._watch.sees_other_parameters(groups)

    def unbind(self, save: bool = True) -> None:
        """Lets go of bound memory; the state stays where it is, scalars in the progress."""
        if self.engine is not None:
            self.engine.offload.close(save)
            if save:
                self._note(self.engine)
        self.engine = self._watch = None

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
        """The inverse of `save`; a checkpoint of another optimizer begins a run."""
        saved = groups[0].get(PROGRESS) if groups else None
        if saved:
            self.progress = Progress.from_dict(saved, self.settings.config)
        elif self.progress.gradients:
            self.restart()

    def kept(self) -> dict[str, Any]:
        """What to make another binding of: of pickled optimizers."""
        return {"_settings": self.settings, "_alone": self.ranks.alone}

    def at_home_on_host(self, name: str) -> bool:
        """Whether state of this name is at home in host memory."""
        declared = self.settings.config.offload != "none" and name in DECLARED
        return declared and DECLARED[name].home is Home.HOST

    def observe_loss(self, loss: Tensor | float) -> None:
        """Notes the loss of the coming gradient."""
        if self.engine is None:
            self._pending_losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
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

        dicts = {p: its for p, its in state.items() if isinstance(its, dict)}
        here = {p: {k: local(v) for k, v in its.items()} for p, its in dicts.items()}
        on_device, on_host = state_bytes(here, hosted)
        if engine is None:
            ledger = {**ledger, **self.settings.scale_entries(ledger)}
            predictor = self.settings.config.predictor
        else:
            predictor, ledger = engine.predictor.name, engine.read()
            on_device += engine.offload.visiting_bytes()
        return HybridStats.of(self.progress, ledger, predictor, (on_device, on_host))

    def take_gradients(self, engine: Engine, scaler: Any) -> bool:
        """Reads the gradients, and lets several ranks go on from the same numbers.

        ``scaler``: scale and flag of a GradScaler, or None. Returns whether any rank has gradients.
        """
        found = engine.take_gradients()
        if scaler and (found or self.ranks.together):
            engine.borrow_scale(*scaler)
        if not self.ranks.together:
            return found
        engine.measure_gradients()
        if self.ranks.agree(engine.scalars, found, self._standing(engine), engine.signature):
            return True
        engine.forget_gradients()
        return False

    def meet(self, engine: Engine) -> None:
        """Before a Predict step of parts of parameters: all ranks must be about to make it."""
        if engine.reduce is not None:
            self.ranks.meet(engine.scalars, self._standing(engine))

    def _standing(self, engine: Engine) -> Standing:
        controller = self.progress.controller
        return {
            "step": sum(self.progress.steps.values()),
            **controller.state(),
            "phase": controller.phase.value,
            "predictor": engine.predictor.name,
            "settings": self._described,
            "hyperparameters": engine.hyperparameters,
        }

    def mention_unread_gradients(self, groups: Groups) -> None:
        """Warns, once, of gradients that were computed for a Predict step; zeros are none."""
        # To look at all of them would be the longest check of a Predict step.
        few = [group["params"][:: len(group["params"]) // FEW + 1] for group in groups]
        if self._mentioned or not has_gradients([{"params": params} for params in few]):
            return
        self._mentioned = True
        if not all_zero(param for group in groups for param in group["params"]):
            warnings.warn(
                "gradients were computed for a Predict step, which does not read them: do so only "
                "where optimizer.needs_backward is True, or use inline=True",
                stacklevel=4,
            )

    @contextmanager
    def undisturbed(self, engine: Engine) -> Iterator[None]:
        """What surrounds the work of a step: memory in its place, and an eye on what others write.

        Autocast is off, which would round the products of matrices.
        """
        kind = engine.device.type
        on = torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if on else nullcontext():
            engine.gather()
            offload = engine.offload
            if offload.moves:
                offload.fetch(self.plan(engine))
            controller = self.progress.controller
            if controller.stands or engine.predictor.follows_trajectory:
                engine.find_writes()
            yield
            stands = controller.stands
            if stands or engine.predictor.follows_trajectory:
                engine.note_weights(every=not stands)
            engine.scatter()
            if offload.moves:
                offload.place(self.plan(engine), controller.left_in_row)
            if offload.installs != self._installs:
                assert self._watch is not None
                self._watch.note(self._state)
                self._installs = offload.installs

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
            pairs=engine.predictor.keeps_pairs and phase is not Phase.WARMUP,
        )


def has_gradients(groups: Groups) -> bool:
    """Whether a parameter has one."""
    return any(param.grad is not None for group in groups for param in group["params"])


def all_zero(params: Iterable[Tensor]) -> bool:
    """Whether no parameter has a gradient that is not zero. Waits for the device."""
    grads = (local(param.grad) for param in params if param.grad is not None)
    return not any(bool(grad.any()) for grad in grads)


def _leave(param: Tensor, entry: dict[str, Any], standing: bool) -> None:
    """Ends what predictions have to do with a parameter that is frozen, or no longer ours."""
    if PREDICTION.name not in entry:
        return
    noted = entry[PREDICTION.name][FINGERPRINT_COLUMN.value :]
    if standing and bool(noted.any()):
        part = local(param.detach())
        found = fingerprint_of(dense_view(as_dense(part)))
        if torch.equal(noted, found.to(noted.device)):
            tensors = {key: local(row) for key, row in entry.items() if isinstance(row, Tensor)}
            restore_snapshot(part, tensors)
    entry[PREDICTION.name] = entry[PREDICTION.name].clone()
    entry[PREDICTION.name][PART_COLUMN.value :] = 0.0
