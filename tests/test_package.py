"""The package as it is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import triton_hybrid

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = (
    "import triton_hybrid, triton_hybrid.kernels.predict as p; "
    "print(triton_hybrid.__file__); print(p.__file__)"
)


def python(code: str, folder: Path, **environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.split()


def test_wheel_holds_kernels_and_types_and_runs_anywhere(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "-w", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("triton_hybrid-*.whl")
    unpacked = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(unpacked)
    sources = {path.relative_to(ROOT) for path in (ROOT / "triton_hybrid").rglob("*.py")}
    kernels = {path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    sources |= {"triton_hybrid" / path for path in kernels} | {Path("triton_hybrid/py.typed")}
    assert {str(path) for path in sources} <= names
    assert not any(name.startswith(("kernels/", "tests/", "examples/")) for name in names)
    for line in python(PROGRAM, tmp_path, PYTHONPATH=str(unpacked)):
        assert line.startswith(str(unpacked))


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests", Path("/")])
def test_checkout_imports_from_any_folder(folder: Path) -> None:
    for line in python(PROGRAM, folder, PYTHONPATH=str(ROOT)):
        assert line.startswith(str(ROOT))


def test_public_names() -> None:
    assert set(triton_hybrid.__all__) == {
        "AccumulationConfig", "HybridConfig", "HybridOptimizer", "HybridStats", "Phase",
        "needs_backward", "reshard", "split_param_groups",
    }  # fmt: skip
    assert all(hasattr(triton_hybrid, name) for name in triton_hybrid.__all__)


def test_version_is_the_projects() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version is not None
    assert triton_hybrid.__version__ == version.group(1)


def test_pinned_versions_satisfy_what_the_project_asks_for() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    for name in ("torch", "triton", "einops", "hypothesis", "pytest"):
        assert re.search(rf"^{name}==", pins, re.M), name
