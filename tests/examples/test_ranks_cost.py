"""The benchmark of what it costs to decide together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks_cost
import torch
import torch.distributed as dist


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_step_and_sum_are_measured(tmp_path: Path) -> None:
    output, threads = tmp_path / "ranks.json", torch.get_num_threads()
    flags = ["--steps", "3", "--batch", "1", "--length", "8", "--output", str(output)]
    assert ranks_cost.main(flags) == 0
    torch.set_num_threads(threads)
    content = json.loads(output.read_text(encoding="utf-8"))
    assert content["ranks"] == 2
    for row in content["milliseconds"].values():
        assert 0 < row["agree"]["median"] < row["step"]["median"]
        assert 0 < row["share_of_a_step"] < 1
