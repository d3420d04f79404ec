"""Trainers on two processes, the real ones: phases and replicas stay the same on both."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import test_lightning
import test_transformers
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import assert_same_on_all, of_all, run_on_ranks
from test_transformers import ROWS
from test_wrappers import loop
from torch.distributed.fsdp import fully_shard
from training import (
    assert_same_weights,
    backward,
    fast_config,
    make_batches,
    make_model,
    weights,
)
from transformers import Trainer

from triton_hybrid import HybridOptimizer
from triton_hybrid.integrations import wrappers
from triton_hybrid.integrations.transformers import HybridCallback
from triton_hybrid.shards import is_dtensor, local

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
FOLDER = Path()


def as_launched(rank: int, world: int) -> None:
    """What torchrun and ``accelerate launch`` tell a process; the group is there already."""
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    known |= {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": 0}
    known |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in known.items()})
    for state in (AcceleratorState, GradientState, PartialState):  # of the tests before
        state._reset_state()
    warnings.simplefilter("ignore")


class Phases:
    """An optimizer's phases before each step."""

    def __init__(self, optimizer: HybridOptimizer) -> None:
        self.seen: list[str] = []
        optimizer.register_step_pre_hook(lambda its, *_: self.seen.append(its.phase.value))


def result(optimizer: Any, phases: Phases) -> dict[str, Any]:
    """Of a run: phases, weights, what was observed and how often."""
    found = wrappers.unwrap(optimizer)
    stats = found.stats()
    assert stats.predicted_steps > 3
    assert found._binding.ranks.size == 2
    engine = found._binding.engine
    ledger = engine.read() if engine is not None else found._progress.ledger
    assert ledger["loss_count"] > 0
    return {
        "phases": phases.seen,
        "weights": weights(found),
        "ledger": ledger,
        "gradients": stats.gradient_evaluations,
    }


def hugging_face(rank: int, world: int) -> list[Any]:
    """`HybridTrainer` in the stepped drive: no row is lost, and it resumes bit for bit."""
    as_launched(rank, world)
    results = []
    for accumulation in (1, 2):
        changes: dict[str, Any] = {
            "gradient_accumulation_steps": accumulation,
            "per_device_train_batch_size": 2,  # 6 batches an epoch on each rank
            "save_strategy": "steps",
            "save_steps": 7,
            "max_steps": 20,
        }
        folder = FOLDER / str(accumulation)
        trainer, seen = test_transformers.stepped(folder, **changes)
        phases = Phases(wrappers.unwrap(trainer.create_optimizer()))
        trainer.train()
        run = result(trainer.optimizer, phases)
        assert len(seen.batches) == run["gradients"] * accumulation
        its = torch.stack(seen.batches[:12])
        both = [torch.zeros_like(its) for _ in range(world)]
        dist.all_gather(both, its)
        for epoch in torch.stack(both, 1).split(6):
            found = sorted(map(tuple, epoch.reshape(24, 8).tolist()))
            assert found == sorted(tuple(row["input_ids"].tolist()) for row in ROWS)
        results.append({**run, "logs": losses_of(trainer)})
        for step in (7, 14):
            other, _ = test_transformers.stepped(folder, **changes)
            other.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
            assert_same_weights(run["weights"], weights(wrappers.unwrap(other.optimizer)))
    return results


def plain_trainer(rank: int, world: int) -> dict[str, Any]:
    """Inline, with the callback: the ranks observe the loss that is logged."""
    as_launched(rank, world)
    model = test_transformers.make_model()
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=fast_config())
    observed: list[float] = []
    observe = optimizer.observe_loss
    optimizer.observe_loss = lambda loss: (observed.append(float(loss)), observe(loss))  # type: ignore[method-assign,assignment]
    phases = Phases(optimizer)
    args = test_transformers.arguments(FOLDER / "plain", max_steps=10, logging_steps=1)
    callbacks = [HybridCallback()]
    trainer = Trainer(
        model, args, train_dataset=ROWS, optimizers=(optimizer, None), callbacks=callbacks
    )
    trainer.train()
    mean = torch.tensor(observed)
    dist.all_reduce(mean)
    assert (mean / world).tolist() == pytest.approx(losses_of(trainer), rel=1e-4)
    return {**result(optimizer, phases), "logs": losses_of(trainer)}


