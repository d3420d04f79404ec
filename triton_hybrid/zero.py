"""ZeroRedundancyOptimizer: it saves and loads past the optimizers of parts that it is made of."""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim.optimizer import Optimizer

from triton_hybrid.checkpoint import PROGRESS, check_checkpoint


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
                group[PROGRESS] = loaded.get(PROGRESS) or {}
            given = Optimizer.state_dict(its)
            check_checkpoint(given, its.param_groups)
            its._load_tensors(given, [group["base"] for group in its.param_groups])

    zero.register_state_dict_pre_hook(lay_out)
    zero.register_load_state_dict_post_hook(take)
