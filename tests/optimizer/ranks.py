"""Several processes in one gloo group, started once, that run one scenario after another."""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from training import same_bits

Scenario = Callable[[int, int], Any]
"""Takes rank and number of ranks; what it returns must be made of tensors and plain values."""


def _as_rank(rank: int, folder: str, world: int, scenarios: Sequence[Scenario]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world)
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
    for scenario in scenarios:
        try:
            found = scenario(rank, world)
        except Exception:  # the others' results are still worth having
            found = traceback.format_exc()
        torch.save(found, os.path.join(folder, f"{scenario.__name__}-{rank}.pt"))
    dist.destroy_process_group()


def run_on_ranks(world: int, scenarios: Sequence[Scenario]) -> dict[str, list[Any]]:
    """What each scenario returns on each rank; the traceback where it raised."""
    # Forked, the processes have everything imported; a GPU in use forbids it.
    method = "spawn" if torch.cuda.is_available() else "fork"
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_as_rank, (folder, world, scenarios), world, start_method=method)  # type: ignore[no-untyped-call]
        return {
            scenario.__name__: [
                torch.load(Path(folder) / f"{scenario.__name__}-{rank}.pt") for rank in range(world)
            ]
            for scenario in scenarios
        }


def of_all(results: dict[str, list[Any]], scenario: Scenario) -> list[Any]:
    """A scenario's results, one for each rank; fails with the traceback of one that raised."""
    found = results[scenario.__name__]
    for rank, result in enumerate(found):
        assert not isinstance(result, str), f"rank {rank}:\n{result}"
    return found


def assert_same_on_all(found: Sequence[Any]) -> None:
    """Every rank has the same bits."""
    for rank, other in enumerate(found[1:], 1):
        _assert_same(found[0], other, f"rank {rank}")


def _assert_same(left: Any, right: Any, where: str) -> None:
    assert type(left) is type(right), where
    if isinstance(left, Tensor):
        assert same_bits(left.float(), right.float()), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            _assert_same(left[key], right[key], f"{where}, {key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right)):
            _assert_same(*pair, f"{where}, {index}")
    else:
        assert left == right or left != left, f"{where}: {left} != {right}"
