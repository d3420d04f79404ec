"""Hugging Face's Trainer, the real one, on a GPT-2 of a few thousand parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import assert_same_weights, fast_config, weights
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from triton_hybrid import HybridConfig, HybridOptimizer
from triton_hybrid.integrations.transformers import HybridCallback, HybridTrainer
from triton_hybrid.integrations.wrappers import find

ROWS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(0, 30, (24, 8), generator=torch.Generator().manual_seed(0))
]


def make_model(dropout: float = 0.1) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=31, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "max_steps": 30,
        "learning_rate": 1e-2, "logging_steps": 5, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "warmup_steps": 3,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**options, **changes})


class Seen(TrainerCallback):
    """Notes the batches of forward passes in training, and the weights that are evaluated."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[Tensor] = []
        self.losses: list[float] = []
        self.evaluated: list[list[Tensor]] = []
        self.model = model
        model.register_forward_hook(self.note, with_kwargs=True)

    def note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module.training:
            self.batches.append(kwargs["input_ids"])
            self.losses.append(float(output.loss.detach()))
        elif len(self.evaluated) < 20:
            self.evaluated.append([param.detach().clone() for param in module.parameters()])


def stepped(folder: Path, **changes: Any) -> tuple[HybridTrainer, Seen]:
    """A trainer in the stepped drive; other arguments are those of `arguments`."""
    model, hybrid = changes.pop("model", None), changes.pop("hybrid", fast_config(inline=False))
    model = make_model() if model is None else model
    seen = Seen(model)
    trainer = HybridTrainer(
        model, arguments(folder, **changes), train_dataset=ROWS, eval_dataset=ROWS[:8],
        hybrid=hybrid, callbacks=[seen],
    )  # fmt: skip
    return trainer, seen


