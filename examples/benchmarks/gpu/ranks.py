"""Section: training under NCCL, in a group of this one rank."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpu.context import Context
from gpu.promises import QUICK, guarded, training, unwatched_steps
from triton_hybrid import HybridConfig, HybridOptimizer
from triton_hybrid.distributed import Ranks

STEPS, WIDTH, ROWS = 40, 64, 32
APART = 1e-5  # relative, of weights: sums are added up in another order


def ranks(context: Context) -> None:
    """Trains under DDP and FSDP2 beside plain training, with every sum over the ranks made."""
    alone = trained(context, lambda model: model, False)
    with group_of_one(context):
        for name, wrap in WRAPPERS.items():
            run = partial(beside, wrap, alone)
            guarded(context, f"{name} trains as without", run)
        guarded(context, "no synchronisation, sums", partial(unwatched_steps, "slow_ema"))


@contextmanager
def group_of_one(context: Context) -> Iterator[None]:
    """A default group of this process, in which sums over the ranks are made as with several."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder, "store")), 1)  # type: ignore[attr-defined]
        backend = "nccl" if context.on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            with mock.patch.object(Ranks, "together", True):
                yield
        finally:
            dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    """Under FSDP2."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)
    return model


Wrap = Callable[[nn.Module], nn.Module]
WRAPPERS: dict[str, Wrap] = {"DDP": DistributedDataParallel, "FSDP2": sharded}


def trained(context: Context, wrap: Wrap, group: Any = None) -> tuple[list[Tensor], dict[str, int]]:
    """Weights after some training, and the steps of each phase."""
    config = HybridConfig(**QUICK, predictor="slow_ema")
    build = partial(HybridOptimizer, lr=1e-3, hybrid=config, process_group=group)
    *_, (_, optimizer) = training(context, build, STEPS, WIDTH, ROWS, wrap)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    whole = [getattr(param, "full_tensor", param.detach)() for param in params]
    return [each.detach().clone() for each in whole], optimizer.stats().steps_per_phase


def beside(
    wrap: Wrap,
    alone: tuple[list[Tensor], dict[str, int]],
    context: Context,
) -> tuple[bool, str]:
    """Compares weights and phases with those without a wrapper."""
    weights, phases = trained(context, wrap)
    theirs = torch.cat([each.flatten() for each in alone[0]])
    apart = torch.cat([each.flatten() for each in weights]) - theirs
    error = float(apart.norm() / theirs.norm())
    detail = f"{error:.1e} apart, phases {phases}, without {alone[1]}"
    return error <= APART and phases == alone[1], detail
