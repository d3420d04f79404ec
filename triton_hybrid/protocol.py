"""What torch expects of an optimizer: parameter groups, checkpoints, loss scaling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from triton_hybrid.config import HybridConfig
from triton_hybrid.dynamics import DynamicsModel
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.phases import PHASES, PhaseController
from triton_hybrid.precision import ChangeWatch, scale_entries
from triton_hybrid.runtime import FRESH_RATES, Runtime
from triton_hybrid.state_rows import lives_on_host
from triton_hybrid.validation import check_group, check_matrix, check_parameter, check_splittable

BOTH_SCALERS = (
    "loss_scale is set, and a GradScaler is used: both would scale; use scale_loss(loss) and "
    "step() without the GradScaler, or make the optimizer with loss_scale=None"
)
PROGRESS = "hybrid_progress"
"""Key of every parameter group that carries phase, counters and ledger in checkpoints."""


class TorchProtocol(Optimizer):
    """The part of `HybridOptimizer` that is not the method.

    Everything that must outlive pickling lies in ``state`` and ``param_groups``, in torch's
    own layout; what is bound for launches (`Runtime`) is made anew from it.
    """

    _settings: dict[str, Any]
    _pending_loss: Tensor | None
    _runtime_or_none: Runtime | None
    _model: DynamicsModel

    # ---------------------------------------------------------------- loss scaling

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss times the present scale, to call ``backward()`` on.

        Never waits for the device. A closure returns the loss itself, not the scaled one.

        Raises:
            RuntimeError: The optimizer was made without ``loss_scale``.
        """
        if self._settings["loss_scale"] is None:
            raise RuntimeError(
                "scale_loss() without loss scaling: make the optimizer with loss_scale='dynamic' "
                "or a number"
            )
        if self._runtime_or_none is None:
            scale: Any = scale_entries(self._settings["loss_scale"], self._ledger)["loss_scale"]
        else:
            # A copy: the step moves the scale in place, and autograd may still hold this one.
            scale = self._runtime.ledger[INDEX["loss_scale"]].float()
        scaled: Tensor = loss * scale
        return scaled

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling and skipping to `step`.

        True where it cannot do it itself: it refuses to unscale FP16 gradients. Elsewhere False,
        because trainers refuse to clip otherwise.
        """
        if self._settings["loss_scale"] is not None:
            raise RuntimeError(BOTH_SCALERS)
        return any(p.dtype == torch.float16 for g in self.param_groups for p in g["params"])

    def _scaler(self) -> tuple[Any, Any] | None:
        """What a GradScaler has set for this step: scale and flag; None without one."""
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        if grad_scale is None and found_inf is None:
            return None
        if self._settings["loss_scale"] is not None:
            raise RuntimeError(BOTH_SCALERS)
        return grad_scale, found_inf

    def _scale_now(self, entry: dict[str, float]) -> float:
        chosen = self._settings["loss_scale"]
        if self._runtime_or_none is not None:
            return entry["loss_scale"]
        return scale_entries(chosen, self._ledger)["loss_scale"]

    # ---------------------------------------------------------------- groups and checkpoints

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group after checking all of it."""
        if isinstance(param_group, dict) and "params" in param_group:
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            # Flattened checkpoints keep only what a fresh optimizer's groups have.
            param_group = {PROGRESS: {}, **FRESH_RATES, **param_group, "params": params}
            group = {**self.defaults, **param_group}
            check_group(group)
            for index, entry in enumerate(params):
                param = entry[1] if isinstance(entry, tuple) else entry
                check_parameter(param)
                if isinstance(param, Tensor):
                    check_splittable(self._settings["master_weights"], param.dtype)
                if group["base"] == "muon":
                    check_matrix(group, index, param)
        super().add_param_group(param_group)
        self._unbind()

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; phase and ledger lie in the groups."""
        self._save_progress()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this optimizer, or one of torch's AdamW or Muon.

        Torch casts floating state to its parameter's dtype; here every tensor keeps the
        dtype it was saved with, as a copy on its parameter's device.

        Raises:
            ValueError: The groups do not match, or the checkpoint is of AMSGrad.
        """
        for group in state_dict["param_groups"]:
            if group.get("amsgrad"):
                raise ValueError("amsgrad=True in the checkpoint: must be False, it is not built")
        rules = [group["base"] for group in self.param_groups]
        # What lives in host memory does not visit the device on its way there.
        passing = {
            index: {k: v for k, v in entry.items() if not self._at_home_on_host(k)}
            for index, entry in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": passing})
        for group, rule in zip(self.param_groups, rules):
            # Torch's checkpoints name no rule, and the present one stays.
            group["base"] = group["base"] if PROGRESS in group else rule
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved_ids, params):
            # Torch's Muon keeps the same average under another name.
            self.state[param].pop("momentum_buffer", None)
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    key = "exp_avg" if key == "momentum_buffer" else key
                    place = torch.device("cpu") if self._at_home_on_host(key) else param.device
                    self.state[param][key] = value.detach().to(device=place, copy=True)
        self._unbind(save=False)
        self._load_progress()

    def __getstate__(self) -> dict[str, Any]:
        self._save_progress()
        return {**super().__getstate__(), "_settings": self._settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_settings" in state:
            self._settings = state["_settings"]
            self._start_fresh()
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if "_settings" in state:
            self._load_progress()

    # ---------------------------------------------------------------- inside

    @property
    def _config(self) -> HybridConfig:
        config = self._settings["config"]
        assert isinstance(config, HybridConfig)
        return config

    @property
    def _runtime(self) -> Runtime:
        assert self._runtime_or_none is not None
        return self._runtime_or_none

    def _at_home_on_host(self, key: str) -> bool:
        """Whether state of this name is at home in host memory."""
        return self._config.offload != "none" and lives_on_host(key)

    def _start_fresh(self) -> None:
        self._controller = PhaseController(self._config)
        self._runtime_or_none = None
        self._watch = ChangeWatch()
        self._ledger: dict[str, float] = {}
        self._model_state: dict[str, int] | None = None
        self._known_skips = 0
        self._pending_loss = None
        self._bound_ids: list[Any] = []
        self._steps = dict.fromkeys(PHASES, 0)
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def _first_device(self) -> torch.device:
        return next(
            (param.device for group in self.param_groups for param in group["params"]),
            torch.device("cpu"),
        )

    def _unbind(self, save: bool = True) -> None:
        """Lets go of bound memory; the state stays in `state`, scalars in `_ledger`."""
        if self._runtime_or_none is not None:
            self._runtime.memory.offload.close(save)
            if save:
                self._ledger = self._runtime.read()
                self._model_state = self._model.state()
        self._runtime_or_none = None

    def _save_progress(self) -> None:
        """Writes phase, counters and ledger into the groups: what torch keeps."""
        if self._runtime_or_none is not None:
            self._ledger = self._runtime.read()
            self._model_state = self._model.state()
            self._runtime.memory.offload.synchronise()
        progress: dict[str, Any] = {
            "controller": self._controller.state(),
            "steps": {phase.value: self._steps[phase] for phase in PHASES},
            "seconds": {phase.value: self._seconds[phase] for phase in PHASES},
            "ledger": dict(self._ledger),
            "model": dict(self._model_state or {}),
        }
        for group in self.param_groups:
            group[PROGRESS] = progress

    def _load_progress(self) -> None:
        progress = self.param_groups[0].get(PROGRESS) if self.param_groups else None
        if not progress:
            return
        self._controller.restore(progress["controller"])
        if self._config.inline:
            self._controller.need_gradient()
        self._steps = {phase: int(progress["steps"][phase.value]) for phase in PHASES}
        self._seconds = {phase: float(progress["seconds"][phase.value]) for phase in PHASES}
        self._ledger = {name: float(value) for name, value in progress["ledger"].items()}
        self._known_skips = int(self._ledger.get("skipped", 0))
        self._model_state = dict(progress["model"]) or None
