"""Hardware and versions that a result depends on, for the JSON files."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "triton_hybrid")


def environment(device: torch.device, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Describes hardware, versions and system.

    Args:
        device: Where it runs.
        packages: Whose versions count beside those of `PACKAGES`.
    """
    hardware: dict[str, Any] = {
        "processor": _processor(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware["gpu"] = properties.name
        hardware["gpu_memory_bytes"] = properties.total_memory
        hardware["gpu_capability"] = f"{properties.major}.{properties.minor}"
    toolkits = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    return {
        "hardware": hardware,
        "versions": versions((*PACKAGES, *packages)) | toolkits,
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Returns the versions of Python and of some packages; None for one that is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
