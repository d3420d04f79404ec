"""The flags of the GPT-2 examples, and the options of a training run that they become."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from tyro import conf

from lib import flags
from lib.choices import OFFLOADS, PREDICTORS
from lib.gpt2_records import ADAMW, BASES, MUON
from lib.text_data import SMALLEST_VOCABULARY
from triton_hybrid import AccumulationConfig, HybridConfig

GPT2_VOCABULARY, TINY_VOCABULARY = 50_257, 4_096
# Of each size: layers, width, heads, and the longest sequence.
MODEL_SHAPES = {
    "tiny": (2, 128, 4, 256),
    "small": (12, 768, 12, 1024),
    "medium": (24, 1024, 16, 1024),
    "large": (36, 1280, 20, 1024),
    "xl": (48, 1600, 25, 1024),
}
# How many there must be with GPT-2's own vocabulary.
PARAMETERS = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080,
              "xl": 1_557_611_200}  # fmt: skip
# Flags that are not called as their fields.
FLAG_NAMES = {
    "learning_rate": "lr",
    "muon_learning_rate": "muon-lr",
    "baseline_implementation": "baseline-impl",
}
MODELS = flags.choice(tuple(MODEL_SHAPES))
COUNT, POSITIVE = flags.whole_number(1), flags.real_number(0, above=True)
Schedule = Literal["constant", "linear"]
QUICK = HybridConfig.quick_validation()


def phase_machine(*left_out: str) -> Any:
    """Returns the annotation of a field of HybridConfig whose own fields are flags.

    What a number may be is for HybridConfig to say, in `resolved`.

    Args:
        left_out: Fields that are no flags; ``inline`` never is.
    """
    types = {int: flags.flag_type(int, "whole numbers", "N"),
             float: flags.flag_type(float, "numbers", "X")}  # fmt: skip
    named = {"predictor": flags.choice(PREDICTORS), "offload": flags.choice(OFFLOADS)}
    hints = typing.get_type_hints(HybridConfig)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(HybridConfig):
        if field.init and field.name not in (*left_out, "inline"):
            kind = hints[field.name]
            more = named.get(field.name, types.get(kind))
            kind = Annotated[kind, conf.arg(help=f"HybridConfig.{field.name}."), more]
            default = dataclasses.field(default=getattr(QUICK, field.name))
            fields.append((field.name, kind, default))
    machine = dataclasses.make_dataclass("PhaseMachine", fields, frozen=True, kw_only=True)
    return conf.arg(constructor=machine, name="")


@dataclass(frozen=True, kw_only=True)
class Gpt2Flags:
    """The flags of all GPT-2 examples.

    Attributes:
        model: Size of GPT-2.
        batch: Sequences in a batch.
        length: Tokens in a sequence.
        weight_decay: Weight decay.
        dropout: Dropout everywhere in the model.
        device: Where to train; auto is a GPU where there is one, else the CPU.
        baseline_implementation: Which torch.optim.AdamW; default: as torch chooses when nothing
            is said.
        compile: Whether to torch.compile the model.
        threads: CPU threads; None: torch's choice.
        data: Text files and folders; none: the source of Python's standard library.
        tokenizer: Name or folder of a Hugging Face tokenizer; None: one is trained.
        vocabulary: Size of the tokenizer to train; None: 50,257, for tiny 4,096.
        held_out_windows: Sequences of held-out text to measure the loss on.
        output: Folder for results; MODEL and TIME in it stand for these.
        hybrid: The phase machine.
    """

    model: Annotated[str, MODELS] = "small"
    batch: Annotated[int, COUNT] = 4
    length: Annotated[int, flags.whole_number(2)] = 64
    weight_decay: Annotated[float, flags.real_number(0)] = 0.01
    dropout: Annotated[float, flags.real_number(0, 1)] = 0.0
    device: Annotated[torch.device, flags.device()] = dataclasses.field(
        default_factory=flags.default_device
    )
    baseline_implementation: Annotated[
        Literal["default", "fused", "foreach", "forloop"], conf.arg(name="baseline-impl")
    ] = "default"
    compile: Literal["yes", "no"] = "no"
    threads: Annotated[int | None, COUNT] = None
    data: tuple[Path, ...] = ()
    tokenizer: str | None = None
    vocabulary: Annotated[int | None, flags.whole_number(SMALLEST_VOCABULARY)] = None
    held_out_windows: Annotated[int, COUNT] = 128
    output: Path = Path("runs/gpt2_MODEL-TIME")
    hybrid: Annotated[HybridConfig, phase_machine()] = QUICK


@dataclass(frozen=True, kw_only=True)
class RuleFlags(Gpt2Flags):
    """The flags of the examples that choose HybridOptimizer's base rule and precision.

    Attributes:
        base: Base rule of HybridOptimizer; muon: Muon for hidden matrices and AdamW for the rest.
        muon_learning_rate: Learning rate of Muon's matrices; None: that of the rest, since Muon's
            updates are scaled to the size of AdamW's.
        schedule: Learning rate over the steps; linear goes to zero.
        precision: fp32: everything in FP32. fp16, bf16: HybridOptimizer trains a model cast to
            that type, with FP32 master weights inside the optimizer; AdamW, which has none, trains
            FP32 weights under torch.autocast of that type. The loss is not scaled, so fp16 may
            underflow.
    """

    base: Annotated[str, flags.choice(tuple(BASES))] = ADAMW
    muon_learning_rate: Annotated[float | None, POSITIVE, conf.arg(name="muon-lr")] = None
    schedule: Schedule = "constant"
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"


@dataclass(frozen=True, kw_only=True)
class Options(RuleFlags):
    """Everything a training run depends on.

    Attributes:
        steps: Calls of step() in each run.
        learning_rate: The (first) learning rate.
        accumulation: Batches whose gradients are accumulated for a step.
        adaptive: HybridOptimizer chooses how many of them each of its steps takes.
        drive: stepped: a predicted step is a step of the loop without forward and backward;
            inline: predicted steps happen inside step() and every call has a gradient.
    """

    steps: Annotated[int, COUNT] = 50
    learning_rate: Annotated[float, POSITIVE, conf.arg(name="lr")] = 6e-4
    accumulation: Annotated[int, COUNT] = 1
    adaptive: bool = False
    drive: Literal["stepped", "inline"] = "stepped"

    def windows(self) -> AccumulationConfig | None:
        """Returns how HybridOptimizer accumulates; None where it does not."""
        most = self.accumulation
        return AccumulationConfig(most, 1 if self.adaptive else most) if most > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Returns what decides the result, for JSON; the output folder does not."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["output"]
        plain = {"compile": self.compile == "yes", "device": str(self.device)}
        paths = [str(path) for path in self.data]
        return {**values, **plain, "data": paths, "hybrid": self.hybrid.to_dict()}


OptionsType = TypeVar("OptionsType", bound=Options)


def flag_name(field: str) -> str:
    """Returns the flag of a field."""
    return "--" + FLAG_NAMES.get(field, field).replace("_", "-")


def options_of(given: Gpt2Flags, **settings: Any) -> Options:
    """Returns the options of a training run: those of some flags, and settings beside them."""
    fields = {field.name for field in dataclasses.fields(Options)}
    known = {f.name: getattr(given, f.name) for f in dataclasses.fields(given) if f.name in fields}
    return resolved(Options(**{**known, **settings}))


def resolved(options: OptionsType) -> OptionsType:
    """Returns options with nothing left open; those that do not go together end the program."""
    *_, context = MODEL_SHAPES[options.model]
    if options.length > context:
        allowed = f"2 to {context} tokens for --model {options.model}"
        flags.refuse("--length", options.length, allowed)
    muon_rate, vocabulary = options.muon_learning_rate, options.vocabulary
    if muon_rate is not None and options.base != MUON:
        allowed = f"with --base {MUON} only, not --base {options.base}"
        flags.refuse("--muon-lr", f"{muon_rate:g}", allowed)
    if options.base == MUON and muon_rate is None:
        muon_rate = options.learning_rate
    if options.tokenizer is not None and vocabulary is not None:
        allowed = f"without --tokenizer {options.tokenizer}, which has its own"
        flags.refuse("--vocabulary", vocabulary, allowed)
    if vocabulary is None:
        vocabulary = TINY_VOCABULARY if options.model == "tiny" else GPT2_VOCABULARY
    if options.adaptive and options.accumulation == 1:
        flags.refuse("--adaptive", "without --accumulation", "with --accumulation 2 or more")
    for path in options.data:
        if not path.exists():
            flags.refuse("--data", path, "files and folders that exist")
    inline = options.drive == "inline"
    return dataclasses.replace(
        options,
        muon_learning_rate=muon_rate,
        vocabulary=vocabulary,
        output=flags.output_folder(options.output, MODEL=options.model),
        hybrid=hybrid_config(**{**vars(QUICK), **vars(options.hybrid), "inline": inline}),
    )


def hybrid_config(**values: Any) -> HybridConfig:
    """Returns a configuration; what it does not allow ends the program."""
    try:
        return HybridConfig(**values)
    except ValueError as error:
        named = next((field for field in values if str(error).startswith(field)), "")
        flags.refuse(flag_name(named), values.get(named), str(error).rpartition("must be ")[2])
