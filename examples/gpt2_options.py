"""The flags of ``gpt2_small.py``: what they are, what they allow, and what they become."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from flag_types import config_value, device_name, real_number, whole_number
from run_records import ADAMW, BASES, MUON
from text_data import SMALLEST_VOCABULARY

from triton_hybrid import HybridConfig

GPT2_VOCABULARY = 50_257
TINY_VOCABULARY = 4_096
LARGEST_SEED = 2**63 - 1

DESCRIPTION = """\
Trains GPT-2 from a random start twice, from the same seed on the same batches: once with
torch.optim.AdamW and once with HybridOptimizer, which predicts some of its steps instead of
computing a gradient for them. Prints a table of both, and of AdamW stopped after as many
gradients as HybridOptimizer used, and writes the same as JSON beside a plot of the loss.
With --base muon there is a third run: Muon without prediction.
"""

PRECISION_HELP = """\
fp32: everything in FP32. fp16, bf16: HybridOptimizer trains a model cast to that type, with FP32
master weights inside the optimizer; AdamW, which has none, trains FP32 weights under
torch.autocast of that type. The loss is not scaled, so fp16 may underflow"""


class ModelShape(NamedTuple):
    """Size of a GPT-2.

    Attributes:
        layers: Transformer blocks.
        width: Size of the hidden state.
        heads: Attention heads in a block.
        context: Longest sequence.
        parameters: How many there must be with the vocabulary of 50,257; None if unknown.
    """

    layers: int
    width: int
    heads: int
    context: int
    parameters: int | None


MODEL_SHAPES = {
    "tiny": ModelShape(2, 128, 4, 256, None),
    "small": ModelShape(12, 768, 12, 1024, 124_439_808),
    "medium": ModelShape(24, 1024, 16, 1024, 354_823_168),
    "large": ModelShape(36, 1280, 20, 1024, 774_030_080),
    "xl": ModelShape(48, 1600, 25, 1024, 1_557_611_200),
}


@dataclass(frozen=True)
class Options:
    """Everything a run of the example depends on.

    Attributes:
        model: Which size of GPT-2.
        steps: Calls of ``step()`` in each run.
        batch: Sequences in a batch.
        length: Tokens in a sequence.
        learning_rate: The (first) learning rate.
        base: Base rule of HybridOptimizer, "adamw" or "muon".
        muon_learning_rate: The (first) learning rate of Muon's matrices; None without Muon.
        weight_decay: Weight decay of both optimizers.
        dropout: Dropout everywhere in the model.
        schedule: "constant" or "linear" (to zero).
        device: Where to train.
        precision: "fp32", "fp16" or "bf16".
        drive: "stepped" or "inline".
        seeds: One pair of runs for each.
        only: "baseline", "hybrid" or None for both.
        controls: Whether the control is a run of its own.
        baseline_implementation: Which AdamW; "default" leaves the choice to torch.
        compile: Whether to compile the model.
        threads: CPU threads, or None for torch's choice.
        data: Files and folders of text; none for the standard library.
        tokenizer: A Hugging Face tokenizer, or None to train one.
        vocabulary: Size of the tokenizer to train.
        held_out_windows: How many windows held-out loss is measured on.
        output: Folder for the JSON and the plot.
        hybrid: The phase machine's configuration.
    """

    model: str
    steps: int
    batch: int
    length: int
    learning_rate: float
    base: str
    muon_learning_rate: float | None
    weight_decay: float
    dropout: float
    schedule: str
    device: torch.device
    precision: str
    drive: str
    seeds: tuple[int, ...]
    only: str | None
    controls: bool
    baseline_implementation: str
    compile: bool
    threads: int | None
    data: tuple[Path, ...]
    tokenizer: str | None
    vocabulary: int
    held_out_windows: int
    output: Path
    hybrid: HybridConfig

    def to_dict(self) -> dict[str, Any]:
        """Returns what decides the result, for the JSON file; the output folder does not."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["output"]
        values["device"] = str(self.device)
        values["data"] = [str(path) for path in self.data]
        values["hybrid"] = self.hybrid.to_dict()
        return values


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, allow_abbrev=False)

    def add(flag: str, **settings: Any) -> None:
        if settings.get("default") not in (None, []):
            settings["help"] += " (default: %(default)s)"
        parser.add_argument(flag, **settings)

    add("--model", choices=tuple(MODEL_SHAPES), default="small", help="size of GPT-2")
    add("--steps", type=whole_number(1), default=50, help="calls of step() in each run")
    add("--batch", type=whole_number(1), default=4, help="sequences in a batch")
    add("--length", type=whole_number(2), default=64, help="tokens in a sequence")
    add("--lr", type=real_number(0, open_below=True), default=6e-4, help="learning rate")
    add(
        "--base",
        choices=tuple(BASES),
        default=ADAMW,
        help="base rule of HybridOptimizer; muon: Muon for hidden matrices and AdamW for the "
        "rest, also trained without prediction, to tell the rule's share from prediction's",
    )
    add(
        "--muon-lr",
        type=real_number(0, open_below=True),
        help="learning rate of Muon's matrices; default: that of --lr, since Muon's updates are "
        "scaled to the size of AdamW's",
    )
    add("--weight-decay", type=real_number(0), default=0.01, help="weight decay")
    add("--dropout", type=real_number(0, 1), default=0.0, help="dropout everywhere in the model")
    add(
        "--schedule",
        choices=("constant", "linear"),
        default="constant",
        help="learning rate over the steps; linear goes to zero",
    )
    add(
        "--device",
        type=device_name,
        default="auto",
        help="auto is a GPU where there is one, else the CPU",
    )
    add("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help=PRECISION_HELP)
    add(
        "--drive",
        choices=("stepped", "inline"),
        default="stepped",
        help="stepped: a predicted step is a step of the loop without forward and backward; "
        "inline: predicted steps happen inside step() and every call has a gradient",
    )
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seed", type=whole_number(0, LARGEST_SEED), default=0, help="random seed (default: 0)"
    )
    seeds.add_argument(
        "--seeds", type=whole_number(0, LARGEST_SEED), nargs="+", help="several seeds, one by one"
    )
    add("--only", choices=("baseline", "hybrid"), help="leave the other run out")
    add(
        "--controls",
        action="store_true",
        help="train AdamW for exactly as many gradients as HybridOptimizer used in a run of its "
        "own, its schedule compressed to it; without this the control is the baseline on its way, "
        "which is the same thing for a constant learning rate",
    )
    add(
        "--baseline-impl",
        choices=("default", "fused", "foreach", "forloop"),
        default="default",
        help="which torch.optim.AdamW; default: as torch chooses when nothing is said",
    )
    add("--compile", choices=("yes", "no"), default="no", help="torch.compile the model")
    add("--threads", type=whole_number(1), help="CPU threads; default: torch's choice")
    add(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="text files and folders; default: the source of Python's standard library",
    )
    add("--tokenizer", metavar="NAME_OR_PATH", help="a Hugging Face tokenizer; default: train one")
    add(
        "--vocabulary",
        type=whole_number(SMALLEST_VOCABULARY),
        help=f"size of the tokenizer to train; default: {GPT2_VOCABULARY}, for tiny "
        f"{TINY_VOCABULARY}",
    )
    add(
        "--held-out-windows",
        type=whole_number(1),
        default=128,
        help="sequences of held-out text to measure the loss on",
    )
    add("--output", type=Path, help="folder for results; default: ./runs/gpt2_MODEL-TIME")
    _add_config_flags(parser)
    return parser


