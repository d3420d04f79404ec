"""Lightning: a mixin for automatic optimization (inline drive) and manual (stepped, too)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from triton_hybrid import HybridOptimizer
from triton_hybrid.integrations.wrappers import clip_inside, find, unwrap


class HybridLightningCallback(Callback):  # type: ignore[misc]
    """Validates and saves verified weights; a resumed run goes on from the prediction."""

    def __init__(self) -> None:
        self._trainer: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Notes whose optimizers are meant."""
        self._trainer = trainer

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins with a fresh window; refuses a stepped optimizer under automatic optimization.

        Raises:
            ValueError: There is one.
        """
        if isinstance(pl_module, HybridLightningMixin):
            pl_module._begin()  # where the last training ended, a window may have been open
        stepped = [opt for opt in _optimizers(trainer) if not opt.hybrid.inline]
        if stepped and pl_module.automatic_optimization:
            raise ValueError(
                "inline=False with automatic optimization: Lightning computes a gradient for every "
                "step, and a Predict step reads none. Use HybridConfig(inline=True), or set "
                "self.automatic_optimization = False and call self.hybrid_step(loss) in "
                "training_step"
            )

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        """Lets the prediction stand again."""
        for optimizer in _optimizers(trainer):
            optimizer.train()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        """Keeps the losses of a window that is not complete."""
        if isinstance(pl_module, HybridLightningMixin):
            pl_module._after_batch(outputs)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Puts the prediction aside."""
        for optimizer in _optimizers(trainer):
            optimizer.eval()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leaves the verified weights."""
        self.on_validation_start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Called before the optimizers are saved: weights on their way to a file are verified."""
        if self._trainer is not None:
            self.on_validation_start(self._trainer, None)
        return {}


class HybridLightningMixin:
    """Makes a ``LightningModule`` drive a HybridOptimizer as it wants to be driven.

    Put it first: ``class Model(HybridLightningMixin, LightningModule)``. Under automatic
    optimization the mean loss of an accumulation window is observed, and ``gradient_clip_val``
    clips inside the step. Under manual optimization `hybrid_step` takes a gradient step and the
    Predict steps that follow it, so that in the stepped drive no batch is thrown away. Validation
    and checkpoints have the verified weights. What overrides `configure_callbacks`,
    `optimizer_step`, `configure_gradient_clipping` or `on_save_checkpoint` must call ``super()``.
    """

    _window: Tensor | None = None  # loss of the accumulation window so far
    _stepped = False  # whether the present batch ended in a step

    def _begin(self) -> None:
        self._window, self._stepped = None, False

    def configure_callbacks(self) -> list[Any]:
        """Adds a `HybridLightningCallback`."""
        module: Any = super()
        return [*module.configure_callbacks(), HybridLightningCallback()]

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """As Lightning's; the closure gives the optimizer the mean loss of the window."""
        module: Any = super()
        found, its = find(optimizer), self
        if found is None or optimizer_closure is None:
            module.optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        hybrid, evaluate = found, optimizer_closure

        def closure() -> Any:
            loss = evaluate()
            if not isinstance(loss, Tensor):
                return loss
            # Lightning has divided each by the length of the window.
            loss = loss if its._window is None else its._window + loss
            if _scaler(its) is not None:  # then the step is called without the closure
                hybrid.observe_loss(loss)
            return loss

        module.optimizer_step(epoch, batch_idx, optimizer, closure)
        self._window, self._stepped = None, True

    def _after_batch(self, outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        if not self._stepped and isinstance(loss, Tensor):
            self._window = loss if self._window is None else self._window + loss
        self._stepped = False

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips inside the step, where it is by the global norm."""
        if find(optimizer) is not None and gradient_clip_algorithm in (None, "norm"):
            clip_inside(optimizer, gradient_clip_val)
            return
        module: Any = super()
        module.configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Files of weights alone are of the verified ones, too."""
        its: Any = self
        for optimizer in _optimizers(its.trainer):
            optimizer.eval()
        module: Any = super()
        module.on_save_checkpoint(checkpoint)

    def hybrid_step(self, loss: Tensor, optimizer: Any = None, scheduler: Any = None) -> None:
        """Manual optimization: backward pass, step, and the Predict steps that follow it.

        Args:
            loss: Of the batch, with its graph.
            optimizer: One of ``self.optimizers()``; None where there is one only.
            scheduler: Stepped after every step, predicted ones included; or None.
        """
        its: Any = self
        optimizer = its.optimizers() if optimizer is None else optimizer
        hybrid = unwrap(optimizer)
        its.manual_backward(loss)
        hybrid.observe_loss(loss.detach())
        while True:
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            if hybrid.needs_backward:
                return


def _optimizers(trainer: Any) -> list[HybridOptimizer]:
    return [found for optimizer in trainer.optimizers if (found := find(optimizer)) is not None]


def _scaler(module: Any) -> Any:
    return getattr(module.trainer.precision_plugin, "scaler", None)
