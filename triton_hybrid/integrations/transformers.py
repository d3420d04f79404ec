"""Hugging Face ``Trainer``: a callback for the inline drive, a mixin for both.

With `HybridTrainer` in the stepped drive a Predict step draws no batch and runs no forward and no
backward pass. `HybridCallback` goes with any ``Trainer``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from triton_hybrid import HybridConfig, HybridOptimizer
from triton_hybrid.integrations.logging import PREFIX, as_dict
from triton_hybrid.integrations.wrappers import clip_inside, find

SKIPPED: dict[str, Any] = {}
"""Stands for a batch of a Predict step, which needs none; compared by identity."""


class HybridCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Logs what the optimizer does, lets it see the loss, and saves verified weights.

    It goes with a plain ``Trainer`` in the inline drive. The loss is taken from the model's output,
    where it has one (not with label smoothing or ``compute_loss_func``), and the mean of an
    accumulation window is observed. In checkpoints, and after training, the weights are the
    verified ones; a resumed run goes on from the prediction. `HybridTrainerMixin` brings its own.

    Attributes:
        batches: Batches that training has consumed.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.observes = True
        self._losses: list[Tensor] = []
        self._parts = False
        self._hook: Any = None

    def entries(self, args: Any, optimizer: HybridOptimizer) -> dict[str, float]:
        """What is logged: `as_dict`, and in the stepped drive the backward passes saved."""
        found = {k: float(v) for k, v in as_dict(optimizer).items() if not isinstance(v, str)}
        if not optimizer.hybrid.inline:
            passes = found[f"{PREFIX}predicted_steps"] * args.gradient_accumulation_steps
            found[f"{PREFIX}saved_backward_passes"] = passes
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the trainer keeps."""
        return {"args": {}, "attributes": {"batches": self.batches}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Goes on from the checkpoint's position in the data; looks for losses."""
        known = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        drawn = state.global_step * args.gradient_accumulation_steps
        self.batches = known["attributes"]["batches"] if isinstance(known, dict) else drawn
        state.stateful_callbacks[type(self).__name__] = self.state()
        self._stop_listening()  # to the model of a training that an exception has ended
        if self.observes:
            hook = kwargs["model"].register_forward_hook(self._note_loss, with_kwargs=True)
            self._hook = hook

    def _stop_listening(self) -> None:
        self._losses.clear()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the verified weights."""
        self._stop_listening()
        _to_verified(kwargs.get("optimizer"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Observes the mean loss of the window."""
        optimizer = find(kwargs.get("optimizer"))
        heard = self._losses and self.observes
        if heard and optimizer is not None and optimizer.needs_backward:
            losses = torch.stack(self._losses)
            # Parts of the mean over the tokens of all ranks, of which the optimizer takes the mean.
            ranks = args.world_size if args.average_tokens_across_devices else 1
            optimizer.observe_loss(losses.sum() * ranks if self._parts else losses.mean())
        self._losses.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the prediction aside where a checkpoint follows; training brings it back."""
        if control.should_save:
            _to_verified(kwargs.get("optimizer"))

    on_epoch_end = on_step_end

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the optimizer's numbers to the log of a training step."""
        optimizer, logs = find(kwargs.get("optimizer")), kwargs.get("logs")
        if optimizer is not None and logs is not None and "loss" in logs:
            found = self.entries(args, optimizer)
            for its in (logs, state.log_history[-1]):
                its.update(found)

    def _note_loss(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        loss = output.get("loss") if hasattr(output, "get") else None
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach().reshape(()))
            # One that is normalised by the window's count of tokens is a part of its mean.
            self._parts = kwargs.get("num_items_in_batch") is not None


class HybridTrainerMixin:
    """Makes a ``Trainer`` drive a HybridOptimizer as it wants to be driven.

    In the stepped drive (``HybridConfig(inline=False)``) a Predict step skips forward and backward
    pass and draws no batch: the next gradient gets it. The data goes on from epoch to epoch without
    a gap, so that the trainer's ``epoch`` counts steps, predicted ones included. Logged losses are
    those of real steps. In both drives the mean loss of an accumulation window is observed,
    ``max_grad_norm`` clips inside the step, and checkpoints hold the verified weights.

    Put it before the trainer: ``class MyTrainer(HybridTrainerMixin, Trainer)``. A `HybridCallback`
    is added.

    Args:
        hybrid: The optimizer's phases, where the trainer makes it; None: ``inline=False`` and the
            defaults. Its learning rate, betas, epsilon, and weight decay are the trainer's, as its
            ``args`` have them when it makes one.
        optimizer_options: Further options of an optimizer that the trainer makes.

    Raises:
        ValueError: DeepSpeed, which has an optimizer of its own.
    """

    def __init__(
        self,
        *args: Any,
        hybrid: HybridConfig | None = None,
        optimizer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        its: Any = self
        if its.is_deepspeed_enabled:
            raise ValueError("deepspeed: not supported, must be None: it has its own optimizer")
        self._options: dict[str, Any] | None = None  # of the optimizers that the trainer makes
        if its.optimizer is None and its.optimizer_cls_and_kwargs is None:
            config = HybridConfig(inline=False) if hybrid is None else hybrid
            self._options = {"hybrid": config, **(optimizer_options or {})}
            self._name_optimizer()
        if not any(isinstance(c, HybridCallback) for c in its.callback_handler.callbacks):
            its.add_callback(HybridCallback())
        self._stream: Iterator[Any] | None = None
        self._window: Tensor | None = None  # loss of the accumulation window so far
        self._taken = [0, 0]  # steps of this call of `train`, and those of them with a gradient
        self._logged = [0, 0]  # the same as of the last log

    @property
    def _callback(self) -> HybridCallback:
        """Looked up: a resumed trainer may make its callbacks anew."""
        known = getattr(self, "callback_handler").callbacks  # noqa: B009
        found: HybridCallback = next(c for c in known if isinstance(c, HybridCallback))
        found.observes = False  # the trainer itself knows the loss
        return found

    def _name_optimizer(self) -> None:
        """Tells the trainer what to make; a search sets other ``args`` for each of its trials."""
        its: Any = self
        if self._options is None:
            return
        options = {
            "lr": its.args.learning_rate,
            "betas": (its.args.adam_beta1, its.args.adam_beta2),
            "eps": its.args.adam_epsilon,
        }
        its.optimizer_cls_and_kwargs = HybridOptimizer, {**options, **self._options}

    # Everything below overrides Trainer's methods; their arguments are documented there.

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Clips inside the step instead of outside."""
        its: Any = self
        trainer: Any = super()
        self._name_optimizer()
        made = trainer.create_optimizer(*args, **kwargs)
        if find(made) is not None:
            clip_inside(made, its.args.max_grad_norm)
        return made

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._stream, self._window = None, None
        self._taken, self._logged = [0, 0], [0, 0]
        trainer: Any = super()
        return trainer._prepare_for_training(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> Any:
        """Batches of one step; none are drawn for a Predict step."""
        its: Any = self
        trainer: Any = super()
        optimizer = find(its.optimizer)
        real = optimizer is None or optimizer.needs_backward
        self._taken[0] += 1
        self._taken[1] += int(real)
        if optimizer is None or optimizer.hybrid.inline:
            return trainer.get_batch_samples(epoch_iterator, num_batches, device)
        if not real:
            return [SKIPPED] * num_batches, None
        self._stream = self._stream or self._batches()
        found = trainer.get_batch_samples(self._stream, num_batches, device)
        self._callback.batches += len(found[0])
        return found

    def _batches(self) -> Iterator[Any]:
        """All batches from where training is, epoch after epoch."""
        its: Any = self
        loader, drawn = its.callback_handler.train_dataloader, self._callback.batches
        sized = hasattr(loader, "__len__") and len(loader) > 0
        epoch, skip = divmod(drawn, len(loader)) if sized else (0, drawn)
        while True:
            if its.args.ignore_data_skip:
                skip = 0
            part = skip_first_batches(loader, skip) if skip else loader
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
            batches = iter(part)
            with torch.random.fork_rng(devices=[]):  # a resumed run begins it elsewhere
                batch = next(batches, None)
            if batch is None:
                return
            while batch is not None:
                yield batch
                batch = next(batches, None)
            epoch, skip = epoch + 1, 0

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward pass of a micro-batch; nothing in a Predict step."""
        its: Any = self
        optimizer = find(its.optimizer)
        if inputs is SKIPPED and optimizer is not None:
            optimizer.train()
            scaler = its.accelerator.scaler
            if scaler is not None:  # after a checkpoint it steps only once it has scaled something
                scaler.scale(torch.zeros((), device=its.args.device))
            return torch.zeros((), device=its.args.device)
        trainer: Any = super()
        loss: Tensor = trainer.training_step(model, inputs, *args, **kwargs)
        if optimizer is not None and optimizer.needs_backward:
            self._window = loss if self._window is None else self._window + loss
            if its.accelerator.sync_gradients:
                optimizer.observe_loss(self._window)
                self._window = None
        return loss

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if inputs is not SKIPPED:
            trainer: Any = super()
            trainer._track_num_input_tokens(inputs)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        its: Any = self
        trainer: Any = super()
        return None if find(its.optimizer) is not None else trainer._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        its: Any = self
        trainer: Any = super()
        optimizer = find(its.optimizer)
        if optimizer is not None and not optimizer.needs_backward:
            return None
        return trainer._get_grad_norm(model, grad_norm=grad_norm)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs the loss of real steps; leaves it out where there was none."""
        its: Any = self
        optimizer = find(its.optimizer)
        if "loss" in logs and optimizer is not None:
            steps, real = (now - then for now, then in zip(self._taken, self._logged))
            self._logged = list(self._taken)
            if real:
                logs["loss"] *= steps / real
            else:
                del logs["loss"]
            logs.update(self._callback.entries(its.args, optimizer))
        trainer: Any = super()
        trainer.log(logs, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        its: Any = self
        steps, real = self._taken
        its._tr_loss *= steps / max(real, 1)
        its._total_loss_scalar *= steps / max(real, 1)
        trainer: Any = super()
        return trainer._finalize_training(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        its: Any = self
        _to_verified(its.optimizer)
        trainer: Any = super()
        trainer._save_checkpoint(*args, **kwargs)


class HybridTrainer(HybridTrainerMixin, Trainer):  # type: ignore[misc]
    """``Trainer`` with `HybridTrainerMixin`: in the stepped drive unless ``hybrid`` says other."""


def _to_verified(optimizer: Any) -> None:
    """Puts a prediction aside until training goes on, which calls ``optimizer.train()``."""
    found = find(optimizer)
    if found is not None:
        found.eval()
