"""A stand-in for torch's CUDA graphs on the CPU, in which a replay means what it means on a GPU.

While a graph is captured nothing is done to the tensors that were there before. What a step does is
recorded: calls of the backend (launches, on a GPU) and operations of torch, with tensors by
reference and everything else by value, as a graph bakes it in. A replay does it. Reading a tensor
on the host during a capture is the error that it is on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only
from triton_hybrid.kernels import capture
from triton_hybrid.kernels.backend import BACKENDS
from triton_hybrid.kernels.multi_tensor import TensorSet

WAITS = "operation not permitted when stream is capturing"
READS = ("_local_scalar_dense", "equal", "is_nonzero")
SCRATCH = ("empty", "empty_like", "empty_strided", "new_empty")


class FakeGraph:
    """Stands for torch.cuda.CUDAGraph."""

    made: list[FakeGraph]
    current: FakeGraph | None = None

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.described: list[str] = []
        """What was captured, with everything that is baked in."""
        self.replays = 0
        self.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        for call in self.calls:
            call()

    def record(self, name: str, call: Callable[[], None], *given: Any) -> None:
        self.calls.append(call)
        self.described.append(f"{name}{tree_map(_described, given)}")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    if isinstance(value, TensorSet):
        return f"set of {value.present}"
    return repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__


class _Recorder(TorchDispatchMode):
    """Puts operations of torch into a graph."""

    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in READS:
            raise RuntimeError(WAITS)
        # Lists may change afterwards, and are baked in as they are.
        args, kwargs = tree_map(lambda x: x, (tuple(args), kwargs))
        schema = func._schema
        written = [
            value
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for value in [args[place] if place < len(args) else kwargs[argument.name]]
        ]
        if written:  # done by the replay alone
            self.graph.record(name, lambda: func(*args, **kwargs), args, kwargs)
            found = tuple(written) if schema.returns else None
            return written[0] if len(schema.returns) == 1 else found
        out = func(*args, **kwargs)
        if name in SCRATCH:
            out.zero_()  # what fills it is not done yet, and may be an index
        elif not any(each.alias_info for each in schema.returns):

            def again() -> None:
                for goal, found in zip(_tensors(out), _tensors(func(*args, **kwargs))):
                    goal.copy_(found)

            self.graph.record(name, again, args, kwargs)
        return out


def _tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [x for x in out if isinstance(x, Tensor)]


def _as_it_is(tensors: TensorSet) -> TensorSet:
    """A set with what a launch takes from the host now; later changes are not seen."""
    now = copy.copy(tensors)
    now.flat, now.present = dict(tensors.flat), list(tensors.present)
    now._in_use = dict(tensors._in_use)
    if tensors.matrices is not None:
        now.matrices = copy.copy(tensors.matrices)
        now.matrices.tensors = now
    return now


def _recorded(backend: str, name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a backend that goes into the graph which is being captured."""

    def call(*args: Any, **kwargs: Any) -> Any:
        graph = FakeGraph.current
        if graph is None:
            return launcher(*args, **kwargs)
        for value in [*args, *kwargs.values()]:
            for tensors in value if isinstance(value, (list, tuple)) else (value,):
                if backend == "triton" and isinstance(tensors, TensorSet):
                    tensors.tables()
        baked, named = tree_map_only(TensorSet, _as_it_is, (args, kwargs))
        graph.record(name, lambda: launcher(*baked, **named), args, kwargs)
        return None

    return call


@contextlib.contextmanager
def _graph(graph: FakeGraph, pool: Any, stream: Any, mode: str = "global") -> Iterator[None]:
    assert (pool, mode) == ("the pool", "thread_local")
    assert FakeGraph.current is None
    FakeGraph.current = graph
    try:
        with _Recorder(graph):
            yield
    finally:
        FakeGraph.current = None


def _tolist(tensor: Tensor) -> Any:
    if FakeGraph.current is not None:
        raise RuntimeError(WAITS)
    return _TOLIST(tensor)


_TOLIST = Tensor.tolist


@pytest.fixture
def graphs_made(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """Lets CPU tensors have graphs; returns those that are captured from now on."""
    made: list[FakeGraph] = []
    monkeypatch.setattr(FakeGraph, "made", made, raising=False)
    capture.CAPTURED_ON.add("cpu")
    for name, value in (
        ("CUDAGraph", FakeGraph),
        ("graph", _graph),
        ("graph_pool_handle", lambda: "the pool"),
        ("Stream", lambda device: f"a stream of {device}"),
        ("is_current_stream_capturing", lambda: FakeGraph.current is not None),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Tensor, "tolist", _tolist)
    for name, backend in BACKENDS.items():
        fields = [field.name for field in dataclasses.fields(backend) if field.name != "name"]
        recorded = {field: _recorded(name, field, getattr(backend, field)) for field in fields}
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(backend, **recorded))
    yield made
    capture.CAPTURED_ON.discard("cpu")
