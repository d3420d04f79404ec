"""Test-wide settings: where kernels run, and how many examples Hypothesis draws."""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from quick_interpreter import patch_language_once_a_launch

# Without a GPU the kernels run in Triton's interpreter, which must be chosen before the
# first import of triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    patch_language_once_a_launch()

# The tensors of the tests are tiny: threads would only wait for each other.
torch.set_num_threads(1)

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=8,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=_SLOW,
)
settings.register_profile("dev", deadline=None, max_examples=20, suppress_health_check=_SLOW)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_configure(config: pytest.Config) -> None:
    """Infinities and NaNs are drawn on purpose; numpy's interpreter need not mention them."""
    for module in ("triton.runtime.interpreter", "numpy"):
        config.addinivalue_line("filterwarnings", f"ignore::RuntimeWarning:{module}")


LONGEST = (
    "test_sharded", "test_gpu_suite", "test_distributed", "test_promises", "test_frontier_quick",
    "test_graphs", "test_fsdp1", "test_offload", "test_trainers_ranks", "test_optimizer",
    "test_launches", "test_gpt2_small", "test_scale", "test_auto", "test_soak", "test_audit",
)  # fmt: skip
"""Files that take over 15 s."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files go to processes: with the longest first, all end at the same time."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage need look at it again.

    With all files imported they took 31 of the 79 s of three of them.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Extensions complain of what is still there at the end."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tensors live: the GPU if there is one, else the CPU and the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some Python files to train on."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(40):
        lines = [f"def function_{index}_{line}(x):\n    return x * {line}\n" for line in range(30)]
        (folder / f"module_{index}.py").write_text("\n".join(lines), encoding="utf-8")
    return folder
