"""The Gram form of Newton-Schulz: counted, and computed with rounded products."""

from __future__ import annotations

import json
from pathlib import Path

import gram_form
import pytest
import torch


@pytest.mark.parametrize("restarts", gram_form.RESTARTS.values(), ids=str)
@pytest.mark.parametrize("kind", gram_form.COEFFICIENTS)
def test_every_form_is_the_same_polynomial(kind: str, restarts: tuple[int, ...] | None) -> None:
    matrix = gram_form.drawn((12, 30), None, 0)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    for a, b, c in gram_form.COEFFICIENTS[kind]:
        s = a * s + b * s**3 + c * s**5
    found = gram_form.iterated(matrix, gram_form.COEFFICIENTS[kind], torch.float64, restarts)
    assert gram_form.worst_distance([found], [u @ s.diag() @ vh]) == pytest.approx(0.0, abs=1e-9)


def test_rounding_to_bf16_makes_small_singular_values_negative_and_large() -> None:
    matrix = gram_form.drawn((64, 128), 2.0, 0)
    exact = gram_form.iterated(matrix, gram_form.QUINTIC * 5, torch.float64, None)
    distances = [
        gram_form.worst_distance(
            [gram_form.iterated(matrix.float(), gram_form.QUINTIC * 5, torch.bfloat16, restarts)],
            [exact],
        )
        for restarts in gram_form.RESTARTS.values()
    ]
    direct, gram, one, two = (float("inf") if d is None else d for d in distances)
    assert max(direct, one, two) < 0.2 < 10.0 < gram


def test_flops_of_each_form() -> None:
    cube = 10**3
    assert gram_form.flops([(10, 40), (40, 10)], None) == 2 * 65 * cube
    assert gram_form.flops([(10, 40)], ()) == 29 * cube
    assert gram_form.flops([(10, 40)], (2,)) == 38 * cube
    assert gram_form.flops([(10, 20)], (2, 4)) == 29 * cube
    assert gram_form.flops([(10, 19)], ()) == gram_form.flops([(10, 19)], None)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_form, "SHAPES", ((4, 8),))
    output = tmp_path / "gram.json"
    assert gram_form.main(["--seeds", "0", "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    assert len(content["errors"]) == 3 * 2 * 4 * 3
    small = content["counts"][0]["flops"]
    assert small["Gram"] < small["Gram, restart at 2"] < small["direct"]
