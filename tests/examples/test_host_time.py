"""The benchmark of host time."""

from __future__ import annotations

import json
from pathlib import Path

import host_time
import torch

from triton_hybrid import Phase


def test_every_optimizer_and_phase_is_measured(tmp_path: Path) -> None:
    output, threads = tmp_path / "host.json", torch.get_num_threads()
    assert host_time.main(["--tensors", "3", "--turns", "2", "--output", str(output)]) == 0
    torch.set_num_threads(threads)
    rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
    assert {row["gradients"] for row in rows} == {"kept", "moved"}
    assert {row["caches"] for row in rows} == {"cold", "warm"}
    phases: dict[str, set[str]] = {}
    for row in rows:
        phases.setdefault(row["optimizer"], set()).add(row["phase"])
        low, high = row["microseconds_quartiles"]
        assert 0 < row["microseconds_least"] <= high
        assert low <= row["microseconds_median"] <= high
    assert set(phases) == set(host_time.contenders())
    full = {Phase.FULL.value, host_time.CHECKS}
    for name, found in phases.items():
        if name.startswith("HybridOptimizer"):
            assert found == (full if "'none'" in name else full | {"predict", "correct"})
        else:
            assert found == {""}
