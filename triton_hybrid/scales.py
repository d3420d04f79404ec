"""What learning rates and gradients are multiplied with for one step, in place on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.kernels.scalars import HYPER, Scalars


class Scales:
    """Factors of one step.

    Args:
        scalars: Of the device.
        nominal: The hyperparameters as the groups have them; another table than that of the scalars
            where rates are scaled.
    """

    def __init__(self, scalars: Scalars, nominal: Tensor) -> None:
        self.nominal, self._rates = nominal, scalars.hyperparameters
        self._loss_scale = scalars.ledger[INDEX["loss_scale"]]
        self._found_inf = scalars.ledger[INDEX["found_inf"]]

    def scale_rates(self, factor: Tensor) -> None:
        """Takes the groups' learning rates times a factor on the device."""
        self._rates.copy_(self.nominal)
        self._rates[:, HYPER["lr"]].mul_(factor)

    def divide_gradient(self, count: Tensor) -> None:
        """Lets the step divide the gradient by a number on the device, beside the loss scale."""
        self._loss_scale.mul_(count)

    def end_division(self, count: Tensor) -> None:
        """Ends what `divide_gradient` began; the scale may have moved meanwhile."""
        self._loss_scale.div_(count)

    def borrow(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Takes over what a GradScaler says of the coming gradient."""
        for cell, value in ((self._loss_scale, grad_scale), (self._found_inf, found_inf)):
            if value is not None:
                cell.copy_(torch.as_tensor(value, dtype=cell.dtype).reshape(()))

    def give_back(self) -> None:
        """Ends what `borrow` began."""
        self._loss_scale.fill_(1.0)
        self._found_inf.fill_(0.0)
