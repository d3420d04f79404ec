"""The tie between parameter groups, which anybody may change, and what is bound for launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import compress, repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from triton_hybrid.accumulation import Windows
from triton_hybrid.capturing import refuse_scaler, refuse_unready
from triton_hybrid.checkpoint import PROGRESS, Progress
from triton_hybrid.config import Settings
from triton_hybrid.distributed import MICRO_BATCHES, Ranks, Standing
from triton_hybrid.engine import Engine
from triton_hybrid.groups import (
    check_group,
    check_parameter,
    every_parameter,
    is_trained,
    places_number,
    with_kernels,
)
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.kernels.update_rule import UpdateRule
from triton_hybrid.losses import Observed
from triton_hybrid.phases import Phase, PhaseController
from triton_hybrid.predictors import PREDICTORS
from triton_hybrid.predictors.predictor import Choice
from triton_hybrid.rules import RULES
from triton_hybrid.shards import Shards, local, only_initialises
from triton_hybrid.standing import compare_whole, continues, leave
from triton_hybrid.state import DECLARED, Home, Member, State, StepPlan, state_bytes
from triton_hybrid.stats import HybridStats
from triton_hybrid.watch import Groups, UnreadGradients, Watch

_NOTHING = nullcontext()


class Binding:
    """Settings and progress of an optimizer and, from the first step on, its engine."""

    def __init__(self, settings: Settings, ranks: Ranks) -> None:
        self.settings, self.ranks = settings, ranks
        self._described = repr(settings)
        self.progress = Progress(PhaseController(settings.config))
        windows = settings.accumulation
        self.windows = None if windows is None else Windows(windows, ranks)
        self.engine: Engine | None = None  # before the first step and after a change
        # Beside the wrapper of a trainer, which has attributes of its own, this is one for all.
        self.swaps: list[Any] | None = None  # while the verified weights stand in the parameters
        self.pending: list[Any] = []  # predictions of a checkpoint that wait for their weights
        self.observed = Observed()
        self.clipped_outside = False  # whether others have set `max_grad_norm`
        self._watch: Watch | None = None
        self._params: list[tuple[Tensor, UpdateRule]] = []
        self._state: State = {}
        self._installs = 0
        self._moved: list[list[bool]] = []  # whether each tensor had a gradient before, by batch
        self.unread = UnreadGradients()
        self._plans: dict[Any, StepPlan] = {}  # by all that decides

    def bind(self, groups: Groups, state: State) -> Engine | None:
        """The engine of the parameters in the groups; None in an initialising first call.

        Anybody may replace parameters in the groups, their memory or their state between steps, so
        what is bound is compared every time.
        """
        try:
            return self._bound(groups, state)
        except (KeyError, TypeError, ValueError):
            for group in groups:  # what somebody has set meanwhile may be the reason
                check_group(group)
            raise

    def _bound(self, groups: Groups, state: State) -> Engine | None:
        engine = self.engine
        if engine is None or self._sees_changes(engine, groups, state):
            engine = self._bind_anew(groups, state)
            if engine is None:
                self.observed.forget()
                return None
        elif engine.uncapturable:
            refuse_unready(groups, engine.device, capturable=False)
        engine.refresh(groups)
        if self.windows is not None:
            engine.scales.scale_rates(self.windows.numbers(engine.device)[1])
        return engine

    def _bind_anew(self, groups: Groups, state: State) -> Engine | None:
        """Makes an engine; None where there is nothing to bind, or state was all that was asked."""
        refuse_unready(groups, None, self.settings.capturable)
        members = [
            Member(param, group, group_index, index, param)
            for group_index, group in enumerate(groups)
            for index, param in enumerate(group["params"])
            if is_trained(param)
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
        initialising = not state and only_initialises(members, self.ranks)
        self._rebind(members, state, groups)
        return None if initialising else self.engine

    def _rebind(self, members: Sequence[Member], state: State, groups: Groups) -> None:
        self.unbind()
        ledger, old = self.progress.ledger, self._params
        self._params = [(m.param, RULES[m.group["base"]].kernels) for m in members]
        standing = ledger.get("moved", 0.0) > 0
        known, present = ({id(param) for param, _ in pairs} for pairs in (old, self._params))
        # Those that a checkpoint was made of may be frozen before they are bound here at all.
        its = (*old, *with_kernels(groups))
        gone = [(p, rule) for p, rule in its if id(p) not in present and p in state]
        here = every_parameter(groups) if standing else []
        others = [compare_whole(param, state[param]) for param in here if param in state]
        others += [leave(param, state[param], rule, standing) for param, rule in gone]
        others.append(bool(old) and known != present)
        before, self.progress.bound = self.progress.bound, -1
        others.append(before not in (-1, places_number(groups, [m.param for m in members])))
        # Ranks with nothing of a parameter may have loaded nothing of its state either.
        others += [not state.get(m.param) and local(m.param).numel() > 0 for m in members]
        choice, masters = self._choice(), self.settings.master_weights
        for member in members if standing else ():
            base, entry = RULES[member.group["base"]], state.get(member.param, {})
            if not continues(member, entry, base, choice, masters):
                # A checkpoint of another predictor, or with masters kept otherwise.
                leave(member.param, state[member.param], base.kernels, standing)
                ledger["written"] = 1.0
        if standing and any(others):
            ledger["written"] = 1.0  # those who stay are verified, but nothing is learnt from it
        shards = Shards(members, state, self.ranks)
        reduce = self.ranks.reduce if shards.some and self.ranks.together else None
        made = shards.members, shards.state, len(groups), self.settings
        try:
            engine = Engine(*made, self.progress.predictor, reduce)
        except torch.OutOfMemoryError:
            choice = self._choice()
            if not choice.do_without():
                raise
            self.progress.predictor = {**(self.progress.predictor or {}), **choice.saved()}
            choice.release(shards.state)
            engine = Engine(*made, self.progress.predictor, reduce)
        shards.publish()
        engine.restore(self.progress.ledger, self.progress.predictor)
        self.observed.bind(engine.losses)
        self._state, self._installs = state, engine.offload.installs
        self._watch, self.engine = Watch(groups, state), engine

    def restart(self) -> None:
        """Begins anew with Warmup; counters and the loss scale go on."""
        before, self.progress = self.progress, Progress(PhaseController(self.settings.config))
        self.progress.steps, self.progress.seconds = before.steps, before.seconds
        kept = ("loss_scale", "growth_tracker")
        self.progress.ledger = {k: v for k, v in before.ledger.items() if k in kept}

    def _sees_changes(self, engine: Engine, groups: Groups, state: State) -> bool:
        """Whether anything of what is bound is not as it was."""
        assert self._watch is not None
        ours = engine.offload.installs != self._installs
        return self._watch.sees_changes(groups, None if ours else state)

    def unbind(self, save: bool = True) -> None:
        """Lets go of bound memory; the state stays where it is, scalars in the progress."""
        if self.engine is not None:
            self.engine.offload.close(save)
            if save:
                self._note(self.engine)
        self.engine = self._watch = None
        self.observed.bind(None)

    def _note(self, engine: Engine) -> None:
        self.progress.ledger = engine.read()
        self.progress.predictor = engine.choice.state()

    @torch.no_grad()
    def save(self, groups: Groups) -> None:
        """Writes phase, counters and ledger into the groups: what torch keeps."""
        if self.engine is not None:
            if self.engine.managed and not self.swaps and self._watches(self.engine):
                self.engine.gather()
                self.engine.find_writes()  # checkpoints of parts hold no fingerprints
            self._note(self.engine)
            self.engine.offload.synchronise()
            bound = places_number(groups, [param for param, _ in self._params])
            self.progress.bound = bound if self.progress.ledger["moved"] else -1
            self.progress.losses = self.observed.count
        progress = self.progress.to_dict()
        if self.windows is not None:
            progress["windows"] = self.windows.state(every_parameter(groups))
        for group in groups:
            group[PROGRESS] = progress

    def load(self, groups: Groups) -> None:
        """The inverse of `save`; a checkpoint of another optimizer begins a run."""
        saved = groups[0].get(PROGRESS) if groups else None
        if saved:
            self._params, self.progress = [], Progress.from_dict(saved, self.settings.config)
            self.observed.restore(self.progress.losses, every_parameter(groups))
        elif self.progress.gradients:
            self.restart()
        if self.windows is not None and saved and "windows" in saved:
            self.windows.restore(saved["windows"], every_parameter(groups))

    def kept(self) -> dict[str, Any]:
        """What to make another binding of: of pickled optimizers."""
        kept = {"_settings": self.settings, "_alone": self.ranks.alone}
        return {**kept, "_clipped_outside": self.clipped_outside}

    def at_home_on_host(self, name: str) -> bool:
        """Whether state of this name is at home in host memory."""
        declared = self.settings.config.offload != "none" and name in DECLARED
        return declared and DECLARED[name].home is Home.HOST

    def loss_scale(self) -> Tensor | float:
        """The present loss scale, on the device where that is known."""
        if self.engine is None:
            return self.settings.scale_entries(self.progress.ledger)["loss_scale"]
        # A copy: the step moves the scale in place, and autograd may still hold this one.
        return self.engine.scalars.ledger[INDEX["loss_scale"]].float()

    def window_complete(self, groups: Groups) -> bool:
        """Whether the coming step has all the gradients that it waits for."""
        if self.windows is None or not self.progress.controller.phase.needs_gradient:
            return True
        return self.windows.ask(every_parameter(groups))

    def begin_window(self, groups: Groups) -> None:
        """Forgets the micro-batches of gradients that are no more."""
        if self.windows is not None:
            self.windows.drop(every_parameter(groups))

    def stats(self, state: State) -> HybridStats:
        """Counters and measurements. Waits for the device."""
        engine, ledger = self.engine, self.progress.ledger

        def hosted(name: str) -> bool:
            away = engine and engine.offload.is_away(name)
            return bool(away) or self.at_home_on_host(name)

        dicts = {p: its for p, its in state.items() if isinstance(its, dict)}
        here = {p: {k: local(v) for k, v in its.items()} for p, its in dicts.items()}
        on_device, on_host = state_bytes(here, hosted)
        if engine is None:
            ledger = {**ledger, **self.settings.scale_entries(ledger)}
            choice, known = self._choice(), self.progress.predictor or {}
        else:
            choice, known, ledger = engine.choice, engine.choice.state(), engine.read()
            on_device += engine.offload.visiting_bytes()
        chosen = choice.active.name, *choice.explain(known)
        stats = HybridStats.of(self.progress, ledger, chosen, (on_device, on_host))
        return stats if self.windows is None else replace(stats, **self.windows.report())

    def _choice(self) -> Choice:
        """The predictor of the progress, without an engine."""
        choice = PREDICTORS[self.settings.config.predictor](self.settings.config)
        choice.foresee(self.progress.predictor or {})
        return choice

    def take_gradients(self, engine: Engine, scaler: Any) -> bool:
        """Reads the gradients, and lets several ranks go on from the same numbers.

        ``scaler``: scale and flag of a GradScaler, or None. Returns whether any rank has gradients.

        Raises:
            RuntimeError: The micro-batches in the gradients were not counted.
        """
        found = engine.take_gradients()
        if found and self.windows is not None:
            self.windows.require_count()  # before others wait for this rank
        if scaler and (found or self.ranks.together):
            refuse_scaler(engine.device)
            engine.scales.borrow(*scaler)
        if not self.ranks.together:
            return found
        engine.measure_gradients()
        if self.ranks.agree(engine.scalars, found, self._standing(engine), engine.signature):
            return True
        engine.forget_gradients()
        if scaler:
            engine.scales.give_back()
        return False

    def meet(self, engine: Engine) -> None:
        """Before a Predict step that what others wrote on one rank might keep from being made."""
        predictor = engine.predictor
        depends = predictor.keeps_pairs or predictor.follows_trajectory
        if self.ranks.together and (depends or engine.reduce is not None):
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
            **({} if self.windows is None else {MICRO_BATCHES: self.windows.count}),
        }

    def scaled(self, engine: Engine, groups: Groups, scaler: Any) -> AbstractContextManager[None]:
        """What surrounds a gradient step: the length of a window, and a GradScaler's scale.

        `take_gradients` has borrowed the scale already.
        """
        plain = self.windows is None and not scaler
        return _NOTHING if plain else self._scaled(engine, groups, scaler)

    @contextmanager
    def _scaled(self, engine: Engine, groups: Groups, scaler: Any) -> Iterator[None]:
        windows = self.windows
        if windows is not None:
            engine.scales.divide_gradient(windows.numbers(engine.device)[0])
        try:
            yield
        finally:  # a user may interrupt a step, and go on
            if windows is not None:
                engine.scales.end_division(windows.numbers(engine.device)[0])
                windows.close(every_parameter(groups))
            if scaler:
                engine.scales.give_back()

    def open(self, engine: Engine) -> None:
        """Before the work of a step: memory comes to its place, and who wrote meanwhile is seen."""
        engine.gather()
        if engine.offload.moves:
            engine.offload.fetch(self.plan(engine))
        if self._watches(engine):
            engine.find_writes()
        stands = self.progress.controller.stands
        self._moved = [batch.tensors.present for batch in engine.batches] if stands else []

    def _watches(self, engine: Engine) -> bool:
        """Whether what others write before the coming step would be taken for ours."""
        controller, predictor = self.progress.controller, engine.predictor
        # A move of pairs begins at the snapshot that the last gradient left.
        begins = predictor.keeps_pairs and controller.phase is Phase.PREDICT
        return controller.stands or predictor.follows_trajectory or begins

    def close(self, engine: Engine) -> None:
        """After it: what was left in the weights is noted, and memory goes back."""
        controller, offload = self.progress.controller, engine.offload
        # An older graph that needs these weights is an error, then; a rollback writes those that a
        # prediction had moved, with a gradient now or not.
        for batch, before in zip(engine.batches, self._moved or repeat(None)):
            present = batch.tensors.present
            increment_version(compress(batch.wholes, present))
            if before is not None and before is not present:
                increment_version(compress(batch.wholes, before))
        if self._watches(engine):
            engine.note_weights(every=not controller.stands)
        engine.scatter()
        if offload.moves:
            offload.place(self.plan(engine), controller.left_in_row)
        if offload.installs != self._installs:
            assert self._watch is not None
            self._watch.note(self._state)
            self._installs = offload.installs
        if engine.choice.changed:  # the next step binds it anew, with other rows
            self.unbind()
            engine.choice.release(self._state)

    def plan(self, engine: Engine) -> StepPlan:
        """What the next step does."""
        controller, predictor = self.progress.controller, engine.predictor
        kind = controller.phase, min(controller.remaining, 2), controller.in_row > 0, predictor.name
        plan = self._plans.get(kind)
        if plan is None:
            phase, ends = controller.phase, controller.ends_gradients
            pairs = predictor.keeps_pairs and phase is not Phase.WARMUP
            plan = self._plans[kind] = StepPlan(
                gradient=phase is not Phase.PREDICT,
                measured=controller.measures,
                edge=ends or phase is Phase.CORRECT,
                first=phase is Phase.PREDICT and controller.in_row == 0,
                trajectory=predictor.follows_trajectory,
                pairs=pairs,
                verified=pairs or phase is Phase.CORRECT,
                followed=controller.base_step_follows,
            )
        return plan
