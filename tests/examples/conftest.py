"""Fixtures of the tests of examples and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# Some of what the extra `benchmarks` brings: without it there is nothing to test here.
PACKAGES = ("matplotlib", "psutil", "rich", "scipy", "sklearn", "tokenizers", "transformers",
            "tyro")  # fmt: skip
collect_ignore_glob = [] if all(map(find_spec, PACKAGES)) else ["test_*.py"]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[], object]], str]:
    """Calls what must end with exit status 2; returns its message as one line without borders."""

    def call(command: Callable[[], object]) -> str:
        with pytest.raises(SystemExit) as ended:
            command()
        assert ended.value.code == 2
        return " ".join(capsys.readouterr().err.replace("│", " ").split())

    return call


@pytest.fixture(autouse=True)
def _denormals_as_they_were() -> Iterator[None]:
    """`quiet.py` flushes them in its whole process, where tests of kernels may follow."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tokenizers are kept in this session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def own_cache(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps tokenizers apart from those of other programs, and threads as they were."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
