"""Real text for the examples, with no download: files, then tokens, then batches.

By default the text is the source code of the installed Python's standard library. It is there
on every machine, it is several megabytes of human-written text, and nobody has to fetch it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from lib.files import replacing

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end-of-text token

# Tests and generated tables are left out: a single generated file can be a large share of the
# held-out text, and the held-out loss then says nothing about the rest.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data",
                   "encodings", "__pycache__"}  # fmt: skip
HELD_OUT_BYTES = 26  # of 256 values of the hash's first byte: about a tenth of the files
HELD_OUT_SHARE = 0.1  # of each file, where there are too few files to split by file
HELD_OUT_SEED = 99  # one fixed set of held-out windows for every run and seed
ENCODING_CHUNK = 64  # files; the encodings of all files at once are hundreds of megabytes


class Document(NamedTuple):
    """A text file: its path relative to the folder it was found in, and what it holds."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Text in two parts that share no file, or no passage where files are too few.

    Attributes:
        description: Where the text comes from.
        split: "by file" or "by position".
        training: What the model learns from.
        held_out: What its loss is measured on.
    """

    description: str
    split: str
    training: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def digest(self) -> str:
        """Returns a hash of everything in it, to tell one corpus from another."""
        digest = hashlib.sha256()
        for part in (self.training, self.held_out):
            for piece in itertools.chain(*part):
                data = piece.encode("utf-8", errors="surrogatepass")
                digest.update(len(data).to_bytes(8, "little") + data)
            digest.update(b"end of part")
        return digest.hexdigest()


@dataclass(frozen=True)
class TokenizedText:
    """A corpus as token ids.

    Attributes:
        training: Token ids of the training text, one after the other.
        held_out: Token ids of the held-out text.
        vocabulary: How many token ids there are.
        end_of_text: Id of the token between files, or None where the tokenizer has none.
        description: Which tokenizer made it.
    """

    training: torch.Tensor
    held_out: torch.Tensor
    vocabulary: int
    end_of_text: int | None
    description: str

    def check_length(self, length: int) -> None:
        """Raises a ValueError where a part of the text is shorter than one window."""
        _number_of_starts(self.training, length, "training")
        _number_of_starts(self.held_out, length, "held-out")


def is_held_out(name: str) -> bool:
    """Says whether a file is held out: decided by its relative path and nothing else."""
    return hashlib.sha256(name.encode("utf-8", errors="surrogatepass")).digest()[0] < HELD_OUT_BYTES


def load_corpus(paths: Sequence[Path] = ()) -> Corpus:
    """Reads text and splits it into training and held-out.

    Args:
        paths: Files and folders to read. With none, Python's standard library.

    Raises:
        ValueError: A path does not exist, is not text, or there is no text at all.
    """
    if paths:
        documents = sorted(_read_paths(paths), key=lambda document: document.name)
        description = "files given with --data"
    else:
        documents = list(_read_standard_library(Path(sysconfig.get_paths()["stdlib"])))
        description = f"source of Python {platform.python_version()}'s standard library"
    documents = [document for document in documents if document.text]
    if not documents:
        where = ", ".join(map(str, paths)) or "the standard library"
        raise ValueError(f"--data {where}: no text found; allowed: text files and folders of them")

    held_out = tuple(document for document in documents if is_held_out(document.name))
    training = tuple(document for document in documents if not is_held_out(document.name))
    split = "by file"
    if not (training and held_out):
        # Too few files: the end of every file is held out.
        split = "by position"
        cuts = [int(len(document.text) * (1 - HELD_OUT_SHARE)) for document in documents]
        training = tuple(Document(d.name, d.text[:cut]) for d, cut in zip(documents, cuts))
        held_out = tuple(Document(d.name, d.text[cut:]) for d, cut in zip(documents, cuts))
    return Corpus(description, split, training, held_out)


def _read_standard_library(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIPPED_FOLDERS.intersection(relative.parts):
            yield Document(relative.as_posix(), path.read_text("utf-8", errors="ignore"))


def _read_paths(paths: Sequence[Path]) -> Iterator[Document]:
    """Reads files, and of folders every file that is neither hidden nor binary."""
    for path in paths:
        if not path.exists():
            raise ValueError(f"--data {path}: does not exist; allowed: text files and folders")
        if path.is_file():
            text = _read_text(path)
            if text is None:
                raise ValueError(f"--data {path}: not a text file; allowed: text files and folders")
            yield Document(path.name, text)
        for file in sorted(path.rglob("*")) if path.is_dir() else ():
            relative = file.relative_to(path)
            hidden = any(part.startswith(".") for part in relative.parts)
            text = _read_text(file) if file.is_file() and not hidden else None
            if text is not None:
                yield Document(relative.as_posix(), text)


def _read_text(path: Path) -> str | None:
    """Reads a file as UTF-8; None where it is binary."""
    data = path.read_bytes()
    if b"\0" in data[:8192]:
        return None
    return data.decode("utf-8", errors="ignore").replace("\r\n", "\n")


def cache_folder() -> Path:
    """Returns the folder for what is worth keeping from run to run."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification asks that a relative path be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "triton_hybrid"


