"""What all four commands have in common: refusals, and progress where output is a file."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from gpt2_small import __file__ as gpt2_small

pytestmark = pytest.mark.usefixtures("own_cache")

# Of one flag alone what is allowed is tested in `test_examples_lib`.
REFUSED = {
    "gpt2_small": [
        ("--model tiny --length 257", "--length: 257"),
        ("--device cuda:99", "--device: 'cuda:99'"),
        ("--warmup-steps -1", "--warmup-steps: -1"),
        ("--predictor oracle", "--predictor: 'oracle'"),
        ("--seed 1 --seeds 2 3", "--seed and --seeds are not allowed together"),
        ("--data no/such/place", "--data: no/such/place"),
        ("--only hybrid --controls", "--controls: with --only hybrid"),
        ("--tokenizer x --vocabulary 300", "--vocabulary: 300"),
        ("--muon-lr 0.02", "--muon-lr: 0.02"),
        ("--output file.txt", "--output: file.txt"),
    ],
    "three_configurations": [
        ("--precision fp32", "invalid choice 'fp32' for argument '--precision'. Expected one of"),
        ("--accumulation 3", "--accumulation: 3 is not possible; allowed: 1, 2, 4, which divide"),
        ("--seed 1", "argument --seed: --seed is not possible; allowed: --seeds"),
        ("--full-steps 0", "argument --full-steps: 0 is not possible; allowed: "),
    ],
    "tune": [
        ("--lr 1", "argument --lr: --lr is not possible; allowed: it is swept: --learning-rates"),
        ("--drive=stepped", "argument --drive: --drive=stepped is not possible; allowed: the"),
        ("--confidence-thresholds 2", "confidence_threshold=2.0: must be in [0, 1]"),
        ("--heat-map learning_rate learning_rate", "--heat-map: 'learning_rate learning_rate' is"),
        ("--heat-map learning_rate", "--heat-map: learning_rate is not possible; allowed: two"),
        ("--length 9999", "argument --length: 9999 is not possible; allowed: 2 to 256 tokens"),
    ],
    "digits_cnn": [
        ("--batch 1098", "--batch: 1098 is not possible; allowed: 1 to 1097"),
        ("--interval 7 --budget 6", "--interval: 7 is not possible; allowed: 1 to 6"),
        ("--tuning-seeds 1 --seeds 1", "1 is not possible; allowed: others than the reported"),
        ("--lrs 1e-3 2e-3 3e-3", "--lrs: a choice of 3 rates is not possible; allowed: at least 4"),
        ("--lrs 1e-3 1e-3 2e-3 3e-3", "--lrs: '1e-3 1e-3 2e-3 3e-3' is not possible; allowed: one"),
        ("--data no/such/place", "--data no/such/place: no train-images"),
        ("--output file.txt", "--output: file.txt, a file, is not possible"),
    ],
}


@pytest.mark.parametrize(
    ("command", "bad", "message"),
    [(command, *case) for command, cases in REFUSED.items() for case in cases],
)
def test_bad_flags_are_refused_by_name(
    command: str,
    bad: str,
    message: str,
    refusal: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file.txt").touch()
    refused = refusal(lambda: import_module(command).main(bad.split()))
    assert message in refused
    allowed = ("allowed:", "Expected one of", "must be", "not allowed together", "Unrecognized")
    assert any(words in refused for words in allowed)


@pytest.mark.parametrize("command", ["gpt2_small", "three_configurations", "tune"])
def test_too_little_text_is_refused(command: str, tmp_path: Path, refusal: Any) -> None:
    main, text, output = import_module(command).main, tmp_path / "text", tmp_path / "out"
    text.mkdir()
    given = ["--data", str(text), "--output", str(output), "--vocabulary", "300"]
    assert f"error: --data {text}: no text found" in refusal(lambda: main(given))
    (text / "short.txt").write_text("too short", encoding="utf-8")
    message = refusal(lambda: main(given))
    assert "--length 64: the training text has only" in message
    assert "allowed: at most" in message
    assert not output.exists()


def test_runs_as_a_script_from_anywhere_and_shows_progress_in_a_file(
    text_folder: Path, tmp_path: Path
) -> None:
    flags = (
        "--model tiny --device cpu --threads 1 --batch 2 --length 16 --held-out-windows 4 "
        f"--vocabulary 300 --only baseline --steps 200 --output here --data {text_folder}"
    )
    path = tmp_path / "log.txt"
    with path.open("w") as log:
        command = [sys.executable, str(gpt2_small), *flags.split()]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while "of 200 steps" not in path.read_text() and time.monotonic() < until:
            time.sleep(0.05)
        assert process.poll() is None, "progress must show before the end, not at it"
        assert process.wait(timeout=120) == 0, path.read_text()
    finally:
        process.kill()
    assert '"complete": true' in (tmp_path / "here" / "results.json").read_text()
