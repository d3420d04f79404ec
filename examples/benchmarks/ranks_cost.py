"""What it costs to decide together: the one small sum over the ranks at every gradient step.

    python examples/benchmarks/ranks_cost.py --output ranks.json

Trains the tiny GPT-2 under DistributedDataParallel on gloo, in processes with a thread each, and
times in every gradient step the whole step (forward, backward, gradients reduced, update) and the
sum that it begins with, its arguments and checks included: on the clock, where waiting for the
other rank counts too, and in processor time of the training thread, which others on the machine
disturb less. Text is random tokens: what is learnt does not matter here.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from lib.environment import environment
from lib.files import write_json
from lib.flags import parse, whole_number
from lib.gpt2_options import MODEL_SHAPES
from triton_hybrid import HybridOptimizer

VOCABULARY = 4096
WARM_UP = 5  # steps before, in which memory is allocated


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of this benchmark.

    Attributes:
        ranks: Processes.
        steps: Gradient steps that are timed.
        batch: Sequences a step on each rank.
        length: Tokens in each.
        output: JSON file to write.
    """

    ranks: Annotated[int, whole_number(2)] = 2
    steps: Annotated[int, whole_number(2)] = 60
    batch: Annotated[int, whole_number(1)] = 4
    length: Annotated[int, whole_number(1, 256)] = 64
    output: Path = Path("ranks_cost.json")


CLOCKS = {"clock": time.perf_counter, "processor": time.thread_time}


class Stopwatch:
    """Notes how long a function takes, on each of the clocks."""

    def __init__(self, work: Any) -> None:
        self.work = work
        self.taken: dict[str, list[float]] = {name: [] for name in CLOCKS}

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        started = {name: clock() for name, clock in CLOCKS.items()}
        result = self.work(*arguments)
        for name, clock in CLOCKS.items():
            self.taken[name].append(clock() - started[name])
        return result


def summary(taken: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    low, median, high = (round(1e3 * x, 4) for x in statistics.quantiles(taken, n=4))
    return {"median": median, "lower_quartile": low, "upper_quartile": high}


def train(rank: int, folder: str, flags: Flags) -> None:
    """One rank; the first writes down what it measured."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", flags.ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=flags.ranks)
    torch.manual_seed(0)
    shape = zip(("n_layer", "n_embd", "n_head", "n_positions"), MODEL_SHAPES["tiny"])
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, use_cache=False, **dict(shape)))
    parallel = DistributedDataParallel(model)
    optimizer = HybridOptimizer(model.parameters())
    ranks = optimizer._binding.ranks
    watch = ranks.agree = Stopwatch(ranks.agree)  # type: ignore[assignment,method-assign]
    generator = torch.Generator().manual_seed(rank)

    def step() -> None:
        tokens = torch.randint(VOCABULARY, (flags.batch, flags.length), generator=generator)
        loss = parallel(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.observe_loss(loss)
        optimizer.step()
        optimizer.zero_grad()

    whole = Stopwatch(step)
    for _ in range(WARM_UP + flags.steps):
        whole()
    if rank == 0:
        rows = {
            clock: {
                "step": summary(whole.taken[clock][WARM_UP:]),
                "agree": summary(watch.taken[clock][WARM_UP:]),
            }
            for clock in CLOCKS
        }
        torch.save(rows, f"{folder}/rows.pt")
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark with some flags, or those of this process."""
    flags: Flags = parse(Flags, arguments, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (folder, flags), nprocs=flags.ranks)  # type: ignore[attr-defined,no-untyped-call]
        rows = torch.load(f"{folder}/rows.pt")
    for row in rows.values():
        row["share_of_a_step"] = round(row["agree"]["median"] / row["step"]["median"], 5)
    torch.set_num_threads(1)
    content = {
        **environment(torch.device("cpu")),
        "load_average": os.getloadavg()[0],
        "ranks": flags.ranks,
        "tokens_per_rank": flags.batch * flags.length,
        "steps": flags.steps,
        "milliseconds": rows,
    }
    write_json(flags.output, content)
    for clock, row in rows.items():
        print(
            f"{clock}: a gradient step takes {row['step']['median']:.2f} ms (median), the sum "
            f"{row['agree']['median']:.3f} ms, {row['share_of_a_step']:.2%}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
