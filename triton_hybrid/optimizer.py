"""HybridOptimizer: the phases, in the order of the table in the documentation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from triton_hybrid.accumulation import AccumulationConfig
from triton_hybrid.binding import Binding
from triton_hybrid.checkpoint import (
    PROGRESS,
    Progress,
    check_checkpoint,
    load_rows,
    without_tensors,
)
from triton_hybrid.config import HybridConfig, Settings
from triton_hybrid.distributed import Ranks
from triton_hybrid.engine import Engine
from triton_hybrid.flat_shards import fill_empty
from triton_hybrid.grad_scaler import ScaledByOthers
from triton_hybrid.groups import (
    as_rate,
    check_group,
    check_parameter,
    complete_group,
    every_parameter,
    first_device,
    is_trained,
    own_options,
)
from triton_hybrid.hooked import HookedStep, eager, evaluated, without_autocast
from triton_hybrid.hyperparameters import FRESH_RATES
from triton_hybrid.kernels.ledger_torch import is_sure_torch
from triton_hybrid.phases import NOBODY_ASKED, Phase, Report
from triton_hybrid.rules import OPTIONS
from triton_hybrid.stats import HybridStats
from triton_hybrid.verified import VerifiedWeights
from triton_hybrid.zero import join_checkpoints


class HybridOptimizer(VerifiedWeights, ScaledByOthers, HookedStep, Optimizer):
    """AdamW, Lion or Muon that needs fewer backward passes.

    It cycles through Warmup → Full → Predict → Correct: it learns the dynamics of the training run,
    moves the weights ahead without a gradient, verifies the move by the next real gradient, and
    corrects it or rolls it back bit for bit. Swap it in for ``torch.optim.AdamW``; the defaults are
    the same.

    Args:
        params: Parameters, or parameter groups. Groups may set ``lr``, ``betas``, ``eps``,
            ``weight_decay``, ``maximize``, ``base`` and the options of their base rule.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        base: Base rule, ``"adamw"``, ``"lion"`` or, for matrices, ``"muon"``; mostly set by group
            (`split_param_groups`). Muon groups ignore ``betas``; Lion's are (0.9, 0.99).
        hybrid: The phase machine's configuration; None takes the defaults.
        max_grad_norm: Global-norm clipping inside the fused step, or None.
        master_weights: ``"auto"``: FP32 masters behind 16-bit parameters. ``"split"``: beside a
            BF16 parameter the 16 bits that it lacks of its master, 2 bytes a parameter less; the
            same results, but for ties in rounding (one weight in 2^17, one bit in 2^24) and weights
            far smaller than their displacement, which predictions leave out. FP16 is
            refused. ``"none"``: no masters; each step is rounded to nearest, and steps below half
            a bit of the parameter are lost. There is no stochastic rounding.
        loss_scale: ``"dynamic"`` or a number: gradients are those of `scale_loss(loss)`, and the
            step unscales them, skips what is not finite and moves the scale as
            ``torch.amp.GradScaler`` does. None: no scaling, or that of a GradScaler.
        accumulation: How many micro-batches a step may take (`AccumulationConfig`); the loop asks
            `window_complete`, and does not divide the loss. None: one step, one gradient.
        maximize: Ascend instead of descend.
        capturable: True: `step` never waits for the device; predictions are gated by the
            device alone, and the host's phases run as if all were accepted.
        backend: ``"auto"`` (Triton on GPU tensors, plain torch elsewhere), ``"triton"`` or
            ``"torch"``.
        process_group: Which ranks decide together; None: the default group, where one is
            initialised; False: this rank alone. A group is not pickled.
        options: Of Muon groups, each of which may set them: ``momentum`` (0.95; schedulers
            that cycle betas cycle it; with a predicted gradient it forgets three times as fast, and
            the slow EMA joins), ``nesterov`` (True), ``ns_steps`` (5), ``ns_coefficients``
            (three numbers, or three for each step), ``adjust_lr_fn`` (``"match_rms_adamw"``, so
            that one learning rate serves both rules, or ``"original"``), as in
            ``torch.optim.Muon``; ``ns_dtype`` (``"bfloat16"``, ``"float32"``, or None: the first,
            but FP32 on CPUs, where it is 30 times as fast); ``blocks`` (equal blocks along rows and
            columns, orthogonalised each by itself) and ``transposed`` (whether rows are inputs),
            both also one for each parameter. ``fused``, ``foreach``, ``amsgrad=False`` and
            ``differentiable=False`` are taken and change nothing.

    Raises:
        TypeError: An unknown option.
        ValueError: A value out of range; the message names argument, value and range.
        NotImplementedError: An option that is not built yet; the message names it.
    """

    _loading: dict[str, Any] | None = None  # a checkpoint, while it is being loaded

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        base: str = "adamw",
        hybrid: HybridConfig | None = None,
        max_grad_norm: float | None = None,
        master_weights: str = "auto",
        loss_scale: float | str | None = None,
        accumulation: AccumulationConfig | None = None,
        maximize: bool = False,
        capturable: bool = False,
        backend: str = "auto",
        process_group: object | None = None,
        **options: Any,
    ) -> None:
        options = own_options(options)
        config = HybridConfig() if hybrid is None else hybrid
        settings = Settings(
            config, max_grad_norm, master_weights, loss_scale, capturable, backend, accumulation
        )
        defaults = {"lr": as_rate(lr), "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"maximize": maximize, "base": base, **OPTIONS, **options}
        check_group(defaults)
        self._binding = Binding(settings, Ranks.of(process_group))
        super().__init__(params, defaults)
        join_checkpoints(self, self._binding.ranks.zero)
        settings.warn_about_idle_gpu(first_device(self.param_groups))

    @eager
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One phase step (inline: with the predictions that follow it).

        Args:
            closure: Computes the loss and its gradients, and returns the loss. Not called
                in a Predict phase. With ``accumulation`` it computes a whole window: that of as
                many micro-batches as it asks `window_complete` for, or of one.

        Returns:
            The closure's loss when it was called, otherwise None.

        Raises:
            RuntimeError: Gradients of micro-batches that nobody has counted.
        """
        binding, scaler = self._binding, self._scaler()
        self._forget_swaps()
        if self.hybrid.inline:  # a step that was interrupted may have left a Predict phase
            self._progress.controller.need_gradient()
        loss = evaluated(self, closure) if self.phase.needs_gradient else None
        started = time.perf_counter()
        engine = binding.bind(self.param_groups, self.state)
        if engine is None:
            return loss
        phase = self.phase  # Warmup, where the state was cleared
        if phase is Phase.PREDICT:
            binding.unread.mention(self.param_groups)
        elif not self.hybrid.inline:
            binding.unread.note(self.param_groups)
        with without_autocast(engine.device_type):
            binding.open(engine)  # sees what others wrote, and obeys them
            if phase is Phase.PREDICT:
                binding.meet(engine)
                self._predict(engine)
            elif binding.take_gradients(engine, scaler):
                with binding.scaled(engine, self.param_groups, scaler):
                    plan = binding.plan(engine)
                    if plan.verified:
                        engine.verify(plan.edge)  # accepts, corrects or rolls the prediction back
                    engine.base_step(plan)
                    self._choose_next_phase(engine, scaled=scaler is not None)
                    self._progress.count(phase, started)
                    while self.phase is Phase.PREDICT and self.hybrid.inline:
                        self._predict(engine)
                    engine.release_gradients()
            binding.close(engine)
        return loss

    def _predict(self, engine: Engine) -> None:
        started, controller = time.perf_counter(), self._progress.controller
        engine.predict(controller.in_row)
        controller.after_prediction(alone=engine.predictor.keeps_pairs)
        self._progress.count(Phase.PREDICT, started)

    def _choose_next_phase(self, engine: Engine, scaled: bool) -> None:
        """Ends a gradient step: observe, ask the device if it must be, choose what is next."""
        controller, predictor, report = self._progress.controller, engine.predictor, NOBODY_ASKED
        if controller.ends_gradients:
            predictor.end_cycle()
        if not engine.settings.capturable:
            # A GradScaler, which leaves skipping to us, waits for its flag at every step anyway.
            ask = scaled or (predictor.predicts and controller.wants_report)
            report = self._ask(engine) if ask or engine.reads_are_free else report
        if controller.ends_gradients and report.skipped:
            predictor.reopen_cycle()
        predictor, changed = engine.predictor, engine.choice.changed  # by asking
        if report.written:
            engine.forget_writes()
        elif controller.phase is Phase.CORRECT and not report.rejected:
            predictor.move_held()
        refit_steps = self.hybrid.full_steps if changed else predictor.refit_steps
        controller.after_gradient(report, predictor.ready and not changed, refit_steps)
        if controller.phase is Phase.PREDICT:
            engine.begin_stretch()

    def _ask(self, engine: Engine) -> Report:
        """Reads the ledger. On a GPU the only place where a step waits for the device."""
        entry, progress = engine.look(), self._progress
        verified = self._binding.plan(engine).verified
        decision = entry["decision"] if verified else 0  # else it is that of an earlier step
        if progress.controller.wants_report and not entry["moved"]:
            engine.choice.choose(entry)
        before, progress.known_skips = progress.known_skips, int(entry["skipped"])
        return Report(
            skipped=entry["nonfinite"] > 0 and decision != 2,
            missed=progress.known_skips - before - int(entry["nonfinite"] > 0),
            # No decision: the move was rolled back at once, or the device's gate let none happen.
            rejected=self.phase is Phase.CORRECT and decision not in (1, 3, 4),
            shortened=decision == 4,
            written=decision == 3 or entry["written"] > 0,
            confident=is_sure_torch(entry, self.hybrid.confidence_threshold),
            cooldown=int(entry["cooldown"]),
        )

    @property
    def phase(self) -> Phase:
        """The phase of the next `step()`."""
        return self._progress.controller.phase

    @property
    def needs_backward(self) -> bool:
        """Whether the next `step()` reads gradients; constant until `step()` runs."""
        return self.hybrid.inline or self.phase.needs_gradient

    @property
    def hybrid(self) -> HybridConfig:
        """The phase machine's configuration."""
        return self._settings.config

    @property
    def backend(self) -> str:
        """``"triton"`` or ``"torch"``: what runs the steps of these parameters."""
        return self._settings.backend_for(first_device(self.param_groups))

    def observe_loss(self, loss: Tensor | float) -> None:
        """Tells the loss of the coming gradient, or of each of its micro-batches.

        For loops without a closure. Never waits for the device. With it, a prediction that raised
        the loss is rolled back; without it, the gradient norm alone verifies.

        Args:
            loss: One element; a device tensor is best.

        Raises:
            ValueError: More than one element.
        """
        self._drop_what_was_left_out()
        self._binding.observed.observe(loss)

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times the present scale, to call ``backward()`` on.

        Never waits for the device. A closure returns the loss itself, not the scaled one.

        Raises:
            RuntimeError: The optimizer was made without ``loss_scale``.
        """
        if self._settings.loss_scale is None:
            raise RuntimeError(
                "scale_loss() without loss scaling: make the optimizer with loss_scale='dynamic' "
                "or a number"
            )
        return loss * self._binding.loss_scale()

    @property
    def window_complete(self) -> bool:
        """Whether the gradients suffice for a `step`; the loop asks after each ``backward()``.

        It does not divide the loss: the step divides by the number of micro-batches that it got.
        True without ``accumulation``, and where the coming step reads no gradient.
        """
        self._drop_what_was_left_out()
        return self._binding.window_complete(self.param_groups)

    @property
    def last_of_window(self) -> bool:
        """Whether the coming micro-batch completes the window: all others are for `no_sync`."""
        self._drop_what_was_left_out()
        windows = self._binding.windows
        return windows is None or windows.closing

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; micro-batches that are thrown away no longer count, nor an infinite loss."""
        self._binding.observed.forget_unread()
        super().zero_grad(set_to_none)
        self._binding.begin_window(self.param_groups)

    def stats(self) -> HybridStats:
        """Counters and measurements. Waits for the device."""
        return self._binding.stats(self.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group after checking all of it."""
        if isinstance(param_group, dict) and not isinstance(param_group.get("params", set()), set):
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            # Flattened checkpoints keep only what a fresh optimizer's groups have.
            param_group = {PROGRESS: {}, **FRESH_RATES, **param_group, "params": params}
            group = {**self.defaults, **param_group}
            group["lr"] = param_group["lr"] = as_rate(group["lr"])
            check_group(group)
            for index, entry in enumerate(params):
                param = entry[1] if isinstance(entry, tuple) else entry
                if isinstance(param, Tensor) and is_trained(param):
                    check_parameter(group, index, param, self._settings.master_weights)
        super().add_param_group(param_group)
        self._binding.unbind()

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; phase and ledger lie in the groups."""
        self._binding.save(self.param_groups)
        # The first of the hooks: others may wrap the result.
        with self.register_state_dict_post_hook(self._as_saved, prepend=True):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this optimizer, or one of torch's AdamW or Muon.

        Torch casts floating state to its parameter's dtype; here every tensor keeps the
        dtype it was saved with, as a copy on its parameter's device. All hooks run as in torch.

        Raises:
            ValueError: The groups or the shapes of the state do not match, or the checkpoint is of
                AMSGrad.
        """

        def take_over(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            check_checkpoint(final, self.param_groups)
            self._loading = final
            return without_tensors(final)

        try:
            # The last of the hooks sees what the others have made of the checkpoint.
            with self.register_load_state_dict_pre_hook(take_over):
                super().load_state_dict(state_dict)
        finally:
            self._loading = None

    def _load_tensors(self, state_dict: dict[str, Any], rules: list[str]) -> None:
        """What torch was not given: it has put the rest in its place."""
        for group, rule in zip(self.param_groups, rules):
            # Torch's checkpoints name no rule, and the present one stays.
            group["base"] = group["base"] if PROGRESS in group else rule
        load_rows(self.state, self.param_groups, state_dict, self._binding.at_home_on_host)
        fill_empty(self.state, every_parameter(self.param_groups), self._binding.ranks)
        self._binding.unbind(save=False)
        self._binding.load(self.param_groups)
        self._return_predictions()

    def __getstate__(self) -> dict[str, Any]:
        self._binding.save(self.param_groups)
        return {**self._with_predictions(super().__getstate__()), **self._binding.kept()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        unpickled = "_settings" in state
        if unpickled:
            ranks = Ranks(state.pop("_alone", None))
            self._binding = Binding(state.pop("_settings"), ranks)
            self._binding.clipped_outside = state.pop("_clipped_outside", False)
        self._forget_swaps()
        rules = [] if unpickled else [group["base"] for group in self.param_groups]
        super().__setstate__(state)
        # Torch has a default for an option that is none of ours.
        self.defaults.pop("differentiable", None)
        for group in self.param_groups:
            complete_group(group, self.defaults)
        if unpickled:
            self._binding.load(self.param_groups)
            self._return_predictions()
        elif self._loading is not None:
            self._load_tensors(self._loading, rules)

    @property
    def _settings(self) -> Settings:
        return self._binding.settings

    @property
    def _progress(self) -> Progress:
        return self._binding.progress

    @property
    def _engine(self) -> Engine | None:
        return self._binding.engine