def tokenize(corpus: Corpus, vocabulary: int, tokenizer: str | None = None) -> TokenizedText:
    """Turns a corpus into token ids.

    Args:
        corpus: The text.
        vocabulary: Size of the byte-level BPE trained on the training text.
        tokenizer: Name or path of a Hugging Face tokenizer to use instead.

    Raises:
        ValueError: The Hugging Face tokenizer cannot be loaded.
    """
    if tokenizer is None:
        encoder: Any = trained_tokenizer(corpus, vocabulary)
        end_of_text = encoder.token_to_id(END_OF_TEXT)
        description = f"byte-level BPE of {vocabulary:,} tokens trained on the training text"
    else:
        encoder = _hugging_face_tokenizer(tokenizer)
        end_of_text, vocabulary, description = encoder.eos_token_id, len(encoder), tokenizer

    def encode(documents: Sequence[Document]) -> torch.Tensor:
        ids: list[int] = []
        for start in range(0, len(documents), ENCODING_CHUNK):
            chunk = [document.text for document in documents[start : start + ENCODING_CHUNK]]
            if tokenizer is None:
                found = [encoding.ids for encoding in encoder.encode_batch(chunk)]
            else:
                # verbose=False: texts longer than the tokenizer's own model takes are fine here.
                found = encoder(chunk, add_special_tokens=False, verbose=False)["input_ids"]
            for encoded in found:
                ids.extend(encoded if end_of_text is None else (*encoded, end_of_text))
        return torch.tensor(ids, dtype=torch.int32)

    parts = encode(corpus.training), encode(corpus.held_out)
    return TokenizedText(*parts, vocabulary, end_of_text, description)


def trained_tokenizer(corpus: Corpus, vocabulary: int) -> Tokenizer:
    """Returns a byte-level BPE trained on the training text, from the cache if it is there."""
    depends_on = f"{corpus.digest()} {vocabulary} {tokenizers.__version__}"
    key = hashlib.sha256(depends_on.encode()).hexdigest()
    path = cache_folder() / f"byte-level-bpe-{vocabulary}-{key[:32]}.json"
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path))
        except Exception:  # `tokenizers` raises plain Exception for a file it cannot read
            path.unlink(missing_ok=True)
    encoder = Tokenizer(BPE())
    encoder.pre_tokenizer = ByteLevel(add_prefix_space=False)
    encoder.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=1,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    encoder.train_from_iterator((document.text for document in corpus.training), trainer)
    with replacing(path) as part:
        part.write_text(encoder.to_str(), encoding="utf-8")
    return encoder


def _hugging_face_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--tokenizer {name}: cannot be loaded ({str(error).splitlines()[0]}); allowed: the "
            "name or folder of a Hugging Face tokenizer"
        ) from error


class WindowSampler:
    """Draws batches of random windows; the k-th draw depends on the seed and k alone.

    Two runs with the same seed therefore see the same batch at the same gradient evaluation,
    however many steps either of them takes without one.

    Args:
        tokens: Token ids, on the CPU.
        batch: Windows in a batch.
        length: Tokens in a window.
        seed: Where the random sequence starts.
        device: Where the batches go.
    """

    def __init__(
        self, tokens: torch.Tensor, batch: int, length: int, seed: int, device: torch.device
    ) -> None:
        self._tokens, self._batch, self._device = tokens, batch, device
        self._within = torch.arange(length)
        self._starts = _number_of_starts(tokens, length, "training")
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> torch.Tensor:
        """Returns the next batch, of shape (batch, length)."""
        starts = torch.randint(self._starts, (self._batch, 1), generator=self._generator)
        return self._tokens[starts + self._within].long().to(self._device)


def held_out_windows(tokens: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Returns the fixed windows on which held-out loss is measured, of shape (count, length)."""
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    limit = _number_of_starts(tokens, length, "held-out")
    starts = torch.randint(limit, (count, 1), generator=generator)
    return tokens[starts + torch.arange(length)].long()


def _number_of_starts(tokens: torch.Tensor, length: int, part: str) -> int:
    if len(tokens) < length:
        raise ValueError(
            f"--length {length}: the {part} text has only {len(tokens)} tokens; allowed: at most "
            f"{len(tokens)}, or more text with --data"
        )
    return len(tokens) - length + 1
