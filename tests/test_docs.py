"""What the documentation says is so: tables of bytes, code, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import compatibility
import pytest
import snippets
import torch
from torch import nn

from triton_hybrid import HybridConfig, HybridStats
from triton_hybrid.predictors import PREDICTORS
from triton_hybrid.rules import OPTIONS, RULES
from triton_hybrid.state import MASTER, REMAINDER, StateRow

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BF16 = torch.bfloat16


def item_bytes(base: str, predictor: str, *masters: StateRow) -> int:
    """Bytes a parameter of all declared rows; state is FP32 whatever the parameter."""
    rule, choice = RULES[base], PREDICTORS[predictor](HybridConfig())
    matrix, other = (
        _bytes_of((*rule.rows, *choice.rows_of_kind(rule, kind)), *masters)
        for kind in (True, False)
    )
    assert matrix == other, "whatever it takes a parameter for"
    return matrix


def _bytes_of(rows: tuple[StateRow, ...], *masters: StateRow) -> int:
    kept = [row for row in dict.fromkeys((*rows, *masters)) if row.saved]
    # What predictions lose of a weight that is moved in place; masters are not.
    kept = [row for row in kept if not (row.in_place and MASTER in masters)]
    return sum(row.itemsize(BF16, OPTIONS) for row in kept)


def table() -> Iterator[str]:
    """The table of ``docs/memory.md``, from the declared rows."""
    yield '| | FP32 | 16 bits, FP32 masters | `"split"` | `"none"` |'
    yield "| --- | --- | --- | --- | --- |"
    lines = {
        'AdamW, `predictor="none"`': ("adamw", "none"),
        '`"slow_ema"`': ("adamw", "slow_ema"),
        '`"secant"`, 10 pairs': ("adamw", "secant"),
        '`"linear"`': ("adamw", "linear"),
        '`"auto"`': ("adamw", "auto"),
        'Lion, `"none"`': ("lion", "none"),
        'Muon, `"none"`': ("muon", "none"),
        'Muon, `"auto"`': ("muon", "auto"),
    }
    for title, names in lines.items():
        columns = [item_bytes(*names, *masters) for masters in ((), (MASTER,), (REMAINDER,), ())]
        yield f"| {title} | {' | '.join(map(str, columns))} |"


def test_bytes_are_those_of_the_declared_rows() -> None:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    found = text.split("<!-- state table: begin -->\n")[1].split("<!-- state table: end -->")[0]
    assert found.splitlines() == list(table())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sizes = [item_bytes("adamw", name) for name in ("auto", "none", "slow_ema", "none")]
    words = r'(\d+) bytes of state a parameter in FP32, where AdamW has (\d+); `"slow_ema"` and'
    assert re.search(words, readme) is not None
    assert [int(n) for n in re.search(words, readme).groups()] == sizes[:2]  # type: ignore[union-attr]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_code_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert len(blocks) == 3
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layers(batch).square().mean()
            return out

    model = Model()
    loader = [torch.randn(3, 4) for _ in range(40)]
    scope = {"model": model, "loader": loader}
    for block in blocks:
        scope["loss"] = model(loader[0])
        exec(block, scope)


def test_quick_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "quickstart.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(block, scope)
    stats = scope["stats"]
    assert isinstance(stats, HybridStats)
    assert stats.gradient_evaluations < stats.steps == 200
    assert (tmp_path / "checkpoint.pt").exists()


def test_code_on_pages_is_that_of_tests() -> None:
    for page in PAGES:
        assert snippets.up_to_date(page) == page.read_text("utf-8"), page


def test_compatibility_table_is_up_to_date_and_its_tests_exist() -> None:
    assert compatibility.wrong() == []
    assert compatibility.up_to_date() == compatibility.PAGE.read_text("utf-8")
