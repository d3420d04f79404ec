"""Numbers of a run into TensorBoard, CSV files, flat dictionaries and a picture."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from training import fast_config, make_model, train

from triton_hybrid import HybridOptimizer
from triton_hybrid.integrations import logging


def make() -> HybridOptimizer:
    return HybridOptimizer(make_model().parameters(), lr=1e-2, hybrid=fast_config())


def test_flat_dictionary() -> None:
    optimizer = make()
    fresh = logging.as_dict(optimizer)
    assert "hybrid/acceptance_rate" not in fresh
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=fast_config())
    train(model, optimizer, 20)
    stats = optimizer.stats()
    flat = logging.as_dict(stats, prefix="")
    assert flat == logging.as_dict(optimizer, prefix="")
    assert flat["steps_per_phase/predict"] == stats.predicted_steps > 3
    assert flat["divergences/loss"] == stats.divergences["loss"]
    assert flat["acceptance_rate"] == stats.acceptance_rate
    assert flat["noise"] == 1 - stats.signal
    assert flat["predictor"] == "slow_ema"
    json.dumps(flat, allow_nan=False)


def test_csv_tensorboard_and_plot(tmp_path: Path) -> None:
    model = make_model()
    optimizer = HybridOptimizer(model.parameters(), lr=1e-2, hybrid=fast_config())
    table, picture = tmp_path / "run.csv", tmp_path / "run.png"
    with SummaryWriter(str(tmp_path / "board")) as writer:
        for step in range(0, 30, 3):
            loss = 3.0 - step / 30
            # docs: begin logging
            logging.to_csv(table, optimizer, step, loss=loss)
            logging.to_tensorboard(writer, optimizer, step)
            numbers = logging.as_dict(optimizer)  # for wandb.log(numbers, step)
            # docs: end
            assert numbers["hybrid/steps"] >= step
            train(model, optimizer, 3)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(0, 30, 3))
    assert rows[0]["acceptance_rate"] == ""
    assert float(rows[-1]["acceptance_rate"]) >= 0
    assert rows[-1]["gradient_evaluations"] == "27"
    found = EventAccumulator(str(tmp_path / "board")).Reload()
    (last,) = [e.value for e in found.Scalars("hybrid/gradient_evaluations") if e.step == 27]
    assert last == 27
    # docs: begin plot
    logging.plot_run(table, picture)
    # docs: end
    assert picture.stat().st_size > 10_000
    logging.plot_run(rows, tmp_path / "run.svg")
    drawn = (tmp_path / "run.svg").read_text()
    assert all(name in drawn for name in ("acceptance rate", "noise", "predict", "loss"))
    with pytest.raises(ValueError, match="other columns"):
        logging.to_csv(table, optimizer, 30)
    with pytest.raises(ValueError, match="run has 1 rows"):
        logging.plot_run(rows[:1], picture)


def test_neither_the_optimizer_nor_logging_needs_the_libraries() -> None:
    code = (
        "import sys, triton_hybrid\n"
        "assert 'triton_hybrid.integrations' not in sys.modules\n"
        "import triton_hybrid.integrations.logging\n"
        "names = ('transformers', 'accelerate', 'lightning', 'matplotlib', 'tensorboard')\n"
        "assert not [name for name in names if name in sys.modules]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