def losses_of(trainer: Any) -> list[float]:
    """Rank 0 logs, and so does every other, means over all."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Watched(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.phases = Phases(wrappers.unwrap(trainer.optimizers[0]))


def lightning(rank: int, world: int) -> list[Any]:
    as_launched(rank, world)
    results = []
    for inline, manual, window in ((True, False, 1), (True, False, 3), (False, True, 1)):
        model = test_lightning.Model(inline, manual)
        watched = Watched()
        trainer = test_lightning.fit(
            model,
            FOLDER / "lightning",
            epochs=2 + 2 * window,
            devices=world,
            strategy="ddp",
            callbacks=[watched],
            accumulate_grad_batches=window,
            enable_checkpointing=False,
        )
        assert trainer.world_size == world
        results.append(result(trainer.optimizers[0], watched.phases))
    return results


class Sharded(test_lightning.Model):
    device_mesh: Any  # Lightning's

    def configure_model(self) -> None:
        for layer in self.net.children():
            if list(layer.parameters()):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def lightning_shards(rank: int, world: int) -> None:
    """``ModelParallelStrategy`` with FSDP2: phases and weights of ``ddp``."""
    as_launched(rank, world)
    strategies = {
        test_lightning.Model: lambda: "ddp",
        Sharded: lambda: ModelParallelStrategy(world, 1, process_group_backend="gloo"),
    }
    for inline in (True, False):
        runs = []
        for kind, strategy in strategies.items():
            watched = Watched()
            trainer = test_lightning.fit(
                kind(inline, not inline),
                FOLDER / "lightning",
                epochs=4,
                devices=world,
                strategy=strategy(),
                callbacks=[watched],
                enable_checkpointing=False,
            )
            run = result(trainer.optimizers[0], watched.phases)
            runs.append((run["phases"], [whole(param) for param in run["weights"]]))
        assert runs[0][0] == runs[1][0]
        torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-4, atol=1e-6)


def whole(tensor: Any) -> torch.Tensor:
    found: torch.Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
    return found


def accelerated(rank: int, world: int) -> list[Any]:
    as_launched(rank, world)
    results = []
    for inline in (True, False):
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == world
        model = make_model()
        optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=fast_config(inline=inline))
        phases = Phases(optimizer)
        model, wrapped = accelerator.prepare(model, optimizer)
        loop(model, wrapped, accelerator.backward, seed=rank)
        results.append(result(wrapped, phases))
    return results


def with_shards_on_cpus() -> None:
    """Accelerate shards on GPUs alone; what it does there works here, if it is told so."""
    make = AcceleratorState.__init__

    def made(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        make(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            known = {"device": torch.device("cpu"), "distributed_type": DistributedType.FSDP}
            PartialState._shared_state.update(known)
            vars(self).update(known, fsdp_plugin=fsdp_plugin)

    AcceleratorState.__init__ = made


def parts(optimizer: Any) -> list[torch.Tensor]:
    return [local(param.detach()).clone() for param in weights(optimizer)]


def shards(version: int, inline: bool) -> tuple[Accelerator, Any, Any]:
    """What accelerate makes of the model's parameters after the optimizer was made of them."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        reshard_after_forward=True if version == 2 else "FULL_SHARD",
        auto_wrap_policy="size_based_wrap",
        min_num_params=1,
        use_orig_params=None if version == 2 else True,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = make_model()
    config = fast_config(inline=inline)
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=config)
    return accelerator, *accelerator.prepare(model, optimizer)


def losses_in_loop(model: Any, optimizer: Any, run_backward: Any) -> list[float]:
    losses: list[float] = []

    def noted(loss: torch.Tensor) -> None:
        losses.append(float(loss))
        run_backward(loss)

    loop(model, optimizer, noted)
    return losses


