"""Some runs of the golden record, where the machine is like the one that wrote it."""

from __future__ import annotations

import json

import golden
import pytest

RECORDED = json.loads(golden.RECORD.read_text())
# What is recorded without offload are the same bits (`test_offload`).
SAMPLE = [
    run for run in golden.runs() if run[2] in ("fp32", "bf16") and run[4:] == ("torch", "cpu")
]


@pytest.mark.skipif(
    RECORDED["surroundings"] != golden.surroundings(),
    reason=f"bits depend on the CPU and on versions: recorded with {RECORDED['surroundings']}",
)
@pytest.mark.parametrize("run", SAMPLE, ids=" ".join)
def test_bits_are_the_recorded_ones(run: golden.Run) -> None:
    assert not golden.compare(RECORDED["runs"], " ".join(run), golden.record(run))


def test_every_run_is_recorded() -> None:
    assert sorted(RECORDED["runs"]) == sorted(" ".join(run) for run in golden.runs())
