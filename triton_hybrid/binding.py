"""The tie between parameter groups, which anybody may change, and what is bound for launches."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from triton_hybrid.checkpoint import PROGRESS, Progress
from triton_hybrid.config import Settings
from triton_hybrid.distributed import Ranks
from triton_hybrid.engine import Engine
from triton_hybrid.groups import check_parameter
from triton_hybrid.kernels.fingerprint import fingerprint_of
from triton_hybrid.kernels.ledger import FINGERPRINT_COLUMN, INDEX, PART_COLUMN
from triton_hybrid.kernels.multi_tensor import dense_view
from triton_hybrid.phases import Phase, PhaseController
from triton_hybrid.rules import RULES
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

Groups = Sequence[dict[str, Any]]


class Binding:
    """Settings and progress of an optimizer and, from the first step on, its engine."""

    def __init__(self, settings: Settings, ranks: Ranks) -> None:
        self.settings, self._ranks = settings, ranks
        self.progress = Progress(PhaseController(settings.config))
        self.engine: Engine | None = None  # before the first step and after a change
        self._pending_losses: list[Tensor | float] = []
        self._bound: list[Any] = []
        self._params: list[Tensor] = []
        self._state: State = {}
        self._held: list[int] = []
        self._installs = 0
        self._mentioned = False

    def bind(self, groups: Groups, state: State) -> Engine | None:
        """The engine of the parameters in the groups; None in an initialising first call.

        Anybody may replace parameters in the groups, their memory or their state between steps, so
        what is bound is compared every time.
        """
        bound = _whereabouts([param for group in groups for param in group["params"]])
        for group in groups:
            bound += [len(group["params"]), group["base"], RULES[group["base"]].settings(group)]
        if self.engine is None or bound != self._bound or not self._holds(state):
            members = [
                Member(param, group, group_index, index)
                for group_index, group in enumerate(groups)
                for index, param in enumerate(group["params"])
                if param.requires_grad and not is_lazy(param)
            ]
            if self.progress.gradients and not any(state.get(m.param) for m in members):
                self.unbind()
                self.restart()  # nothing is left of the state that the ledger is about
            if not members or (not state and all(m.param.grad is None for m in members)):
                return None
            masters = self.settings.master_weights
            for member in members:
                check_parameter(member.group, member.place, member.param, masters)
            initialising = not state and _only_initialises(members)
            self._rebind(members, state, len(groups))
            self._bound = bound
            if initialising:
                return None
        assert self.engine is not None
        self.engine.refresh(groups)
        return self.engine

    def _rebind(self, members: Sequence[Member], state: State, groups: int) -> None:
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
        self.engine = Engine(members, state, groups, self.settings)
        self.engine.restore(self.progress.ledger, self.progress.predictor)
        for loss in self._pending_losses:
            self.engine.observe_loss(loss)
        self._pending_losses.clear()
        self._state = state
        self._note_state()

    def restart(self) -> None:
        """Begins anew with Warmup; counters and the loss scale go on."""
        before, self.progress = self.progress, Progress(PhaseController(self.settings.config))
        self.progress.steps, self.progress.seconds = before.steps, before.seconds
        kept = ("loss_scale", "growth_tracker")
        self.progress.ledger = {k: v for k, v in before.ledger.items() if k in kept}

    def _holds(self, state: State) -> bool:
        """Whether the state holds the tensors that are bound."""
        assert self.engine is not None
        return self.engine.offload.installs != self._installs or self._held == _tensors(state)

    def _note_state(self) -> None:
        """Notes which tensors the state holds."""
        assert self.engine is not None
        self._held, self._installs = _tensors(self._state), self.engine.offload.installs

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
        """The inverse of `save`; a checkpoint of another optimizer begins a run."""
        saved = groups[0].get(PROGRESS) if groups else None
        if saved:
            self.progress = Progress.from_dict(saved, self.settings.config)
        elif self.progress.gradients:
            self.restart()

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

        on_device, on_host = state_bytes(state, hosted)
        if engine is None:
            ledger = {**ledger, **self.settings.scale_entries(ledger)}
            predictor = self.settings.config.predictor
        else:
            predictor, ledger = engine.predictor.name, engine.read()
            on_device += engine.offload.visiting_bytes()
        return HybridStats.of(self.progress, ledger, predictor, (on_device, on_host))

    def agree(self, engine: Engine) -> None:
        """Lets the ranks of data-parallel training decide by the same numbers."""
        if self._ranks.together:
            ledger, predicts = engine.scalars.ledger, engine.predictor.predicts
            self._ranks.agree(ledger, engine.fingerprints, predicts)

    def mention_unread_gradients(self, groups: Groups) -> None:
        """Warns, once, of gradients that were computed for a Predict step; zeros are none."""
        if self._mentioned or not has_gradients(groups):
            return
        self._mentioned = True
        if not all_zero(param for group in groups for param in group["params"]):
            warnings.warn(
                "gradients were computed for a Predict step, which does not read them: do so only "
                "where optimizer.needs_backward is True, or use inline=True",
                stacklevel=4,
            )

    @contextmanager
    def undisturbed(self, engine: Engine, plan: StepPlan) -> Iterator[None]:
        """What surrounds the work of a step: memory in its place, and an eye on what others write.

        Autocast is off, which would round the products of matrices.
        """
        with torch.autocast(engine.device.type, enabled=False):
            engine.gather()
            engine.offload.fetch(plan)
            follows = engine.predictor.follows_trajectory
            if self.progress.controller.stands or follows:
                engine.find_writes()
            yield
            stands, follows = self.progress.controller.stands, engine.predictor.follows_trajectory
            if stands or follows:
                engine.note_weights(every=not stands)
            engine.scatter()
            engine.offload.place(self.plan(engine), self.progress.controller.left_in_row)
            if engine.offload.installs != self._installs:
                self._note_state()

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
    return not any(bool(param.grad.any()) for param in params if param.grad is not None)


_PROPERTIES = tuple(map(operator.attrgetter, ("requires_grad", "dtype", "shape")))


def _whereabouts(params: Sequence[Tensor]) -> list[Any]:
    """What parameters are, and where; changes with all that has to be bound anew."""
    try:
        # A pass for each property costs a third of a tuple for each parameter.
        found: list[Any] = [*map(id, params), *map(Tensor.data_ptr, params)]
        found += map(Tensor.stride, params)
        for read in _PROPERTIES:
            found += map(read, params)
    except ValueError:  # one of them waits for its shape (`torch.nn.UninitializedParameter`)
        return _whereabouts([param for param in params if not is_lazy(param)])
    return found


def _tensors(state: State) -> list[int]:
    """Identities of all tensors in the state of parameters."""
    entries = [entry.values() for entry in state.values() if isinstance(entry, dict)]
    return list(map(id, itertools.chain.from_iterable(entries)))


def _leave(param: Tensor, entry: dict[str, Any], standing: bool) -> None:
    """Ends what predictions have to do with a parameter that is frozen, or no longer ours."""
    if PREDICTION.name not in entry:
        return
    noted = entry[PREDICTION.name][FINGERPRINT_COLUMN.value :]
    if standing and bool(noted.any()):
        found = fingerprint_of(dense_view(as_dense(param).detach()))
        if torch.equal(noted, found.to(noted.device)):
            restore_snapshot(param.detach(), entry)
    entry[PREDICTION.name] = entry[PREDICTION.name].clone()
    entry[PREDICTION.name][PART_COLUMN.value :] = 0.0


def _only_initialises(members: Sequence[Member]) -> bool:
    """Whether a first step only creates state.

    Distributed checkpointing calls `step()` once with learning rate 0 and zero gradients, and
    expects every state key afterwards and nothing else to have moved.
    """
    if any(float(member.group["lr"]) != 0.0 for member in members):
        return False
    return all_zero(member.param for member in members)
