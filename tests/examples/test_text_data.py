"""Text for the examples: how it is split, tokenized, and drawn from."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
import torch

from lib import text_data

Patch = pytest.MonkeyPatch


def test_split_is_disjoint_and_depends_on_relative_paths_only(
    text_folder: Path, tmp_path: Path
) -> None:
    corpus = text_data.load_corpus([text_folder])
    training = {document.name for document in corpus.training}
    held_out = {document.name for document in corpus.held_out}
    assert corpus.split == "by file"
    assert training
    assert held_out
    assert not training & held_out
    assert len(training | held_out) == 40
    assert text_data.load_corpus([text_folder]) == corpus

    moved = tmp_path / "elsewhere"
    for document in (*corpus.training, *corpus.held_out):
        path = moved / document.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("other text", encoding="utf-8")
    again = text_data.load_corpus([moved])
    assert {document.name for document in again.held_out} == held_out
    assert again.digest() != corpus.digest()


def test_a_single_file_is_split_by_position(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("abcdefghij" * 100, encoding="utf-8")
    corpus = text_data.load_corpus([path])
    assert corpus.split == "by position"
    assert corpus.training[0].text + corpus.held_out[0].text == "abcdefghij" * 100
    assert len(corpus.held_out[0].text) == 100


def test_standard_library_without_tests_and_tables(tmp_path: Path, monkeypatch: Patch) -> None:
    skipped = ["site-packages/a.py", "test/b.py", "email/tests/c.py", "encodings/d.py"]
    for name in ["json/decoder.py", "os.py", "notes.txt", *skipped]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pass\n", encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = text_data.load_corpus()
    names = {document.name for document in (*corpus.training, *corpus.held_out)}
    assert names == {"json/decoder.py", "os.py"}


def test_binary_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("no", encoding="utf-8")
    (tmp_path / "picture.bin").write_bytes(b"\x00\x01")
    (tmp_path / "note.txt").write_text("yes " * 50, encoding="utf-8")
    corpus = text_data.load_corpus([tmp_path])
    assert {document.name for document in (*corpus.training, *corpus.held_out)} == {"note.txt"}
    with pytest.raises(ValueError, match=r"picture\.bin: not a text file"):
        text_data.load_corpus([tmp_path / "picture.bin"])


def test_tokenizer_is_trained_once_and_survives_a_broken_cache(
    text_folder: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    corpus = text_data.load_corpus([text_folder])
    first = text_data.tokenize(corpus, 300)
    assert first.training.dtype == torch.int32
    assert 0 <= int(first.training.min()) < int(first.training.max()) < 300
    (cached,) = (tmp_path / "triton_hybrid").iterdir()

    with monkeypatch.context() as context:
        context.setattr(text_data, "BpeTrainer", None)  # cannot be trained again
        second = text_data.tokenize(corpus, 300)
    assert torch.equal(first.training, second.training)

    cached.write_text("{ half a file", encoding="utf-8")
    third = text_data.tokenize(corpus, 300)
    assert torch.equal(first.held_out, third.held_out)
    assert json.loads(cached.read_text(encoding="utf-8"))


def test_tokens_turn_back_into_the_text(text_folder: Path) -> None:
    corpus = text_data.load_corpus([text_folder])
    encoder = text_data.trained_tokenizer(corpus, 300)
    text = corpus.held_out[0].text + " äöü 漢字"
    assert encoder.decode(encoder.encode(text).ids) == text


def test_draws_depend_on_seed_and_number_only() -> None:
    tokens = torch.arange(1000, dtype=torch.int32)

    def draws(seed: int) -> torch.Tensor:
        sampler = text_data.WindowSampler(tokens, 3, 8, seed, torch.device("cpu"))
        return torch.stack([sampler.draw() for _ in range(5)])

    assert torch.equal(draws(1), draws(1))
    assert not torch.equal(draws(1), draws(2))
    assert (draws(1).diff(dim=-1) == 1).all()
    with pytest.raises(ValueError, match="--length 1001"):
        text_data.WindowSampler(tokens, 3, 1001, 1, torch.device("cpu"))
