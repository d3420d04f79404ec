"""Checkpoints for torch's own optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from triton_hybrid.rules import RULES

KEPT = {
    "adamw": ("lr", "betas", "eps", "weight_decay", "maximize"),
    "muon": ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps",
             "adjust_lr_fn"),
}  # fmt: skip
"""Hyperparameters that torch's optimizer of a rule has, too."""
ROWS = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "muon": ("exp_avg",)}
"""Rows of state that it has, by our names."""
ALWAYS = ("params", "param_names", "initial_lr")
"""What groups have beside hyperparameters."""


def torch_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """What ``torch.optim.AdamW`` or ``torch.optim.Muon`` goes on from.

    It belongs beside verified weights: take both inside ``optimizer.verified_weights()``. Torch
    keeps moments in the parameter's dtype, and masters are left out.

    Args:
        optimizer: A HybridOptimizer whose groups are all of base ``"adamw"`` or all of ``"muon"``.

    Returns:
        A state dict with nothing in it that torch does not know; its tensors are the optimizer's.

    Raises:
        ValueError: Groups of both rules or of another one, or Muon's ``blocks``, which torch lacks.
    """
    state_dict = optimizer.state_dict()
    bases = {group["base"] for group in optimizer.param_groups}
    base = bases.pop() if len(bases) == 1 else f"all of {sorted(bases)}"
    if base not in KEPT:
        raise ValueError(f"base={base!r}: must be one of {tuple(KEPT)} in all groups")
    groups = []
    for group in state_dict["param_groups"]:
        blocks = group["blocks"]
        if base == "muon" and {1} != set(torch.tensor(blocks, device="cpu").flatten().tolist()):
            raise ValueError(f"blocks={blocks!r}: must be (1, 1), torch.optim.Muon has none")
        keys = (*ALWAYS, *KEPT[base])
        groups.append({key: group[key] for key in keys if key in group})
    theirs = {ours: name for name, ours in RULES[base].checkpoint_names.items()}
    state = {
        index: {theirs.get(name, name): entry[name] for name in ROWS[base] if name in entry}
        for index, entry in state_dict["state"].items()
        if isinstance(entry, dict) and any(isinstance(value, Tensor) for value in entry.values())
    }
    return {"state": state, "param_groups": groups}
