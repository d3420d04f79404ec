"""The flags of ``digits_cnn.py``: what they are, what they allow, and what they become."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from digits_training import SCHEDULES, Recipe
from flag_types import real_number, whole_number

LARGEST_SEED = 2**63 - 1
FEWEST_RATES = 4

DESCRIPTION = """\
Trains a convolutional network of about 50,000 parameters on images of digits with torch's AdamW,
with HybridOptimizer in a conservative and in an aggressive configuration, and with both kinds of
Muon, without prediction and with it. Every optimizer gets the learning rate of one grid that
reaches the target accuracy soonest on validation images and seeds of their own; then the test
images and the reported seeds say how many gradient evaluations it needs. The control is AdamW
with as many gradients as the faster HybridOptimizer needed, its schedule compressed to them.
"""


class Defaults(NamedTuple):
    """What a data set asks for where no flag says otherwise.

    Attributes:
        budget: Gradient evaluations of a run.
        batch: Images in a batch.
        interval: Gradient evaluations between two measurements.
        target: The accuracy to reach.
        lrs: Learning rates to choose from.
    """

    budget: int
    batch: int
    interval: int
    target: float
    lrs: tuple[float, ...]


DIGITS = Defaults(200, 32, 2, 0.97, (4e-3, 5.6e-3, 8e-3, 1.12e-2, 1.6e-2))
MNIST = Defaults(2_000, 64, 20, 0.99, (5e-4, 1e-3, 2e-3, 4e-3, 8e-3))


@dataclass(frozen=True)
class Options:
    """Everything a run of the example depends on.

    Attributes:
        data: Folder of MNIST's files; None for scikit-learn's digits.
        recipe: What all runs have in common.
        seeds: The reported seeds.
        tuning_seeds: The seeds that learning rates are chosen on.
        learning_rates: The rates to choose from.
        threads: CPU threads.
        output: Folder for the JSON and the plot.
    """

    data: Path | None
    recipe: Recipe
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    threads: int
    output: Path

    def to_dict(self) -> dict[str, Any]:
        """Returns what decides the result, for the JSON file."""
        return {
            **dataclasses.asdict(self.recipe),
            "data": None if self.data is None else self.data.name,
            "seeds": self.seeds,
            "tuning_seeds": self.tuning_seeds,
            "learning_rates": self.learning_rates,
            "threads": self.threads,
        }


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Parses the flags; what is not allowed ends the program with a message that says what is.

    Args:
        arguments: The flags; None for those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="digits_cnn.py",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument

    def both(name: str) -> str:
        digits, mnist = (_shown(getattr(usual, name)) for usual in (DIGITS, MNIST))
        return f"(default: {digits} on digits, {mnist} on MNIST)"

    data_help = "folder of MNIST's four IDX files, plain or .gz (default: scikit-learn's digits)"
    add("--data", type=Path, metavar="FOLDER", help=data_help)
    seed = whole_number(0, LARGEST_SEED)
    add("--seeds", type=seed, nargs="+", default=[0, 1, 2], help="reported seeds (default: 0 1 2)")
    add(
        "--tuning-seeds",
        type=seed,
        nargs="+",
        default=[200, 201, 202],
        help="seeds that learning rates are chosen on (default: 200 201 202)",
    )
    add(
        "--lrs",
        type=real_number(0, open_below=True),
        nargs="+",
        help=f"learning rates to choose from, at least {FEWEST_RATES} {both('lrs')}",
    )
    add("--budget", type=whole_number(1), help=f"gradient evaluations of a run {both('budget')}")
    add("--batch", type=whole_number(1), help=f"images in a batch {both('batch')}")
    add(
        "--interval",
        type=whole_number(1),
        help=f"gradient evaluations between measurements of accuracy {both('interval')}",
    )
    add(
        "--target",
        type=real_number(0, 1, open_below=True),
        help=f"test accuracy to reach {both('target')}",
    )
    add(
        "--schedule",
        choices=SCHEDULES,
        default="linear",
        help="of every optimizer: to zero at the end of its budget, or constant (default: linear)",
    )
    # More threads would wait for each other: the network is too small for them.
    add("--threads", type=whole_number(1), default=1, help="CPU threads (default: 1)")
    add("--output", type=Path, help="folder for results; default: ./runs/digits_cnn-TIME")
    flags = parser.parse_args(arguments)
    usual = DIGITS if flags.data is None else MNIST
    usual = usual._replace(
        **{name: value for name in usual._fields if (value := getattr(flags, name)) is not None}
    )
    recipe = Recipe(usual.budget, usual.batch, usual.interval, usual.target, flags.schedule)
    for name, values in (
        ("--seeds", flags.seeds),
        ("--tuning-seeds", flags.tuning_seeds),
        ("--lrs", usual.lrs),
    ):
        if len(set(values)) < len(values):
            parser.error(
                f"argument {name}: {_shown(tuple(values))} repeats one; allowed: each one once"
            )
    shared = sorted(set(flags.seeds) & set(flags.tuning_seeds))
    if shared:
        parser.error(
            f"argument --tuning-seeds: {shared[0]} is among the reported seeds; allowed: others"
        )
    if len(usual.lrs) < FEWEST_RATES:
        parser.error(
            f"argument --lrs: {len(usual.lrs)} rates; allowed: at least {FEWEST_RATES}, or the "
            "baseline is not tuned"
        )
    if recipe.interval > recipe.budget:
        parser.error(
            f"argument --interval: {recipe.interval} is longer than a run; allowed: 1 to "
            f"{recipe.budget}"
        )
    output = flags.output
    if output is None:
        output = Path("runs") / f"digits_cnn-{datetime.now():%Y%m%d-%H%M%S}"
    if output.exists() and not output.is_dir():
        parser.error(f"argument --output: {output} is a file; allowed: a folder, there or not")
    return Options(
        data=flags.data,
        recipe=recipe,
        seeds=tuple(flags.seeds),
        tuning_seeds=tuple(flags.tuning_seeds),
        learning_rates=tuple(sorted(usual.lrs)),
        threads=flags.threads,
        output=output,
    )


def _shown(value: float | tuple[float, ...]) -> str:
    values = value if isinstance(value, tuple) else (value,)
    return " ".join(str(n) if isinstance(n, int) else f"{n:g}" for n in values)
