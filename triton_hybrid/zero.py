"""ZeroRedundancyOptimizer: it saves and loads past the optimizers of parts that it is made of."""

from __future__ import annotations

import weakref
from typing import Any

from triton_hybrid.checkpoint import PROGRESS, check_checkpoint
from triton_hybrid.groups import every_parameter


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
            its._load_tensors(_state_dict(its), [group["base"] for group in its.param_groups])

    zero.register_state_dict_pre_hook(lay_out)
    zero.register_load_state_dict_post_hook(take)


def _state_dict(optimizer: Any) -> dict[str, Any]:
    """What a part was given, as a checkpoint of its own."""
    params = every_parameter(optimizer.param_groups)
    numbers = {param: number for number, param in enumerate(params)}
    groups = [
        {**group, "params": [numbers[param] for param in group["params"]]}
        for group in optimizer.param_groups
    ]
    state = {numbers[param]: dict(entry) for param, entry in optimizer.state.items() if entry}
    made = {"state": state, "param_groups": groups}
    check_checkpoint(made, optimizer.param_groups)
    return made