def accelerated_shards(rank: int, world: int) -> list[Any]:
    """FSDP2 and FSDP1 as accelerate sets them up: phases and losses of one process."""
    as_launched(rank, world)
    with_shards_on_cpus()
    results = []
    for inline in (True, False):
        alone = make_model()
        config = fast_config(inline=inline)
        plain = HybridOptimizer(alone.parameters(), lr=1e-2, hybrid=config, process_group=False)
        expected, losses = Phases(plain), losses_in_loop(alone, plain, torch.Tensor.backward)
        for version in (2, 1):
            accelerator, model, wrapped = shards(version, inline)
            assert accelerator.distributed_type is DistributedType.FSDP
            phases = Phases(wrappers.unwrap(wrapped))
            found = losses_in_loop(model, wrapped, accelerator.backward)
            assert phases.seen == expected.seen
            assert found == pytest.approx(losses, rel=1e-5)
            assert sum(part.numel() for part in parts(wrappers.unwrap(wrapped))) < sum(
                param.numel() for param in alone.parameters()
            ), "it was cut"
            results.append([found, phases.seen])
    return results


def resumed_shards(rank: int, world: int) -> None:
    """Accelerate's checkpoints of FSDP2 go on bit for bit, in any phase.

    Those of FSDP1 do not on CPUs, nor does torch's AdamW: torch hands out the same memory twice.
    """
    as_launched(rank, world)
    for stop in (5, 6, 12):
        ends = []
        for resumed in (False, True):
            accelerator, model, optimizer = shards(2, False)
            source, folder = make_batches(), str(FOLDER / f"shards {stop}")
            if resumed:
                accelerator.load_state(folder)
                for _ in range(wrappers.stats(optimizer).gradient_evaluations):
                    next(source)
            for step in range(stop if resumed else 0, 25):
                if step == stop and not resumed:
                    accelerator.save_state(folder)
                if wrappers.needs_backward(optimizer):
                    backward(model, next(source))
                optimizer.step()
                optimizer.zero_grad()
            ends.append(parts(wrappers.unwrap(optimizer)))
        assert_same_weights(*ends)


def hugging_face_shards(rank: int, world: int) -> list[Any]:
    """`HybridTrainer` in the stepped drive with ``fsdp``; it resumes bit for bit."""
    as_launched(rank, world)
    sharded = {
        "version": 2,
        "reshard_after_forward": True,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["GPT2Block"],
        "state_dict_type": "SHARDED_STATE_DICT",
    }
    changes: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "fsdp": True,
        "fsdp_config": sharded,
        "save_strategy": "steps",
        "save_steps": 7,
        "max_steps": 20,
    }
    folder = FOLDER / "trainer's shards"
    trainer, _ = test_transformers.stepped(folder, **changes)
    phases = Phases(wrappers.unwrap(trainer.create_optimizer()))
    trainer.train()
    assert trainer.accelerator.distributed_type is DistributedType.FSDP
    end = parts(wrappers.unwrap(trainer.optimizer))
    for step in (7, 14):
        other, _ = test_transformers.stepped(folder, **changes)
        other.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert_same_weights(end, parts(wrappers.unwrap(other.optimizer)))
    run = result(trainer.optimizer, phases)
    return [run["phases"], run["ledger"], run["gradients"], losses_of(trainer)]


SCENARIOS = [
    hugging_face, plain_trainer, lightning, lightning_shards, accelerated, accelerated_shards,
    resumed_shards, hugging_face_shards,
]  # fmt: skip
"""The last one writes to the environment."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    global FOLDER  # the forked processes see it
    FOLDER = tmp_path_factory.mktemp("trainers")
    return run_on_ranks(2, SCENARIOS)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ranks_train_as_one(results: dict[str, list[Any]], scenario: Any) -> None:
    assert_same_on_all(of_all(results, scenario))
