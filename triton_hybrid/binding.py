"""What a step works with: memory, tables and rooms, made from parameter groups and state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from triton_hybrid.base.adamw import BaseRule
from triton_hybrid.base.muon import matrix_settings, settings_key
from triton_hybrid.corrector import ResidualCorrector
from triton_hybrid.divergence import DivergenceMonitor
from triton_hybrid.dynamics import DynamicsModel, history_needed
from triton_hybrid.kernels.chunks import require_launchable
from triton_hybrid.memory import StateMemory
from triton_hybrid.offload import lends_moments
from triton_hybrid.precision import scale_entries
from triton_hybrid.protocol import TorchProtocol
from triton_hybrid.runtime import Runtime


class Binding(TorchProtocol):
    """The part of `HybridOptimizer` that makes a step ready to run."""

    _base: BaseRule
    _monitor: DivergenceMonitor
    _corrector: ResidualCorrector

    @property
    def backend(self) -> str:
        """``"triton"`` or ``"torch"``: what runs the steps of these parameters."""
        wanted = str(self._settings["backend"])
        if wanted != "auto":
            return wanted
        return "triton" if self._first_device().type == "cuda" else "torch"

    def _bind(self) -> bool:
        """Binds parameters and state for launches; False in an initialising first call.

        Parameters may be replaced in the groups between steps (accelerate does it for
        FSDP2), so what is bound is compared every time.
        """
        params = [
            (param, index)
            for index, group in enumerate(self.param_groups)
            for param in group["params"]
            if param.requires_grad
        ]
        if not params:
            return False
        ids: list[Any] = [(id(param), index) for param, index in params]
        ids.extend(settings_key(group) for group in self.param_groups)
        if self._runtime_or_none is None or ids != self._bound_ids:
            if not self.state and all(param.grad is None for param, _ in params):
                return False
            initialising = not self.state and self._only_initialises(params)
            self._build(params)
            self._bound_ids = ids
            if initialising:
                return False
        else:
            self._adopt_outside_changes()
        self._runtime.refresh_hyperparameters(self.param_groups)
        return True

    def _only_initialises(self, params: Iterable[tuple[Tensor, int]]) -> bool:
        """Whether this first step only creates state.

        Distributed checkpointing calls `step()` once with learning rate 0 and zero
        gradients, and expects every state key afterwards and nothing else to have moved.
        """
        if any(float(group["lr"]) != 0.0 for group in self.param_groups):
            return False
        grads = [param.grad for param, _ in params if param.grad is not None]
        return all(not bool(grad.any()) for grad in grads)

    def _build(self, params: list[tuple[Tensor, int]]) -> None:
        self._unbind()
        config = self._config
        predicts = config.predictor != "none"
        memory = StateMemory(
            params,
            self.state,
            predicts=predicts,
            level=config.predictor in ("slow_ema", "auto"),
            steered=config.predictor == "slow_ema",
            history=history_needed(config),
            offload=config.offload,
            lends=lends_moments(config),
            masters=self._settings["master_weights"],
            muon={
                param: matrix_settings(group, index, param)
                for group in self.param_groups
                if group["base"] == "muon"
                for index, param in enumerate(group["params"])
            },
        )
        if self.backend == "triton":
            require_launchable(memory.device)
        runtime = Runtime(
            memory,
            config,
            self.backend,
            config.slow_beta if predicts else 0.0,
            len(self.param_groups),
        )
        scale = scale_entries(self._settings["loss_scale"], self._ledger)
        runtime.restore({**self._ledger, **scale})
        if self._pending_loss is not None:
            runtime.observe_loss(self._pending_loss)
            self._pending_loss = None
        self._runtime_or_none = runtime
        self._base = BaseRule(runtime, self._settings["max_grad_norm"])
        self._model = DynamicsModel(runtime)
        if self._model_state is not None:
            self._model.restore(self._model_state)
        self._monitor = DivergenceMonitor(runtime)
        self._corrector = ResidualCorrector(runtime)
        self._watch.remember(memory.params)

    def _adopt_outside_changes(self) -> None:
        memory = self._runtime.memory
        changed = set(self._watch.changed(memory.params))
        if changed:
            memory.offload.settle()
        offset = 0
        for bound in memory.sets:
            for index in range(len(bound.params)):
                if offset + index in changed:
                    bound.adopt(index)
            offset += len(bound.params)
