"""Checkpoints written by version 0.1.0 go on here.

The fixture holds, for five runs of the golden record stopped on their way: parameters, state dict,
and phase. What they became there is not compared: predictions leave more tensors alone now.
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
    before = opt.stats()
    golden.advance(opt, case["steps"], case["steps"] + 20)
    after, saved, found = opt.stats(), case["state_dict"]["state"], opt.state_dict()["state"]
    assert after.steps - before.steps >= 20
    assert sum(after.divergences.values()) <= 3 + sum(before.divergences.values())
    for index, entry in saved.items():
        # A snapshot is kept only where a move cannot be computed again, a slow EMA not of matrices.
        gone = {"snapshot", *["slow_ema"] * ("direction" in found[index])}
        assert entry.keys() - OLD_ROWS - gone <= found[index].keys()
        assert all(bool(row.isfinite().all()) for row in found[index].values())
        gradients = 20 - after.predicted_steps + before.predicted_steps
        taken = float(found[index]["step"]) - float(entry["step"])
        assert gradients - 4 <= taken <= 20, "steps are counted on, but for skipped gradients"


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost(name: str) -> None:
    """Each row is there bit for bit, or what is kept of it now."""
    predictor, base, precision, drive, backend, _ = name.split()
    opt = golden.make_optimizer((predictor, base, precision, drive, backend, "none"))
    saved = CASES[name]["state_dict"]
    opt.load_state_dict(saved)
    for index, entry in opt.state_dict()["state"].items():
        old = saved["state"][index]
        for key in old.keys() - OLD_ROWS:
            kept = (
                entry[key][: len(old[key])] if key in ("prediction", "regression") else entry[key]
            )
            assert torch.equal(kept, old[key]), key
        if "gram" in old:
            slot = saved["param_groups"][0]["hybrid_progress"]["model"]["slot"]
            assert torch.equal(entry["displacement"], old[f"history_{slot}"])
