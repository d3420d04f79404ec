"""What an optimizer and ``torch.amp.GradScaler`` have to say to each other."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.binding import Binding
from triton_hybrid.groups import every_parameter


class ScaledByOthers:
    """An optimizer that a GradScaler may drive, in Predict steps too."""

    param_groups: list[dict[str, Any]]
    _binding: Binding
    _placeholder: Tensor | None = None  # a parameter with a gradient of zeros that is ours
    _asked: tuple[Tensor, Any] | None = None  # a parameter, its gradient when a GradScaler asked

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling and skipping to `step`.

        True where it cannot do it itself: it refuses to unscale FP16 gradients. Elsewhere False,
        because trainers refuse to clip otherwise. In a Predict step without gradients it is True as
        well, and one small parameter gets a gradient of zeros until `step`: a GradScaler raises
        where it finds nothing to look at. So it counts that step as one without an overflow.
        """
        self._binding.settings.refuse_grad_scaler()
        self._take_back()
        params = [param for param in every_parameter(self.param_groups) if param.requires_grad]
        reads = self._binding.progress.controller.phase.needs_gradient
        some = next((param for param in params if param.grad is not None), None)
        if reads or some is not None:
            self._asked = None if some is None else (some, weakref.ref(some.grad))
            return any(param.dtype == torch.float16 for param in params)
        if params:
            self._placeholder = min(params, key=Tensor.numel)
            self._placeholder.grad = torch.zeros_like(self._placeholder)
        return True

    def _drop_what_was_left_out(self) -> None:
        """Where a GradScaler has left out a step: its losses and its window ended with it.

        Whoever clears gradients by the model (transformers does) says nothing of it. As long as the
        gradients are there it may only have asked: others do before they clip.
        """
        if self._asked is None:
            return
        param, gradient = self._asked
        if param.grad is None or param.grad is not gradient():
            self._asked = None
            self._binding.observed.forget()
            if self._binding.windows is not None:
                self._binding.windows.restart()

    def _take_back(self) -> None:
        """Takes the gradient of zeros away."""
        if self._placeholder is not None:
            self._placeholder.grad = None
        self._placeholder = None

    def _scaler(self) -> tuple[Any, Any] | None:
        """What a GradScaler has set for this step: scale and flag; None without one."""
        self._take_back()
        self._asked = None
        scale, flag = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is None and flag is None:
            return None
        self._binding.settings.refuse_grad_scaler()
        return scale, flag
