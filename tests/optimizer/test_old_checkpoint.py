"""Checkpoints written by version 0.1.0 go on as they would have there.

The fixture holds, for five runs of the golden record stopped on their way: parameters, state dict,
phase, and what weights and state were twenty steps later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden
import pytest
import torch

from triton_hybrid.checkpoint import OLD_ROWS

FIXTURE = torch.load(Path(__file__).parent / "data" / "checkpoints_0.1.0.pt", weights_only=True)
CASES = FIXTURE["cases"]


@pytest.mark.parametrize("name", CASES)
def test_goes_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case: dict[str, Any] = CASES[name]
    monkeypatch.setattr(golden.offload, "COPY_ON_CPU", True)
    predictor, base, precision, drive, backend, offload = name.split()
    opt = golden.make_optimizer((predictor, base, precision, drive, backend, offload))
    params = [param for group in opt.param_groups for param in group["params"]]
    with torch.no_grad():
        for param, saved in zip(params, case["params"], strict=True):
            param.copy_(saved)
    opt.load_state_dict(case["state_dict"])
    assert opt.phase.value == case["phase"]
    golden.advance(opt, case["steps"], case["steps"] + 20)
    found = golden.digests(opt, opt.state_dict())
    assert found["phases"] == case["after"]["phases"]
    if FIXTURE["surroundings"] == golden.surroundings():
        wrong = {key for key in found | case["after"] if found.get(key) != case["after"].get(key)}
        # The trajectory is kept in other rows.
        assert wrong <= OLD_ROWS | {"displacement", "ratio", "regression", "ledger"}