def _config_fields() -> list[dataclasses.Field[Any]]:
    """The fields of HybridConfig that are flags; ``inline`` is said with --drive."""
    return [
        field for field in dataclasses.fields(HybridConfig) if field.init and field.name != "inline"
    ]


def _add_config_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "HybridConfig", "the phase machine; the defaults are HybridConfig.quick_validation()"
    )
    annotations = typing.get_type_hints(HybridConfig)
    defaults = HybridConfig.quick_validation()
    for field in _config_fields():
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            type=config_value(annotations[field.name]),
            default=getattr(defaults, field.name),
            help=f"HybridConfig.{field.name} (default: %(default)s)",
            metavar="VALUE",
        )


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Reads the command line; a bad flag ends the program with a message that names it.

    Args:
        arguments: The flags; None for those of this process.

    Returns:
        The options.
    """
    parser = build_parser()
    values = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    context = MODEL_SHAPES[values.model].context
    if values.length > context:
        parser.error(
            f"argument --length: {values.length} is not possible; allowed: 2 to {context} tokens "
            f"for --model {values.model}"
        )
    if values.controls and values.only:
        parser.error(
            f"argument --controls: not possible with --only {values.only}, which leaves nothing "
            "to compare; allowed: without --only"
        )
    if values.muon_lr is not None and values.base != MUON:
        parser.error(
            f"argument --muon-lr: {values.muon_lr:g} is not possible with --base {values.base}, "
            f"which has no Muon; allowed: with --base {MUON}"
        )
    if values.base == MUON and values.muon_lr is None:
        values.muon_lr = values.lr
    if values.tokenizer is not None and values.vocabulary is not None:
        parser.error(
            f"argument --vocabulary: {values.vocabulary} is not possible with --tokenizer "
            f"{values.tokenizer}, which has its own; allowed: one of the two"
        )
    seeds = values.seeds or [values.seed]
    if len(set(seeds)) < len(seeds):
        parser.error(f"argument --seeds: {seeds} has one twice; allowed: different seeds")
    for path in values.data:
        if not path.exists():
            parser.error(f"argument --data: {path} does not exist; allowed: files and folders")
    output = values.output
    if output is None:
        output = Path("runs") / f"gpt2_{values.model}-{datetime.now():%Y%m%d-%H%M%S}"
    if output.exists() and not output.is_dir():
        parser.error(f"argument --output: {output} is a file; allowed: a folder, there or not")
    try:
        hybrid = HybridConfig(
            **{field.name: getattr(values, field.name) for field in _config_fields()},
            inline=values.drive == "inline",
        )
    except ValueError as error:
        flag = next((f.name for f in _config_fields() if f.name in str(error)), None)
        named = f"argument --{flag.replace('_', '-')}: " if flag else ""
        parser.error(f"{named}{error}")
    if values.vocabulary is None:
        values.vocabulary = TINY_VOCABULARY if values.model == "tiny" else GPT2_VOCABULARY
    return Options(
        model=values.model,
        steps=values.steps,
        batch=values.batch,
        length=values.length,
        learning_rate=values.lr,
        base=values.base,
        muon_learning_rate=values.muon_lr,
        weight_decay=values.weight_decay,
        dropout=values.dropout,
        schedule=values.schedule,
        device=values.device,
        precision=values.precision,
        drive=values.drive,
        seeds=tuple(seeds),
        only=values.only,
        controls=values.controls,
        baseline_implementation=values.baseline_impl,
        compile=values.compile == "yes",
        threads=values.threads,
        data=tuple(values.data),
        tokenizer=values.tokenizer,
        vocabulary=values.vocabulary,
        held_out_windows=values.held_out_windows,
        output=output,
        hybrid=hybrid,
    )
