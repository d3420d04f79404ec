"""Lightning's Trainer, the real one, on a small network."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import assert_same_weights, fast_config, make_batches, make_model, weights

from triton_hybrid import HybridOptimizer, Phase
from triton_hybrid.integrations.lightning import HybridLightningMixin
from triton_hybrid.integrations.wrappers import find

BATCHES = [batch for batch, _ in zip(make_batches(), range(12))]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# docs: begin lightning
class Model(HybridLightningMixin, LightningModule):
    def __init__(self, inline: bool, manual: bool) -> None:
        super().__init__()
        self.net = make_model()
        self.inline = inline
        self.automatic_optimization = not manual

    def configure_optimizers(self) -> HybridOptimizer:
        config = fast_config(inline=self.inline)
        return HybridOptimizer(self.parameters(), lr=1e-2, hybrid=config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        if not self.automatic_optimization:
            self.hybrid_step(loss)  # skips passes where the optimizer predicts
        return loss

    # docs: end

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated = weights_of(self)


def weights_of(module: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in module.parameters()]


def fit(
    model: Model, folder: Path, epochs: int = 2, path: Path | None = None, **options: Any
) -> Any:
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        **{"devices": 1, "enable_checkpointing": "callbacks" in options, **options},
    )  # fmt: skip
    loader = DataLoader(BATCHES, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(model, loader, loader, ckpt_path=path, weights_only=False if path else None)
    return trainer


def reference(
    inline: bool, window: int = 1, **options: Any
) -> tuple[list[Tensor], HybridOptimizer]:
    """The loop of the documentation over the same batches."""
    model = make_model()
    optimizer = HybridOptimizer(
        model.parameters(), lr=1e-2, hybrid=fast_config(inline=inline), **options
    )
    stream = iter(BATCHES * 2)
    while True:
        if optimizer.needs_backward:
            parts = list(itertools.islice(stream, window))
            if len(parts) < window:
                optimizer.eval()  # as the trainer does in the end
                return weights_of(model), optimizer
            total = torch.zeros(())
            for x, y in parts:
                loss = nn.functional.cross_entropy(model(x), y) / window
                loss.backward()
                total = total + loss.detach()
            optimizer.observe_loss(total)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("window", [1, 3])
def test_automatic_inline_is_the_plain_loop(window: int, tmp_path: Path) -> None:
    model = Model(inline=True, manual=False)
    trainer = fit(model, tmp_path, accumulate_grad_batches=window)
    expected, optimizer = reference(inline=True, window=window)
    assert_same_weights(weights_of(model), expected)
    found = find(trainer.optimizers[0])
    assert found is not None
    assert found.stats().predicted_steps == optimizer.stats().predicted_steps > 0
    assert found._binding.engine is not None
    assert found._binding.engine.read()["loss_count"] > 0


class StopsInAWindow(Callback):  # type: ignore[misc]
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        trainer.should_stop = args[1] == 4


def test_another_fit_begins_with_a_window_of_its_own(tmp_path: Path) -> None:
    """Losses of a window that the last one had left open were in its first mean."""
    heard: list[list[float]] = []
    observe = HybridOptimizer.observe_loss
    model = Model(inline=True, manual=False)
    for callbacks in ([], [StopsInAWindow()], []):
        heard.append([])
        model.net.load_state_dict(make_model().state_dict())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                HybridOptimizer,
                "observe_loss",
                lambda its, loss: (heard[-1].append(float(loss)), observe(its, loss))[1],
            )
            fit(model, tmp_path, 1, accumulate_grad_batches=3, callbacks=callbacks)
    assert heard[2] == heard[0]
    assert heard[1] == heard[0][: len(heard[1])]


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "stepped"])
def test_manual_takes_every_batch_once(inline: bool, tmp_path: Path) -> None:
    model = Model(inline=inline, manual=True)
    trainer = fit(model, tmp_path)
    expected, optimizer = reference(inline)
    assert_same_weights(weights_of(model), expected)
    found = find(trainer.optimizers[0])
    assert found is not None
    assert found.stats().gradient_evaluations == 24
    assert found.stats().predicted_steps == optimizer.stats().predicted_steps > 5


def test_automatic_and_stepped_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"inline=False with automatic optimization.*hybrid_step"):
        fit(Model(inline=False, manual=False), tmp_path)


@pytest.mark.parametrize(("inline", "manual"), [(True, False), (False, True)])
def test_saves_verified_weights_and_resumes_bit_for_bit(
    inline: bool, manual: bool, tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    model = Model(inline, manual)
    whole = fit(model, tmp_path, epochs=3, callbacks=[keep])
    path = tmp_path / "epoch=0.ckpt"
    saved = torch.load(path, weights_only=False)
    entries = saved["optimizer_states"][0]["state"].values()
    assert all("predicted" in entry for entry in entries), "a prediction stood"
    again = Model(inline, manual)
    part = fit(again, tmp_path / "again", epochs=3, path=path)
    assert_same_weights(weights_of(model), weights_of(again))
    ours, theirs = find(whole.optimizers[0]), find(part.optimizers[0])
    assert ours is not None
    assert theirs is not None
    assert ours.phase is theirs.phase
    assert ours.stats().predicted_steps == theirs.stats().predicted_steps
    # Training ends at the verified weights, and these were validated and saved.
    assert_same_weights(model.validated, weights_of(model))
    last = torch.load(tmp_path / "epoch=2.ckpt", weights_only=False)["state_dict"]
    assert_same_weights(list(last.values()), weights_of(model))


def test_weights_alone_are_verified(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, save_weights_only=True, every_n_train_steps=8, save_top_k=-1)
    model = Model(inline=True, manual=False)
    fit(model, tmp_path, epochs=1, callbacks=[keep], limit_val_batches=0)
    (path,) = tmp_path.glob("*step=8.ckpt")
    saved = list(torch.load(path, weights_only=False)["state_dict"].values())
    plain = make_model()
    optimizer = HybridOptimizer(plain.parameters(), lr=1e-2, hybrid=fast_config())
    for x, y in BATCHES[:8]:
        optimizer.zero_grad()
        optimizer.step(closure_of(plain, x, y))
    predicted = weights(optimizer)
    assert optimizer.phase is Phase.CORRECT
    with optimizer.verified_weights():
        assert_same_weights(saved, weights(optimizer))
    assert not torch.equal(predicted[0], saved[0])


def closure_of(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def test_clipping_moves_inside(tmp_path: Path) -> None:
    model = Model(inline=True, manual=False)
    fit(model, tmp_path, gradient_clip_val=0.05)
    expected, _ = reference(inline=True, max_grad_norm=0.05)
    assert_same_weights(weights_of(model), expected)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual stepped"])
def test_with_a_grad_scaler(manual: bool, tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    model = Model(inline=not manual, manual=manual)
    trainer = fit(model, tmp_path, plugins=[plugin])
    found = find(trainer.optimizers[0])
    assert found is not None
    assert found.stats().predicted_steps > 5
    assert found.stats().gradient_evaluations == 24
    assert found._binding.engine is not None
    assert found._binding.engine.read()["loss_count"] > 0
    assert all(bool(weight.isfinite().all()) for weight in weights_of(model))


def test_other_optimizers_are_left_alone(tmp_path: Path) -> None:
    class Plain(Model):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Plain(inline=True, manual=False)
    before = weights_of(model)
    fit(model, tmp_path, gradient_clip_val=0.5)
    assert not torch.equal(before[0], weights_of(model)[0])
