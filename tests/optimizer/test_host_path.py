"""What a step costs the host, by counts: operations of torch, looks at tensors, launches, uploads.

Times are measured by ``examples/benchmarks/host_time.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_launches import counted_launches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import short_config
from triton_hybrid.kernels import likeness as likeness_module
from triton_hybrid.kernels import repeated
from triton_hybrid.kernels.launch import INTERPRETED, settle
from triton_hybrid.kernels.likeness import likeness

from triton_hybrid import HybridConfig, HybridOptimizer, Phase
from triton_hybrid.watch import Watch


class Operations(TorchDispatchMode):
    """Names of all operations of torch inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def make(count: int, backend: str = "triton", **options: Any) -> HybridOptimizer:
    """An optimizer of small tensors that has taken its first steps, in a Full phase."""
    params = [nn.Parameter(torch.full((2, 3), float(n))) for n in range(count)]
    config = short_config(inline=False, **options)
    optimizer = HybridOptimizer(params, lr=1e-3, hybrid=config, capturable=True, backend=backend)
    for _ in range(12):
        give(optimizer)
        optimizer.step()
    while optimizer.phase is not Phase.FULL:
        give(optimizer)
        optimizer.step()
    return optimizer


def give(optimizer: HybridOptimizer) -> list[Tensor]:
    """Fresh gradients, in other memory."""
    params = optimizer.param_groups[0]["params"]
    grads = [torch.full((2, 3), 0.5) for _ in params]
    for param, grad in zip(params, grads):
        param.grad = grad if optimizer.phase is not Phase.PREDICT else None
    return grads


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_looking_for_changes_runs_no_operation_of_torch(backend: str) -> None:
    optimizer = make(5, backend)
    with torch.no_grad(), Operations() as seen:
        for _ in range(2):  # the first sees that the mode is on
            kept = give(optimizer)
            seen.names.clear()
            engine = optimizer._binding.bind(optimizer.param_groups, optimizer.state)
            assert engine is optimizer._engine
            assert engine.take_gradients()
    assert seen.names == []
    assert all(grad is param.grad for grad, param in zip(kept, engine.params))


