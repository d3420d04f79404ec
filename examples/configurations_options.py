"""The flags of ``three_configurations.py``: its own, and those of ``gpt2_small.py`` behind it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flag_types import real_number, refuse_flags, whole_number
from gpt2_options import LARGEST_SEED, MODEL_SHAPES, Options
from gpt2_options import parse_options as parse_gpt2_options
from run_records import BASELINE, CONTROL, HYBRID

from triton_hybrid.config import OFFLOADS

MEMORY_OPTIMISED = "memory_optimised"
SIXTEEN_BIT = "baseline_16bit"
# The control is last: it needs to know how many gradients HybridOptimizer used.
CONFIGURATIONS = (BASELINE, HYBRID, MEMORY_OPTIMISED, SIXTEEN_BIT, CONTROL)
SIXTEEN_BIT_PARAMETERS = (MEMORY_OPTIMISED, SIXTEEN_BIT)
PRECISIONS = ("bf16", "fp16")
FORBIDDEN = {
    "--seed": "--seeds",
    "--base": "all configurations have AdamW as their rule",
    "--muon-lr": "all configurations have AdamW as their rule",
    "--drive": "the drive is stepped, as in the source",
    "--only": "all configurations are run",
    "--controls": "the control is always run",
}


class Preset(NamedTuple):
    """What a model size trains with where nothing is said.

    Attributes:
        steps: Calls of ``step()``.
        learning_rate: The first learning rate.
        schedule: "constant" or "linear".
    """

    steps: int
    learning_rate: float
    schedule: str


# The source's own run, and for the smallest model one in which AdamW's learning rate is tuned
# and decays to zero: over an AdamW whose rate is too low or never decays, gains are cheap.
SOURCE_PRESET = Preset(50, 6e-4, "constant")
PRESETS = {"tiny": Preset(200, 2e-3, "linear")}

DESCRIPTION = """\
Trains GPT-2 in three configurations from the same seeds on the same batches: torch.optim.AdamW in
FP32; HybridOptimizer with HybridConfig.quick_validation(), which is the source's run; and the same
with 16-bit parameters, FP32 masters, accumulated gradients and offloaded state. Beside them two
controls: AdamW for exactly as many gradients as HybridOptimizer used, its schedule compressed to
them; and AdamW with 16-bit parameters, FP32 masters and accumulated gradients, which shows what
these come to without any prediction. Prints a table with the source's figures beside these,
intervals and t-tests paired by seed, and writes a JSON file and a plot.
"""

EPILOG = """\
What is not listed here is as in gpt2_small.py and may be given: --batch, --length, --device,
--data, --baseline-impl, --held-out-windows, the fields of HybridConfig and so on (gpt2_small.py
--help). Finished runs are kept in the output folder; the same command again goes on from there.
"""


@dataclass(frozen=True)
class Plan:
    """Everything that the comparison depends on.

    Attributes:
        base: The flags of gpt2_small.py; FP32 and nothing offloaded.
        precision: Type of the 16-bit configurations' parameters, "bf16" or "fp16".
        accumulation: Micro-batches in each of their windows.
        offload: Where the memory-optimised one's state lives that AdamW does not have.
    """

    base: Options
    precision: str
    accumulation: int
    offload: str

    @property
    def loss_scale(self) -> str | None:
        """Loss scaling of the 16-bit configurations; only FP16 underflows without."""
        return "dynamic" if self.precision == "fp16" else None

    def options(self, configuration: str) -> Options:
        """Returns the flags of one configuration.

        Args:
            configuration: One of `CONFIGURATIONS`.
        """
        if configuration not in SIXTEEN_BIT_PARAMETERS:
            return self.base
        predicts = configuration == MEMORY_OPTIMISED
        change = {"offload": self.offload} if predicts else {"predictor": "none"}
        config = dataclasses.replace(self.base.hybrid, **change)
        return dataclasses.replace(self.base, precision=self.precision, hybrid=config)

    def micro_batches(self, configuration: str) -> int:
        """Returns into how many parts a configuration divides each batch.

        Args:
            configuration: One of `CONFIGURATIONS`.
        """
        return self.accumulation if configuration in SIXTEEN_BIT_PARAMETERS else 1

    def loss_scale_of(self, configuration: str) -> str | None:
        """Returns the loss scaling of a configuration.

        Args:
            configuration: One of `CONFIGURATIONS`.
        """
        return self.loss_scale if configuration in SIXTEEN_BIT_PARAMETERS else None

    def settings(self, configuration: str) -> dict[str, Any]:
        """Returns what decides a configuration's runs, beside seed and surroundings.

        Args:
            configuration: One of `CONFIGURATIONS`.
        """
        options = self.options(configuration).to_dict()
        for name in ("seeds", "only", "controls"):
            del options[name]
        return {
            **options,
            "micro_batches": self.micro_batches(configuration),
            "loss_scale": self.loss_scale_of(configuration),
        }


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags that are not those of gpt2_small.py."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    tiny = PRESETS["tiny"]
    parser.add_argument(
        "--model",
        choices=tuple(MODEL_SHAPES),
        default="tiny",
        help="size of GPT-2 (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=whole_number(1),
        help=f"calls of step() in each run (default: {tiny.steps} for tiny, else the source's "
        f"{SOURCE_PRESET.steps})",
    )
    parser.add_argument(
        "--lr",
        type=real_number(0, open_below=True),
        help=f"learning rate (default: {tiny.learning_rate:g} for tiny, where AdamW was tuned, "
        f"else the source's {SOURCE_PRESET.learning_rate:g})",
    )
    parser.add_argument(
        "--schedule",
        choices=("constant", "linear"),
        help=f"learning rate over the steps (default: {tiny.schedule} for tiny, else the source's "
        f"{SOURCE_PRESET.schedule})",
    )
    parser.add_argument(
        "--seeds",
        type=whole_number(0, LARGEST_SEED),
        nargs="+",
        default=[0, 1, 2],
        help="random seeds (default: 0 1 2)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="bf16",
        help="parameters of the 16-bit configurations; fp16 comes with dynamic loss "
        "scaling (default: %(default)s)",
    )
    parser.add_argument(
        "--accumulation",
        type=whole_number(1),
        default=4,
        help="micro-batches that these accumulate; a batch is divided, so that every configuration "
        "has equally many tokens a step (default: %(default)s)",
    )
    parser.add_argument(
        "--offload",
        choices=OFFLOADS,
        default="cpu",
        help="where the memory-optimised one's state lives that AdamW does not have "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=whole_number(1),
        help="CPU threads (default: 1 for tiny, which is too small to share, else torch's choice)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for results and finished runs (default: ./runs/three_configurations_MODEL)",
    )
    return parser


def parse_options(arguments: Sequence[str] | None = None) -> Plan:
    """Reads the command line; a bad flag ends the program with a message that names it.

    Args:
        arguments: The flags; None for those of this process.

    Returns:
        What to compare.
    """
    parser = build_parser()
    values, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    refuse_flags(parser, rest, FORBIDDEN)
    preset = PRESETS.get(values.model, SOURCE_PRESET)
    steps = preset.steps if values.steps is None else values.steps
    rate = preset.learning_rate if values.lr is None else values.lr
    threads = 1 if values.threads is None and values.model == "tiny" else values.threads
    output = values.output or Path("runs") / f"three_configurations_{values.model}"
    # What gpt2_small.py checks is not checked again here.
    base = parse_gpt2_options(
        ["--model", values.model, "--steps", str(steps), "--lr", repr(rate),
         "--schedule", values.schedule or preset.schedule,
         "--seeds", *map(str, values.seeds), "--output", str(output),
         *(() if threads is None else ("--threads", str(threads))), *rest]
    )  # fmt: skip
    if base.batch % values.accumulation:
        divisors = [n for n in range(1, base.batch + 1) if base.batch % n == 0]
        parser.error(
            f"argument --accumulation: {values.accumulation} does not divide --batch "
            f"{base.batch}; allowed: {', '.join(map(str, divisors))}"
        )
    return Plan(base, values.precision, values.accumulation, values.offload)