def in_order(self: Any, dataset: Any) -> Any:
    return torch.utils.data.SequentialSampler(dataset)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stepped_skips_passes_and_keeps_batches(
    accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_get_train_sampler", in_order)
    trainer, seen = stepped(tmp_path, gradient_accumulation_steps=accumulation)
    trainer.train()
    optimizer = find(trainer.optimizer)
    assert optimizer is not None
    stats = optimizer.stats()
    assert stats.steps == 30
    assert stats.predicted_steps > 5
    assert len(seen.batches) == stats.gradient_evaluations * accumulation
    rows = torch.stack([row["input_ids"] for row in ROWS])
    expected = torch.cat([rows] * 12)[: 4 * len(seen.batches)]
    assert torch.equal(torch.cat(seen.batches), expected), "no batch is lost or seen twice"
    assert optimizer._settings.max_grad_norm == 1.0
    ledger = optimizer._binding.engine.read()  # type: ignore[union-attr]
    assert ledger["loss_count"] > 0
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["hybrid/saved_backward_passes"] == stats.predicted_steps * accumulation
    assert logs[-1]["hybrid/steps_per_phase/predict"] == stats.predicted_steps
    assert "hybrid/acceptance_rate" in logs[-1]
    assert all(2.0 < entry["loss"] < 4.5 for entry in logs)
    # The first log is of five steps with a gradient; micro-batches of a window are summed.
    first = sum(seen.losses[: 5 * accumulation]) / 5
    assert logs[0]["loss"] == pytest.approx(first, rel=1e-5)
    total = trainer.state.log_history[-1]["train_loss"]
    assert total == pytest.approx(sum(seen.losses) / stats.gradient_evaluations, rel=1e-5)


def test_stepped_is_the_loop_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: the trainer adds nothing and leaves nothing out."""
    monkeypatch.setattr(Trainer, "_get_train_sampler", in_order)
    trainer, _ = stepped(
        tmp_path, lr_scheduler_type="constant", warmup_steps=0, model=make_model(dropout=0)
    )
    trainer.train()

    model = make_model(dropout=0)
    decays = trainer.get_decay_parameter_names(model)
    named = dict(model.named_parameters())
    groups = [[named[n] for n in named if (n in decays) == kind] for kind in (True, False)]
    optimizer = HybridOptimizer(
        [{"params": group} for group in groups], lr=1e-2, weight_decay=0.0,
        hybrid=fast_config(inline=False), max_grad_norm=1.0,
    )  # fmt: skip

    def batches() -> Iterator[Tensor]:
        while True:
            for first in range(0, 24, 4):
                yield torch.stack([row["input_ids"] for row in ROWS[first : first + 4]])

    stream = batches()
    for _ in range(30):
        if optimizer.needs_backward:
            batch = next(stream)
            count = trainer._get_num_items_in_batch([{"labels": batch}], batch.device)
            loss = model(batch, labels=batch, num_items_in_batch=count).loss
            loss.backward()
            optimizer.observe_loss(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    theirs = find(trainer.optimizer)
    assert theirs is not None
    optimizer.eval()  # as the trainer does in the end
    assert optimizer.phase is theirs.phase
    assert_same_weights(weights_of(model), weights_of(trainer.model))


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "stepped"])
@pytest.mark.parametrize(("stop", "anew"), [(7, False), (10, True), (11, False), (12, True)])
def test_resumes_bit_for_bit(stop: int, anew: bool, inline: bool, tmp_path: Path) -> None:
    """Shuffled data, dropout, in the middle of epochs and of predictions; callbacks made anew."""
    options = {
        "save_strategy": "steps", "save_steps": stop, "hybrid": fast_config(inline=inline),
        "max_steps": 20, "restore_callback_states_from_checkpoint": anew,
    }  # fmt: skip
    whole, seen = stepped(tmp_path / "a", **options)
    whole.train()
    again, part = stepped(tmp_path / "b", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    for left, right in zip(part.batches[::-1], seen.batches[::-1]):
        assert torch.equal(left, right)
    assert_same_weights(weights(whole.optimizer), weights(again.optimizer))
    ours, theirs = find(whole.optimizer), find(again.optimizer)
    assert ours is not None
    assert theirs is not None
    assert ours.stats().predicted_steps == theirs.stats().predicted_steps > 3
    assert len(part.batches) == 20 - stop if inline else len(part.batches) < 20 - stop


def test_saved_and_evaluated_weights_are_verified(tmp_path: Path) -> None:
    trainer, seen = stepped(
        tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=2,
        max_steps=14,
    )  # fmt: skip
    verified: dict[int, list[Tensor]] = {}

    class After(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = find(kwargs["optimizer"])
            assert optimizer is not None
            with optimizer.verified_weights():
                verified[state.global_step] = weights_of(trainer.model)

    trainer.add_callback(After)
    trainer.train()
    apart = 0
    for step, expected in verified.items():
        model = GPT2LMHeadModel.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert_same_weights(weights_of(model), expected)
        apart += step > 1 and all(map(torch.equal, expected, verified[step - 1]))
    assert apart > 2  # steps that predicted, and left the verified weights where they were
    assert_same_weights(seen.evaluated[3], verified[8])


def weights_of(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_plain_trainer_with_the_callback(accumulation: int, tmp_path: Path) -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=fast_config())
    observed: list[float] = []
    observe = optimizer.observe_loss
    optimizer.observe_loss = lambda loss: (observed.append(float(loss)), observe(loss))  # type: ignore[method-assign,assignment]
    args = arguments(
        tmp_path, gradient_accumulation_steps=accumulation, logging_steps=1, max_steps=12
    )
    trainer = Trainer(
        model, args, train_dataset=ROWS, optimizers=(optimizer, None), callbacks=[HybridCallback()]
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logs] == pytest.approx(observed, rel=1e-4)
    assert logs[-1]["hybrid/gradient_evaluations"] == 12
    assert "hybrid/saved_backward_passes" not in logs[-1]
    assert optimizer.stats().predicted_steps > 3
    before = weights_of(model)
    with optimizer.verified_weights():
        assert_same_weights(weights_of(model), before)


def test_each_training_has_the_arguments_of_its_time(tmp_path: Path) -> None:
    """A search sets other ones for each trial; all had the rates of the first."""
    trainer = HybridTrainer(
        args=arguments(tmp_path, max_steps=3, lr_scheduler_type="constant"),
        train_dataset=ROWS,
        model_init=lambda: make_model(),
        hybrid=fast_config(inline=False),
    )
    for lr, beta1, eps, limit in ((1e-2, 0.9, 1e-8, 1.0), (1e-4, 0.5, 1e-6, 0.1)):
        its = trainer.args
        its.learning_rate, its.adam_beta1, its.adam_epsilon = lr, beta1, eps
        its.max_grad_norm = limit
        trainer.train()
        optimizer = find(trainer.optimizer)
        assert optimizer is not None
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["eps"]) == (lr, (beta1, 0.999), eps)
        assert optimizer._settings.max_grad_norm == limit
        assert not optimizer.hybrid.inline


class Stop(TrainerCallback):
    """Ends a training by an exception, once, in the middle of a window."""

    armed = True

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.armed and state.global_step == 2:
            self.armed = False
            raise RuntimeError("stopped")


def test_a_training_after_one_that_was_stopped_hears_its_own_losses(tmp_path: Path) -> None:
    """The hook stayed on the old model, and the old window's losses in the first mean."""
    heard: list[float] = []

    class Listening(HybridOptimizer):
        def observe_loss(self, loss: Any) -> None:
            heard.append(float(loss))
            super().observe_loss(loss)

    options = {"lr": 1e-2, "hybrid": fast_config()}
    trainer = Trainer(
        args=arguments(tmp_path, gradient_accumulation_steps=3, logging_steps=1, max_steps=6),
        train_dataset=ROWS,
        model_init=lambda: make_model(),
        optimizer_cls_and_kwargs=(Listening, options),
        callbacks=[HybridCallback(), Stop()],
    )
    with pytest.raises(RuntimeError, match="stopped"):
        trainer.train()
    heard.clear()
    trainer.train()
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert heard == pytest.approx(logs, rel=1e-4)


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, _ = stepped(
        tmp_path, report_to=["tensorboard"], max_steps=15, include_num_input_tokens_seen="all"
    )
    trainer.train()
    (events,) = tmp_path.rglob("events.out*")
    found = EventAccumulator(str(events)).Reload()
    assert any("hybrid/predicted_steps" in tag for tag in found.Tags()["scalars"])


def test_with_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(make_model(), config)
    trainer = HybridTrainer(
        model, arguments(tmp_path, label_names=["labels"]), train_dataset=ROWS,
        hybrid=fast_config(inline=False),
    )  # fmt: skip
    before = [param.detach().clone() for param in model.parameters() if not param.requires_grad]
    trainer.train()
    after = [param.detach() for param in model.parameters() if not param.requires_grad]
    assert_same_weights(before, after)
    optimizer = find(trainer.optimizer)
    assert optimizer is not None
    assert optimizer.stats().predicted_steps > 5


def test_other_optimizers_are_left_alone(tmp_path: Path) -> None:
    model = make_model()
    seen = Seen(model)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    args = arguments(tmp_path, max_steps=6)
    trainer = HybridTrainer(model, args, train_dataset=ROWS, optimizers=(adamw, None))
    trainer.train()
    assert len(seen.batches) == 6
    assert "grad_norm" in trainer.state.log_history[0]


def test_the_position_in_the_data_is_part_of_the_checkpoint(tmp_path: Path) -> None:
    trainer, seen = stepped(tmp_path, save_strategy="steps", save_steps=12, max_steps=12)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["HybridCallback"]["attributes"]
    assert saved == {"batches": len(seen.batches)}


def test_the_documented_stepped_trainer(tmp_path: Path) -> None:
    model, args, rows = make_model(), arguments(tmp_path), ROWS
    # docs: begin stepped trainer
    trainer = HybridTrainer(
        model,
        args,
        train_dataset=rows,
        hybrid=HybridConfig(inline=False, warmup_steps=5),
    )
    trainer.train()
    # docs: end
    optimizer = find(trainer.optimizer)
    assert optimizer is not None
    assert optimizer.stats().predicted_steps > 0


def test_the_documented_plain_trainer(tmp_path: Path) -> None:
    model, args, rows = make_model(), arguments(tmp_path), ROWS
    # docs: begin plain trainer
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2)
    trainer = Trainer(
        model,
        args,
        train_dataset=rows,
        optimizers=(optimizer, None),
        callbacks=[HybridCallback()],
    )
    trainer.train()
    # docs: end
    assert optimizer.stats().gradient_evaluations == 30
