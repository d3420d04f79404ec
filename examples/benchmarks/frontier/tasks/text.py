"""Language models: `lm` from scratch on program text, `finetune` from there on English prose."""

from __future__ import annotations

import hashlib
import importlib
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from frontier.tasks.base import Batch, Task, draw
from lib.files import replacing
from lib.text_data import cache_folder, held_out_windows, is_held_out, load_corpus

BYTES = 256
PARAGRAPHS = re.compile(r"\n{2,}")
QUICK_WINDOWS = WINDOWS_AT_ONCE = 64

PRETRAINING_STEPS, PRETRAINING_RATE = 400, 4e-3
PRETRAINING_BATCH, PRETRAINING_SEED = 16, 0


class Text(NamedTuple):
    """Bytes to train on and bytes held out, and where they are from."""

    training: Tensor
    held_out: Tensor
    description: str
    digest: str = ""


class Block(nn.Module):
    """A transformer block with normalisation first, as in GPT-2.

    Query, key and value are one matrix, for speed; Muon orthogonalises it as one. GPT-2 scales
    the weights that write into the residual stream by the number of `layers`.
    """

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        for linear in (self.query_key_value, self.attention_out, self.widen, self.narrow):
            writes = linear is self.attention_out or linear is self.narrow
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * layers) if writes else 0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, length, width) to the same shape."""
        batch, length, width = x.shape
        split = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden = functional.gelu(self.widen(self.feed_forward_norm(x)))
        out: Tensor = x + self.narrow(hidden)
        return out


class Transformer(nn.Module):
    """A decoder-only transformer over bytes; the output layer is the embedding, transposed."""

    def __init__(self, layers: int, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(length, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, layers) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens (batch, length) to logits (batch, length, 256)."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.embedding.weight)


@dataclass(frozen=True)
class LanguageModel(Task):
    """Next byte of the source code of Python's standard library.

    The defaults are 0.37M parameters and 1,024 tokens a step; layers=12, width=768, heads=12,
    length=1024 is GPT-2 small, over bytes.
    """

    layers: int = 3
    width: int = 96  # of the residual stream, a multiple of `heads`
    heads: int = 3
    batch_size: int = 16  # windows a step
    length: int = 64  # tokens in a window
    windows: int = 256  # held out, always the same; the first 64 for curves

    name: ClassVar[str] = "lm"
    weight_decay: ClassVar[float] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"width={self.width!r}: must be a multiple of heads={self.heads}")

    def new_model(self) -> nn.Module:
        return Transformer(self.layers, self.width, self.heads, self.length)

    def text(self) -> Text:
        """Returns what it is trained and judged on."""
        return program_text()

    def batch(self, seed: int, index: int) -> Batch:
        training = self.text().training
        starts = draw(seed, index, len(training) - self.length, (self.batch_size, 1))
        windows = training[starts + torch.arange(self.length + 1)].long().to(self.device)
        return windows[:, :-1], windows[:, 1:]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = batch
        return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def held_out(self, model: nn.Module, quick: bool = False) -> float:
        windows = held_out_windows(self.text().held_out, self.windows, self.length + 1)
        windows = windows[: QUICK_WINDOWS if quick else None].to(self.device)
        total = 0.0
        for part in torch.split(windows, WINDOWS_AT_ONCE):
            total += float(self.loss(model, (part[:, :-1], part[:, 1:]))) * len(part)
        return total / len(windows)

    def data(self) -> str:
        text = self.text()
        sizes = f"{len(text.training):,} bytes, {len(text.held_out):,} held out"
        return f"{text.description}: {sizes}"


@dataclass(frozen=True)
class FineTuning(LanguageModel):
    """An `lm` checkpoint, continued on English prose.

    The checkpoint is trained once, by one fixed recipe (AdamW, 400 steps of 16 windows, peak
    rate 4e-3, linear decay, seed 0), and kept in the user's cache folder. The prose is the
    Python language reference: the documentation topics of `help()`, in the module
    ``pydoc_data.topics`` of the installed Python, which `lm`'s own text leaves out. Topics are
    split into training and held-out by their names; as some quote others, a paragraph that is
    held out is taken out of the training text. The seed decides the order of the data alone.
    """

    name: ClassVar[str] = "finetune"
    learning_rates: ClassVar[tuple[float, ...]] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)

    def text(self) -> Text:
        return reference_text()

    def prepare(self) -> None:
        """Trains the checkpoint, unless it is there."""
        if self._checkpoint().is_file():
            return
        from frontier.training import Run, RunSpec  # which imports the tasks

        options = {name: getattr(self, name) for name in ("layers", "width", "heads", "length")}
        options["batch_size"] = PRETRAINING_BATCH
        recipe = PRETRAINING_RATE, PRETRAINING_STEPS, PRETRAINING_SEED, "linear"
        run = Run(RunSpec("lm", "adamw", *recipe, task_options=options))
        run.train()
        with replacing(self._checkpoint()) as part:
            torch.save(run.model.state_dict(), part)

    def new_model(self) -> nn.Module:
        self.prepare()
        model = super().new_model()
        model.load_state_dict(torch.load(self._checkpoint(), weights_only=True))
        return model

    def _checkpoint(self) -> Path:
        model = (self.layers, self.width, self.heads, self.length)
        recipe = (*model, PRETRAINING_STEPS, PRETRAINING_BATCH, PRETRAINING_SEED)
        text = f"{recipe} {PRETRAINING_RATE} {program_text().digest} {torch.__version__}"
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        return cache_folder() / f"frontier-lm-{key}.pt"


@lru_cache(maxsize=1)
def program_text() -> Text:
    """The source code of Python's standard library."""
    corpus = load_corpus()
    training, held_out = (
        _as_bytes([document.text for document in part])
        for part in (corpus.training, corpus.held_out)
    )
    return Text(training, held_out, corpus.description, corpus.digest())


@lru_cache(maxsize=1)
def reference_text() -> Text:
    """The topics of Python's `help()`; see `FineTuning`."""
    try:
        module = importlib.import_module("pydoc_data.topics")
    except ImportError as error:
        raise RuntimeError(
            "task 'finetune': this Python has no module pydoc_data.topics, whose text it needs"
        ) from error
    topics: dict[str, str] = module.topics
    held_out = [text for name, text in sorted(topics.items()) if is_held_out(name)]
    seen = {paragraph for text in held_out for paragraph in PARAGRAPHS.split(text)}
    training = []
    for name, text in sorted(topics.items()):
        if not is_held_out(name):
            kept = [part for part in PARAGRAPHS.split(text) if part not in seen]
            seen.update(kept)
            training.append("\n\n".join(kept))
    description = "Python's language reference, as in help()"
    return Text(_as_bytes(training), _as_bytes(held_out), description)


def _as_bytes(texts: list[str]) -> Tensor:
    joined = "\0".join(texts).encode("utf-8", errors="replace")
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)
