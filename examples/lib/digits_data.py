"""Images of handwritten digits with no download: scikit-learn's, or MNIST from a folder."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from lib.scikit_data import scikit_datasets

SPLIT_SEED = 99
CLASSES = 10
DIGITS_VALIDATION, DIGITS_TEST = 300, 400
MNIST_SIZE = 28
MNIST_VALIDATION = 5_000
# An IDX file starts with two zero bytes, the type of its numbers (8: unsigned bytes) and how many
# axes it has.
IMAGES_MAGIC, LABELS_MAGIC = 0x0803, 0x0801


# Images, grey values of shape (images, 1, rows, columns), and the digits they show.
Part = TensorDataset


@dataclass(frozen=True)
class Digits:
    """A data set in three parts that share no image.

    Attributes:
        training: What gradients are computed on.
        validation: What learning rates are chosen on.
        test: What results are measured on.
        description: What it is.
    """

    training: Part
    validation: Part
    test: Part
    description: str

    @property
    def size(self) -> int:
        """Rows and columns of an image."""
        return int(self.training.tensors[0].shape[-1])

    def digest(self) -> str:
        """Returns a checksum of all images and labels, in their order."""
        checksum = hashlib.sha256()
        for part in (self.training, self.validation, self.test):
            for tensor in part.tensors:
                checksum.update(tensor.numpy().tobytes())
        return checksum.hexdigest()


def load_digits(folder: Path | None) -> Digits:
    """Reads a data set and splits it, always in the same way.

    Args:
        folder: MNIST's four IDX files; None for scikit-learn's digits.

    Raises:
        ValueError: A file is missing, or not what it should be.
        RuntimeError: scikit-learn is not installed.
    """
    if folder is not None:
        images, test = _idx_pair(folder, "train"), _idx_pair(folder, "t10k")
        # Small sets, such as those of tests, keep most of their images for training.
        parts = _split(images, min(MNIST_VALIDATION, len(images) // 6))
        return _standardised(*parts, test, "MNIST, 28 x 28")
    features, classes = scikit_datasets().load_digits(return_X_y=True)
    pixels = torch.as_tensor(features, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    whole = Part(pixels, torch.as_tensor(classes, dtype=torch.int64))
    training, held_out = _split(whole, DIGITS_VALIDATION + DIGITS_TEST)
    validation, test = Part(*held_out[DIGITS_TEST:]), Part(*held_out[:DIGITS_TEST])
    return _standardised(training, validation, test, "scikit-learn digits, 8 x 8")


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzipped or not.

    Args:
        path: The file.
        magic: Its first four bytes, big end first; the last of them counts the axes.

    Raises:
        ValueError: It is another kind of file, or cut short, or too long.
    """
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{path}: damaged gzip file ({error}); allowed: a whole one"
            ) from error
    found, axes = int.from_bytes(content[:4], "big"), magic & 0xFF
    if len(content) < 4 or found != magic:
        raise ValueError(
            f"{path}: magic number 0x{found:08x}; allowed: 0x{magic:08x}, an IDX file of unsigned "
            f"bytes with {axes} axes"
        )
    start = 4 + 4 * axes
    if len(content) < start:
        raise ValueError(f"{path}: {len(content)} bytes; allowed: at least the {start} of a header")
    shape = tuple(int(length) for length in np.frombuffer(content[4:start], dtype=">u4"))
    # Python's integers: the product of wrong lengths would overflow numpy's.
    expected = start + math.prod(shape)
    if len(content) != expected:
        raise ValueError(
            f"{path}: {len(content)} bytes; allowed: {expected}, as its header says {shape}"
        )
    return np.frombuffer(content[start:], dtype=np.uint8).reshape(shape)


def _idx_pair(folder: Path, name: str) -> Part:
    images_path = _find(folder, f"{name}-images", "idx3-ubyte")
    labels_path = _find(folder, f"{name}-labels", "idx1-ubyte")
    images, labels = read_idx(images_path, IMAGES_MAGIC), read_idx(labels_path, LABELS_MAGIC)
    if images.shape[1:] != (MNIST_SIZE, MNIST_SIZE) or len(images) == 0:
        raise ValueError(
            f"{images_path}: shape {images.shape}; allowed: (images, {MNIST_SIZE}, {MNIST_SIZE})"
        )
    if len(images) != len(labels):
        raise ValueError(
            f"{labels_path}: {len(labels)} labels; allowed: {len(images)}, one for each image"
        )
    if labels.max() >= CLASSES:
        raise ValueError(f"{labels_path}: label {labels.max()}; allowed: 0 to {CLASSES - 1}")
    greys = torch.as_tensor(images.astype(np.float32) / 255).unsqueeze(1)
    return Part(greys, torch.as_tensor(labels.astype(np.int64)))


def _find(folder: Path, name: str, kind: str) -> Path:
    # Both spellings are about: with a dash before the kind, and with a dot.
    allowed = [f"{name}{dash}{kind}{suffix}" for dash in "-." for suffix in ("", ".gz")]
    for file in allowed:
        if (folder / file).is_file():
            return folder / file
    raise ValueError(f"--data {folder}: no {name}; allowed: a folder with {' or '.join(allowed)}")


def _split(part: Part, held_out: int) -> tuple[Part, Part]:
    """Returns what is left without some examples, and these, all in a random order."""
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return Part(*part[order[held_out:]]), Part(*part[order[:held_out]])


def _standardised(training: Part, validation: Part, test: Part, name: str) -> Digits:
    if min(len(training), len(validation), len(test)) == 0:
        raise ValueError(f"{name}: {len(training) + len(validation)} images; allowed: at least 6")
    # By the training part alone: the others are not to be known yet.
    mean, spread = training.tensors[0].mean(), training.tensors[0].std()
    if not spread > 0:
        raise ValueError(f"{name}: all grey values are {mean:g}; allowed: images that differ")
    description = (
        f"{name}: {len(training):,} training, {len(validation):,} validation and {len(test):,} "
        "test images"
    )

    def scaled(part: Part) -> Part:
        images, labels = part.tensors
        return Part((images - mean) / spread, labels)

    return Digits(scaled(training), scaled(validation), scaled(test), description)
