"""ZeroRedundancyOptimizer: it saves and loads past the optimizers of parts that it is made of."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from triton_hybrid.checkpoint import BOUND, PROGRESS, check_checkpoint


def join_checkpoints(optimizer: Any, zero: Any) -> None:
    """Lets the checkpoints of a ZeroRedundancyOptimizer hold all that those of its parts hold.

    Its groups are its own: phase, counters and ledger, which a part saves in its groups, would be
    lost. And it writes the state of a checkpoint into the part's state without a word to the part.

    Args:
        optimizer: The HybridOptimizer of a part.
        zero: What made it, or None.
    """
    if zero is None:
        return
    part = weakref.ref(optimizer)

    def lay_out(zero: Any) -> None:
        for group, saved in zip(zero.param_groups, zero._all_state_dicts[0]["param_groups"]):
            group[PROGRESS] = saved.get(PROGRESS, {})

    def take(zero: Any) -> None:
        its = part()
        if its is not None:
            for group, loaded in zip(its.param_groups, zero.param_groups):
                saved = loaded.get(PROGRESS) or {}
                # Places among the parameters of the part that was asked say nothing of others.
                group[PROGRESS] = {**saved, BOUND: -1} if saved else {}
            given = Optimizer.state_dict(its)
            check_checkpoint(given, its.param_groups)
            its._forget_swaps()
            its._load_tensors(given, [group["base"] for group in its.param_groups])
            its._unsent = True
            its.train()

    zero.register_state_dict_pre_hook(lay_out)
    zero.register_load_state_dict_post_hook(take)


@torch.no_grad()
def from_owners(zero: Any, own: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Takes the parameters of the other parts as their owners hold them now.

    All ranks ask together.

    Args:
        zero: The ZeroRedundancyOptimizer.
        own: The parameters of this rank's part.

    Returns:
        Each of the others with what it held before.
    """
    mine = {*map(id, own)}
    every = [param for group in zero.param_groups for param in group["params"]]
    before = [(param.detach(), param.detach().clone()) for param in every if id(param) not in mine]
    zero._sync_params()
    return before