@pytest.mark.parametrize("predictor", ["none", "slow_ema"])
def test_operations_of_a_step_do_not_grow_with_the_tensors(
    predictor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the launches: interpreted ones would run operations of their own."""
    if INTERPRETED:
        from triton.runtime.interpreter import InterpretedFunction

        monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)
    found = []
    for count in (4, 40):
        optimizer, steps = make(count, predictor=predictor), {}
        for _ in range(8):
            give(optimizer)
            phase = optimizer.phase
            with Operations() as seen:
                optimizer.step()
            steps[phase] = seen.names
        found.append(steps)
    assert found[0] == found[1]
    # The column of gradient addresses, how a stretch begins; what others have written.
    for phase, names in found[0].items():
        most = {Phase.FULL: 2, Phase.PREDICT: 0, Phase.CORRECT: 3}[phase]
        assert len(names) <= most, (phase, names)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_warning_names_the_line_of_the_loop(hooked: bool) -> None:
    optimizer = make(3, "torch")
    if hooked:
        optimizer.register_step_pre_hook(lambda *given: None)
    while optimizer.needs_backward:
        give(optimizer)
        optimizer.step()
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.ones_like(param)
    with pytest.warns(UserWarning, match="needs_backward is True") as found:
        optimizer.step()
    assert [warning.filename for warning in found] == [__file__]


def test_launches_of_each_phase() -> None:
    found = {}
    with counted_launches() as log:  # from the first launch on: later ones repeat it
        optimizer = make(3)
        for _ in range(6):
            give(optimizer)
            phase = optimizer.phase
            log.clear()
            optimizer.step()
            found[phase] = [name.strip("_").removesuffix("_kernel") for name in log]
    look = ["fingerprint", "settle"]
    assert found[Phase.FULL] == ["step"]
    assert found[Phase.PREDICT][-5:] == ["predict", "reduce", "check_move", *look]
    assert found[Phase.CORRECT] == [*look, "slopes", "reduce", "decide", "correct", "step"]


def test_only_the_addresses_of_moved_gradients_are_uploaded() -> None:
    optimizer = make(3, predictor="none")
    tensors = optimizer._engine.batches[0].tensors
    addresses, extents = tensors.tables()
    grads = give(optimizer)
    optimizer.step()
    assert tensors.tables()[0] is addresses
    assert tensors.tables()[1] is extents
    placed = [set(row) for row in addresses.tolist()]
    assert all(grad.data_ptr() in row for grad, row in zip(grads, placed))


def test_a_gradient_of_another_kind_is_looked_at_again() -> None:
    runs = []
    for change in (lambda g: g, lambda g: g.t().contiguous().t(), lambda g: torch.stack([g, g])[0]):
        optimizer = make(3, "torch", predictor="none")
        for grad, param in zip(give(optimizer), optimizer.param_groups[0]["params"]):
            param.grad = change(grad)
        optimizer.step()
        optimizer.param_groups[0]["params"][1].grad = None
        optimizer.step()
        runs.append([param.detach().clone() for param in optimizer.param_groups[0]["params"]])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))


OTHERS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "values": lambda x: x + 1,
    "shape": lambda x: x[:1],
    "strides": lambda x: x.t(),
    "dtype": lambda x: x.double(),
    "layout": lambda x: x.to_sparse(),
    "gradient": lambda x: x.clone().requires_grad_(),
    "class": lambda x: nn.Parameter(x, requires_grad=False),
    "none": lambda x: None,
}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_likeness_sees_all_but_values(
    other: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setattr(likeness_module, "_Guards", None)
    first, square = torch.zeros(2), torch.zeros(3, 3)
    alike = likeness([first, square])
    assert alike(first, square)
    assert alike(first, OTHERS[other](square)) == (other == "values")


def test_equal_values_are_not_the_same_state() -> None:
    """One-element tensors compare equal, and would be taken for each other."""
    optimizer = HybridOptimizer([nn.Parameter(torch.ones(1))], hybrid=HybridConfig())
    state: Any = {optimizer.param_groups[0]["params"][0]: {"a": torch.ones(1), "b": 1.0}}
    watch = Watch(optimizer.param_groups, state)
    (entry,) = state.values()
    assert not watch.sees_changes(optimizer.param_groups, state)
    for value in (torch.ones(1), 1.0, None):
        kept, entry["a"] = entry["a"], value
        assert watch.sees_changes(optimizer.param_groups, state)
        entry["a"] = kept
        assert not watch.sees_changes(optimizer.param_groups, state)
    entry["c"] = torch.ones(1)
    assert watch.sees_changes(optimizer.param_groups, state)


def test_constants_are_compared_at_the_first_launch_only() -> None:
    kernel = SimpleNamespace(used_global_vals={("LR", 1): (0, {})})
    settle(kernel)
    assert kernel.used_global_vals == {}
    settle(SimpleNamespace())


def test_launches_are_prepared_anew_when_more_than_addresses_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A gradient that is missing, another dtype; and what is kept of launches has a limit."""
    optimizer = make(3, predictor="none")
    kept = optimizer._engine.scalars.launches
    (before,) = kept.values()
    give(optimizer)
    optimizer.step()
    assert kept == {next(iter(kept)): before}
    params = optimizer.param_groups[0]["params"]
    for change in (lambda: setattr(params[1], "grad", None), lambda: give(optimizer)):
        old = [param.detach().clone() for param in params]
        change()
        optimizer.step()
        (after,) = kept.values()
        assert after is not before
        moved = [not torch.equal(param, was) for param, was in zip(params, old)]
        assert moved == [param.grad is not None for param in params]
        before = after
    monkeypatch.setattr(repeated, "MOST_KEPT", 4)
    for number in range(8):
        optimizer._engine.backend.decide(optimizer._engine.scalars, 2.5, float(number))
        assert len(kept) <= 4


def test_a_profiler_and_hooks_hear_of_a_step() -> None:
    optimizer, heard = make(3, "torch", predictor="none"), list[str]()
    give(optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        optimizer.step()
    assert any(entry.key.startswith("Optimizer.step#") for entry in seen.key_averages())
    hooks = [
        optimizer.register_step_pre_hook(lambda *_: heard.append("before")),
        optimizer.register_step_post_hook(lambda *_: heard.append("after")),
    ]
    optimizer.step()
    for hook in hooks:
        hook.remove()
    optimizer.step()
    assert heard == ["before", "after"]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_step_leaves_the_recording_of_gradients_as_it_was(enabled: bool) -> None:
    optimizer = make(3, "torch")

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        raise KeyError

    with torch.set_grad_enabled(enabled):
        with pytest.raises(KeyError):
            optimizer.step(closure)
        assert torch.is_grad_enabled() is enabled
        give(optimizer)
        optimizer.step()
        assert torch.is_grad_enabled() is enabled
