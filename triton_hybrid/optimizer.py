"""HybridOptimizer: the phases, in the order of the table in the README."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from triton_hybrid.base.muon import MUON_DEFAULTS
from triton_hybrid.binding import Binding
from triton_hybrid.config import HybridConfig
from triton_hybrid.memory import state_bytes
from triton_hybrid.phases import PHASES, Phase, Report
from triton_hybrid.state_rows import touched_by_gradient, touched_by_prediction
from triton_hybrid.stats import HybridStats
from triton_hybrid.validation import (
    check_backend,
    check_group,
    check_loss_scale,
    check_master_weights,
    check_max_grad_norm,
    refuse_unbuilt,
)

YOUTH = 256


class HybridOptimizer(Binding):
    """AdamW, or Muon, that needs fewer backward passes.

    It cycles through Warmup → Full → Predict → Correct: it learns the dynamics of the
    training run, moves the weights ahead without a gradient, judges the move by the next
    real gradient, and corrects it or takes it back bit for bit. Swap it in for
    ``torch.optim.AdamW``; the defaults are the same.

    Args:
        params: Parameters, or parameter groups. Groups may set ``lr``, ``betas``, ``eps``,
            ``weight_decay``, ``maximize``, ``base`` and Muon's options.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        base: Base rule, ``"adamw"`` or, for matrices, ``"muon"``; mostly set by group
            (`split_param_groups`). Muon groups ignore ``betas``.
        hybrid: The phase machine's configuration; None takes the defaults.
        max_grad_norm: Global-norm clipping inside the fused step, or None.
        master_weights: ``"auto"``: FP32 masters behind 16-bit parameters. ``"split"``: beside a
            BF16 parameter the 16 bits that it lacks of its master, 2 bytes a parameter less; the
            same results, but for ties in rounding (one weight in 2^17, one bit in 2^24). FP16 is
            refused. ``"none"``: no masters; each step is rounded to nearest, and steps below half
            a bit of the parameter are lost. There is no stochastic rounding.
        loss_scale: ``"dynamic"`` or a number: gradients are those of `scale_loss(loss)`, and the
            step unscales them, skips what is not finite and moves the scale as
            ``torch.amp.GradScaler`` does. None: no scaling, or that of a GradScaler.
        accumulation: Not built yet.
        maximize: Ascend instead of descend.
        capturable: True: `step` never waits for the device; predictions are gated by the
            device alone, and the host's phases run as if all were accepted.
        backend: ``"auto"`` (Triton on GPU tensors, plain torch elsewhere), ``"triton"`` or
            ``"torch"``.
        process_group: Not built yet.
        muon: Options of Muon groups: ``momentum`` (0.95), ``nesterov`` (True), ``ns_steps`` (5),
            ``ns_coefficients`` (three numbers, or three for each step), ``adjust_lr_fn``
            (``"match_rms_adamw"``, so that one learning rate serves both rules, or
            ``"original"``), as in ``torch.optim.Muon``; ``ns_dtype`` (``"bfloat16"`` or
            ``"float32"``); ``blocks`` (equal blocks along rows and columns, orthogonalised each
            by itself) and ``transposed`` (whether rows are inputs), both also one for each
            parameter. Groups may set each of them.

    Raises:
        TypeError: An unknown option.
        ValueError: A value out of range; the message names argument, value and range.
        NotImplementedError: An option that is not built yet; the message names it.
    """

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
        accumulation: object | None = None,
        maximize: bool = False,
        capturable: bool = False,
        backend: str = "auto",
        process_group: object | None = None,
        **muon: Any,
    ) -> None:
        unknown = sorted(set(muon) - set(MUON_DEFAULTS))
        if unknown:
            raise TypeError(
                f"HybridOptimizer got unknown arguments {unknown}; of Muon there are "
                f"{sorted(MUON_DEFAULTS)}"
            )
        if hybrid is not None and not isinstance(hybrid, HybridConfig):
            raise ValueError(f"hybrid={hybrid!r}: must be a HybridConfig or None")
        config = hybrid or HybridConfig()
        if not isinstance(capturable, bool):
            raise ValueError(f"capturable={capturable!r}: must be True or False")
        refuse_unbuilt(
            accumulation=accumulation,
            process_group=process_group,
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "base": base,
            **MUON_DEFAULTS,
            **muon,
        }
        check_group(defaults)
        self._settings: dict[str, Any] = {
            "config": config,
            "max_grad_norm": check_max_grad_norm(max_grad_norm),
            "capturable": capturable,
            "backend": check_backend(backend),
            "loss_scale": check_loss_scale(loss_scale),
            "master_weights": check_master_weights(master_weights),
        }
        self._start_fresh()
        super().__init__(params, defaults)
        self._warn_about_idle_gpu()

    # ---------------------------------------------------------------- the method

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch._dynamo.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One phase step (inline: with the predictions that follow it).

        Args:
            closure: Computes the loss and its gradients, and returns the loss. Not called
                in a Predict phase.

        Returns:
            The closure's loss when it was called, otherwise None.
        """
        phase = self._controller.phase
        loss = self._evaluate(closure) if phase.needs_gradient else None
        started = time.perf_counter()
        scaler = self._scaler()
        if not self._bind():
            return loss

        self._runtime.memory.offload.fetch(self._touched())
        if phase is Phase.PREDICT:
            self._predict()
        elif self._runtime.memory.take_gradients():
            if scaler:
                self._runtime.borrow_scale(*scaler)
            if phase is Phase.CORRECT:
                self._monitor.judge()
                self._corrector.correct(restart=self._model.follows_trajectory)
            self._base.step(self._controller.measures, self._young)
            self._advance(scaled=scaler is not None)
            self._count(phase, started)
            while self._config.inline and self._controller.phase is Phase.PREDICT:
                self._predict()
            self._runtime.memory.release_gradients()
            if scaler:
                self._runtime.return_scale()
        self._place()
        self._watch.remember(self._runtime.memory.params)
        return loss

    def _predict(self) -> None:
        started = time.perf_counter()
        controller = self._controller
        first = controller.in_row == 0
        self._model.predict(controller.planned, first, self._young)
        self._monitor.settle(controller.in_row + 1, self._model.predictor == "subspace")
        controller.after_prediction()
        self._count(Phase.PREDICT, started)

    def _advance(self, scaled: bool) -> None:
        """Ends a gradient step: observe, ask the device if it must be, choose what is next.

        Args:
            scaled: Whether a GradScaler leaves the skipping to us.
        """
        controller, model = self._controller, self._model
        if controller.ends_gradients:
            model.observe_cycle()
        report = Report()
        ask = model.predictor != "none" and controller.wants_report
        # A GradScaler waits for its flag at every step anyway.
        if not self._settings["capturable"] and (ask or self._reads_are_free or scaled):
            report = self._ask()
        if controller.phase is Phase.CORRECT and model.follows_trajectory and not report.rejected:
            model.cycles = 0
        controller.after_gradient(report, model.ready, model.refit_steps)

    def _ask(self) -> Report:
        """Reads the ledger. On a GPU the only place where a step waits for the device."""
        entry = self._runtime.read()
        if self._controller.phase is Phase.FULL:
            self._model.choose(entry["signal"])
        skipped = entry["nonfinite"] > 0 and entry["verdict"] != 2
        missed = int(entry["skipped"]) - self._known_skips - int(entry["nonfinite"] > 0)
        self._known_skips = int(entry["skipped"])
        return Report(
            skipped=skipped,
            missed=missed,
            # No verdict means that there was nothing to judge: the move was taken back at
            # once, or the device's gate let none happen.
            rejected=self._controller.phase is Phase.CORRECT and entry["verdict"] != 1,
            confident=entry["confidence"] >= self._config.confidence_threshold,
            cooldown=int(entry["cooldown"]),
        )

    # ---------------------------------------------------------------- public state

    @property
    def phase(self) -> Phase:
        """The phase of the next `step()`."""
        return self._controller.phase

    @property
    def needs_backward(self) -> bool:
        """Whether the next `step()` reads gradients; constant until `step()` runs."""
        return self._controller.phase.needs_gradient

    @property
    def hybrid(self) -> HybridConfig:
        """The phase machine's configuration."""
        return self._config

    def observe_loss(self, loss: Tensor | float) -> None:
        """Tells the loss of the coming gradient, for loops without a closure.

        Never waits for the device. With it, a prediction that raised the loss is taken
        back; without it, the gradient norm alone judges.

        Args:
            loss: One element; a device tensor is best.
        """
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"loss has shape {tuple(loss.shape)}: must have one element")
        if self._runtime_or_none is None:
            self._pending_loss = torch.as_tensor(loss).detach()
        else:
            self._runtime.observe_loss(loss)

    @property
    def window_complete(self) -> bool:
        """Not built yet."""
        raise NotImplementedError("accumulation is not built yet: window_complete is not available")

    def stats(self) -> HybridStats:
        """Counters and measurements. Waits for the device."""
        entry = self._runtime.read() if self._runtime_or_none is not None else dict(self._ledger)
        judged = entry.get("accepted", 0.0) + entry.get("rejected", 0.0)
        predicted = self._steps[Phase.PREDICT]
        total = sum(self._steps.values())
        causes = ("nonfinite", "jump", "norm", "loss")
        on_device, on_host = state_bytes(self.state, self._in_host_memory)
        if self._runtime_or_none is not None:
            on_device += self._runtime.memory.offload.visiting_bytes()
        return HybridStats(
            steps=total,
            gradient_evaluations=total - predicted,
            predicted_steps=predicted,
            predicted_fraction=predicted / total if total else 0.0,
            steps_per_phase={phase.value: self._steps[phase] for phase in PHASES},
            seconds_per_phase={phase.value: self._seconds[phase] for phase in PHASES},
            acceptance_rate=entry.get("accepted", 0.0) / judged if judged else math.nan,
            rollbacks=int(entry.get("rejected", 0)),
            horizon=entry.get("horizon", 1.0),
            confidence=entry.get("confidence", 0.0),
            signal=entry.get("signal", 0.0),
            predictor=self._model.predictor if self._runtime_or_none else self._config.predictor,
            divergences={cause: int(entry.get(f"cause_{cause}", 0)) for cause in causes},
            skipped_nonfinite=int(entry.get("skipped", 0)),
            loss_scale=self._scale_now(entry),
            state_bytes_device=on_device,
            state_bytes_host=on_host,
        )

    # ---------------------------------------------------------------- inside

    @property
    def _young(self) -> bool:
        """Whether predictions still pull towards the average of the weights.

        After `YOUTH` gradients the pull has faded to a thirtieth, and is not worth its memory
        traffic.
        """
        return sum(self._steps.values()) - self._steps[Phase.PREDICT] < YOUTH

    @property
    def _reads_are_free(self) -> bool:
        """Whether reading the ledger waits for nobody."""
        return self._runtime.memory.device.type == "cpu"

    def _warn_about_idle_gpu(self) -> None:
        idle = torch.cuda.is_available() and self._first_device().type == "cpu"
        if idle and self._settings["backend"] == "auto":
            warnings.warn(
                "the parameters are on the CPU although a GPU is there; "
                "HybridOptimizer runs with backend='torch' on the CPU",
                UserWarning,
                stacklevel=3,
            )

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            loss = closure()
        if isinstance(loss, (Tensor, float)) and (
            not isinstance(loss, Tensor) or loss.numel() == 1
        ):
            self.observe_loss(loss)
        return loss

    def _touched(self) -> frozenset[str]:
        """The kinds of state that the next step reads or writes."""
        controller, trajectory = self._controller, self._model.follows_trajectory
        if controller.phase is Phase.PREDICT:
            return touched_by_prediction(self._young, controller.in_row == 0, trajectory)
        return touched_by_gradient(
            self._young, controller.measures, controller.may_predict, trajectory
        )

    def _place(self) -> None:
        """Puts the state where it should be until the next step."""
        controller = self._controller
        self._runtime.memory.offload.place(
            self._touched(),
            backward_first=controller.phase.needs_gradient,
            predictions=controller.planned - controller.in_row,
        )

    def _in_host_memory(self, name: str) -> bool:
        away = self._runtime_or_none is not None and self._runtime.memory.offload.is_away(name)
        return away or self._at_home_on_host(name)

    def _count(self, phase: Phase, started: float) -> None:
        self._steps[phase] += 1
        self._seconds[phase] += time.perf_counter() - started
