"""What the audit compiles for, and how it compiles.

A launcher is called on small CPU tensors; its launches are recorded instead of run, with the
options that the target gets, and handed to Triton's compiler as its own launcher would.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction
from triton_hybrid.kernels.launch import (
    LAUNCH,
    MATRIX_LAUNCH,
    RESIDENT_LAUNCH,
    launch_options,
    matrix_launch_options,
)

COOPERATIVE = "launch_cooperative_grid"
"""Launch option that makes a launch cooperative."""


@dataclass(frozen=True)
class Target:
    """A device to compile for."""

    name: str
    gpu: GPUTarget  # as Triton takes it
    processors: int  # multiprocessors of a typical device, which set the number of programs
    oldest_triton: tuple[int, int] = (3, 2)  # the first that needs nothing else installed

    @functools.cached_property
    def options(self) -> frozenset[str]:
        """Names of the launch options that this Triton has for the target."""
        options = launch_options(self.gpu.backend)
        return frozenset(vars(make_backend(self.gpu).parse_options(options)))


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 108),
        Target("sm_90", GPUTarget("cuda", 90, 32), 132),
        Target("sm_100", GPUTarget("cuda", 100, 32), 148, (3, 3)),
        Target("sm_120", GPUTarget("cuda", 120, 32), 170, (3, 3)),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 304, (3, 3)),
    )
}


def triton_version() -> tuple[int, int]:
    """Major and minor version of Triton."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True)
class Launch:
    """One launch, as a launcher asked for it."""

    kernel: Any  # the ``@triton.jit`` function
    arguments: Mapping[str, Any]  # of the kernel, compile-time constants among them
    options: Mapping[str, Any]

    @property
    def cooperative(self) -> bool:
        """Whether all programs must be resident together."""
        return bool(self.options.get(COOPERATIVE, False))


def launches(
    target: Target, launcher: Callable[..., None], *args: Any, **kwargs: Any
) -> list[Launch]:
    """What a launcher launches: collected instead of run, with the options for the target."""
    found: list[Launch] = []
    backend = target.gpu.backend

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = kernel.arg_names
        arguments = dict(zip(names, args)) | {k: v for k, v in kwargs.items() if k in names}
        options = {k: v for k, v in kwargs.items() if k not in names}
        found.append(Launch(kernel, arguments, options))

    with (
        mock.patch.dict(LAUNCH, launch_options(backend), clear=True),
        mock.patch.dict(RESIDENT_LAUNCH, launch_options(backend, True), clear=True),
        mock.patch.dict(MATRIX_LAUNCH, matrix_launch_options(backend), clear=True),
        mock.patch.object(JITFunction, "run", record),
    ):
        launcher(*args, **kwargs)
    return found


TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}
"""What Triton's signatures call the dtypes that kernels take."""


def source_of(launch: Launch) -> ASTSource:
    """What Triton's launcher would hand to its compiler, specialised as it would."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: list[int] = []
    ones: list[int] = []
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            if not parameter.is_constexpr:
                ones.append(index)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            here = isinstance(value, Tensor)
            signature[name] = "*" + TYPE_NAMES[value.dtype] if here else "i32"
            if (value.data_ptr() if here else value) % 16 == 0:
                divisible.append(index)
    if "constexprs" in inspect.signature(ASTSource.__init__).parameters:
        attributes = {(index,): [["tt.divisibility", 16]] for index in divisible}
        return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    # Triton 3.2.
    from triton.backends.compiler import AttrsDescriptor

    for index in ones:
        signature[launch.kernel.arg_names[index]] = "i32"
    types = {name: kind for name, kind in signature.items() if kind != "constexpr"}
    hints = dict.fromkeys(divisible, 16) | dict.fromkeys(ones, 1)
    return ASTSource(launch.kernel, types, constants, AttrsDescriptor.from_hints(hints))


def compile_launch(launch: Launch, target: Target) -> Any:
    """Compiles a launch for a target; returns Triton's compiled kernel.

    Raises:
        ValueError: A launch option that Triton would refuse at run time.
    """
    unknown = sorted(set(launch.options) - target.options)
    if unknown:
        raise ValueError(f"launch options {unknown} are unknown to Triton for {target.name}")
    return triton.compile(source_of(launch), target=target.gpu, options=dict(launch.options))
