"""PyTorch's own tests of optimizers, written anew for ours.

The database of options, errors and schedulers is torch's own (``torch.testing._internal``); the
functions test what the generic ones of its ``test/test_optim.py`` test, under their names.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau
from training import assert_same_state, assert_same_weights, short_config, state_copy, weights

from triton_hybrid import HybridConfig, HybridOptimizer, needs_backward

try:
    from torch.testing._internal import common_optimizers as database
except ImportError as error:  # it needs expecttest
    pytest.skip(f"torch's database of optimizers: {error}", allow_module_level=True)
# Importing it forbids everybody else to set flags such as those of matrix products.
vars(torch.backends)["__allow_nonbracketed_mutation_flag"] = True

NOT_APPLICABLE = {
    "foreach_matches_forloop": "there is one implementation; test_optimizer compares the backends",
    "fused_matches_forloop": "as above; fused= and foreach= are taken and ignored",
    "fused_large_tensor": "the kernels' own tests reach offsets beyond 2^31",
    "peak_memory_foreach": "needs a GPU, and bytes are promised by the ledger of state instead",
    "defaults_changed_to_foreach": "nothing is chosen between",
    "complex": "complex parameters that train are refused",
    "sparse": "sparse gradients are refused",
    "second_order_optims_return_consistent_types": "LBFGS only",
    "differentiable": "refused by name",
    "amsgrad": "refused by name",
    "tensor_betas": "betas are numbers here, and tensors are refused by name",
    "forloop_goes_right_direction_multigpu": "parameters on several devices are refused",
    "state_dict_with_cuda_params": "needs a GPU",
    "cpu_load_state_dict": "needs a GPU",
    "can_load_from_to_named_state_dict_of_other_optimizers": "rows differ from rule to rule",
}

ADAMW = next(info for info in database.optim_db if info.optim_cls is torch.optim.AdamW)
MUON = next((info for info in database.optim_db if info.optim_cls.__name__ == "Muon"), None)
NONE = {"hybrid": HybridConfig(predictor="none")}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "none": NONE,
    "short": {"hybrid": short_config()},
    "stepped": {"hybrid": short_config(inline=False)},
    "muon": {"hybrid": short_config(), "base": "muon"},
    "offload": {"hybrid": short_config(offload="cpu")},
}


def inputs_of(variant: str) -> Callable[..., list[Any]]:
    """Torch's options for the base rule, with those of the variant."""
    source = MUON if variant == "muon" and MUON is not None else ADAMW

    def make(device: Any, dtype: Any = None) -> list[Any]:
        found = source.optim_inputs_func(device, dtype)
        found.append(database.OptimizerInput(None, {"lr": torch.tensor(0.01)}, "tensor lr"))
        found.append(database.OptimizerInput(None, {"maximize": True, "lr": 0.01}, "maximize"))
        taken = [entry for entry in found if not entry.kwargs.get("amsgrad")]
        for entry in taken:
            entry.kwargs = {**VARIANTS[variant], **entry.kwargs}
        return taken

    return make


INFOS = {
    variant: database.OptimizerInfo(
        HybridOptimizer,
        optim_inputs_func=inputs_of(variant),
        optim_error_inputs_func=ADAMW.optim_error_inputs_func,
        scheduler_inputs=ADAMW.scheduler_inputs,
        supported_impls=(),
        not_og_supported_flags=("maximize", "capturable"),
        has_capturable_arg=True,
        supports_complex=False,
        supports_multiple_devices=False,
    )
    for variant in VARIANTS
}
EACH = pytest.mark.parametrize("variant", VARIANTS)


class Problem:
    """Torch's: a layer of which one output is squared. Of matrices alone, so that Muon takes it."""

    def __init__(self, dtype: torch.dtype = torch.float32, gaps: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        more = (2,) if gaps else ()
        drawn = [torch.rand(*shape, *more, generator=generator) for shape in ((10, 5), (1, 10))]
        self.params = [nn.Parameter((d[..., 0] if gaps else d).to(dtype)) for d in drawn]
        self.input = torch.rand(5, generator=generator).to(dtype)

    def loss(self) -> Tensor:
        weight, bias = self.params
        return (weight.mv(self.input) + bias.flatten()).square().sum()

    def value(self) -> float:
        return float(self.loss().detach())

    def train(self, optimizer: torch.optim.Optimizer, steps: int = 20) -> None:
        """A plain loop."""
        for _ in range(steps):
            optimizer.zero_grad()
            if needs_backward(optimizer):
                self.loss().backward()
            optimizer.step()

    def like(self, other: Problem) -> Problem:
        for param, values in zip(self.params, other.params):
            param.data.copy_(values.data)
        return self


def make(options: dict[str, Any], problem: Problem, params: Any = None) -> HybridOptimizer:
    return HybridOptimizer(params or problem.params, **copy.deepcopy(options))


def each_option(variant: str, **problem: Any) -> Iterator[tuple[Problem, Any, dict[str, Any]]]:
    """A problem and its optimizer for all of torch's options."""
    for entry in INFOS[variant].optim_inputs_func("cpu"):
        posed = Problem(**problem)
        yield posed, make(entry.kwargs, posed), entry.kwargs


def trained(variant: str, steps: int = 6) -> tuple[Problem, HybridOptimizer]:
    problem = Problem()
    optimizer = make(VARIANTS[variant], problem)
    problem.train(optimizer, steps)
    return problem, optimizer


def assert_goes_on_alike(one: Any, other: Any, steps: int = 6) -> None:
    """Two problems with their optimizers have the same bits some steps later."""
    for problem, optimizer in (one, other):
        problem.train(optimizer, steps)
    assert_same_weights(weights(one[1]), weights(other[1]))
    assert_same_state(state_copy(one[1]), state_copy(other[1]))


def assert_equal(left: Any, right: Any) -> None:
    """Two state dicts are equal."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        for a, b in zip(left, right, strict=True):
            assert_equal(a, b)
    elif isinstance(left, Tensor):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    else:
        assert left == right or (left != left and right != right)


ERRORS = {e.optimizer_error_input.desc: e for e in ADAMW.optim_error_inputs_func("cpu", None)}
ERRORS.pop("lr as Tensor doesn't work with foreach & not capturable", None)  # foreach is ignored


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error: str) -> None:
    """The same errors; the messages of checks that torch leaves to the optimizer are ours."""
    entry, given = ERRORS[error], ERRORS[error].optimizer_error_input
    params = [nn.Parameter(torch.ones(1, 1))] if given.params is None else given.params
    expected: Any = pytest.raises(
        entry.error_type, match=None if given.kwargs else entry.error_regex
    )
    if entry.error_type is UserWarning:
        expected = pytest.warns(UserWarning, match="duplicate parameters")
    with expected:
        HybridOptimizer(params, **given.kwargs)


@EACH
@pytest.mark.parametrize(
    ("gaps", "closure"), [(False, False), (True, True)], ids=["loop", "gaps, closure"]
)
def test_forloop_goes_right_direction(variant: str, gaps: bool, closure: bool) -> None:
    for problem, optimizer, options in each_option(variant, gaps=gaps):
        start = problem.value()

        def evaluate(problem: Problem = problem, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = problem.loss()
            loss.backward()
            return loss

        for _ in range(20):
            optimizer.step(evaluate) if closure else problem.train(optimizer, 1)
        assert (problem.value() > start) == options.get("maximize", False), options


@EACH
def test_forloop_goes_right_direction_with_lrsched(variant: str) -> None:
    for schedulers in INFOS[variant].scheduler_inputs:
        problem = Problem()
        optimizer = make({**VARIANTS[variant], "lr": 0.01}, problem)
        running = [scheduler(optimizer) for scheduler in schedulers]
        start = problem.value()
        for _ in range(20):
            problem.train(optimizer, 1)
            for scheduler in running:
                on_plateau = isinstance(scheduler, ReduceLROnPlateau)
                scheduler.step(problem.value()) if on_plateau else scheduler.step()
        assert problem.value() < start


@EACH
@pytest.mark.parametrize("option", ["lr", "weight_decay"])
def test_param_groups(variant: str, option: str) -> None:
    """One group has its own value, the other, which comes later, the default."""
    problem = Problem()
    weight, bias = problem.params
    groups = [{"params": [weight], option: 0.1}]
    optimizer = make({**VARIANTS[variant], option: 0.01}, problem, groups)
    start = problem.value()
    problem.train(optimizer, 5)
    optimizer.add_param_group({"params": [bias]})
    before = weights(optimizer)
    problem.train(optimizer, 15)
    assert problem.value() < start
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(optimizer)))
    assert [group[option] for group in optimizer.param_groups] == [0.1, 0.01]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [weight]})


@EACH
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr(variant: str, shape: tuple[int, ...]) -> None:
    """The same as with a number, also under a scheduler, which fills it in place."""
    runs = []
    for lr in (0.01, torch.full(shape, 0.01, dtype=torch.float64)):
        problem = Problem()
        optimizer = make({**VARIANTS[variant], "lr": lr}, problem)
        schedule = LinearLR(optimizer, 0.5, 1.0, 5)
        for _ in range(12):
            problem.train(optimizer, 1)
            schedule.step()
        assert isinstance(optimizer.param_groups[0]["lr"], type(lr))
        runs.append(weights(optimizer))
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-7)


CHANGING: list[dict[str, Any]] = [
    {"lr": 0.003}, {"betas": (0.8, 0.99)}, {"weight_decay": 0.3}, {"lr": 0.02}, {},
]  # fmt: skip


@pytest.mark.parametrize("changing", [False, True], ids=["fixed", "changing"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_matches_forloop(base: str, dtype: torch.dtype, changing: bool) -> None:
    """Torch's plain loop over parameters, with options that change from step to step too."""
    info = ADAMW if base == "adamw" else MUON
    if info is None:
        pytest.skip("this torch has no Muon")
    own: dict[str, Any] = {"foreach": False} if base == "adamw" else {}
    extra = {} if base == "adamw" else {"ns_dtype": "bfloat16", "adjust_lr_fn": "original"}
    for entry in info.optim_inputs_func("cpu"):
        if entry.kwargs.get("amsgrad"):
            continue
        options = {"lr": 1e-3, "weight_decay": 0.1, **entry.kwargs}
        ours, theirs = Problem(dtype), Problem(dtype)
        optimizer = make({**NONE, **extra, "base": base, **options}, ours)
        reference = info.optim_cls(theirs.params, **copy.deepcopy(options), **own)
        for step in range(12):
            for other, problem in ((optimizer, ours), (reference, theirs)):
                other.param_groups[0].update(CHANGING[step % 5] if changing else {})
                problem.train(other, 1)
        limit = 1e-13 if dtype == torch.float64 and base == "adamw" else 7.3e-6
        torch.testing.assert_close(ours.params, theirs.params, rtol=0, atol=limit)


@EACH
def test_step_is_noop_when_params_have_no_grad_or_zero_grads(variant: str) -> None:
    for problem, optimizer, _ in each_option(variant):
        optimizer.param_groups[0]["weight_decay"] = 0.0
        before = weights(optimizer)
        for step in range(14):
            for param in problem.params if step > 5 and optimizer.needs_backward else ():
                param.grad = torch.zeros_like(param)
            optimizer.step()
        assert_same_weights(weights(optimizer), before)


@EACH
def test_grads_are_never_inplaced_into(variant: str) -> None:
    for problem, optimizer, _ in each_option(variant):
        for _step in range(8):
            optimizer.zero_grad()
            if optimizer.needs_backward:
                problem.loss().backward()
            found = [param.grad for param in problem.params]
            kept = [(g, g._version, g.clone()) for g in found if g is not None]
            optimizer.step()
            assert all(p.grad is g for p, g in zip(problem.params, found))
            assert all(g._version == version and torch.equal(g, v) for g, version, v in kept)


@EACH
def test_non_empty_state_and_printing(variant: str) -> None:
    for problem, optimizer, _ in each_option(variant):
        assert len(optimizer.state) == 0
        problem.train(optimizer, 5)
        assert all(len(optimizer.state[param]) > 0 for param in problem.params)
        assert "HybridOptimizer" in repr(optimizer)


@EACH
@pytest.mark.parametrize("steps", [0, 4])
def test_state_dict_deterministic(variant: str, steps: int) -> None:
    for problem, optimizer, options in each_option(variant):
        problem.train(optimizer, steps)
        twin = Problem().like(problem)
        other = make(options, twin)
        saved = copy.deepcopy(optimizer.state_dict())
        other.load_state_dict(optimizer.state_dict())
        assert_equal(other.state_dict(), saved)
        assert_goes_on_alike((problem, optimizer), (twin, other))


@EACH
def test_save_load_equality_with_weights_only(variant: str) -> None:
    for problem, optimizer, _ in each_option(variant):
        problem.train(optimizer, 5)
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        assert_equal(torch.load(buffer, weights_only=True), optimizer.state_dict())


@EACH
def test_can_load_older_state_dict_with_nontensor_step(variant: str) -> None:
    """Flags that later versions brought are missing, and take their defaults."""
    problem, optimizer = trained(variant)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for flag in (*INFOS[variant].not_og_supported_flags, "foreach", "fused", "differentiable"):
            group.pop(flag, None)
    for entry in saved["state"].values():
        entry.update({key: float(value) for key, value in entry.items() if key == "step"})
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["maximize"] is False
    start = problem.value()
    problem.train(optimizer)
    assert problem.value() < start


@EACH
@pytest.mark.parametrize(("named", "renamed"), [(True, False), (False, True), (True, True)])
def test_can_load_from_to_named_state_dict(variant: str, named: bool, renamed: bool) -> None:
    def pairs(of: Problem, named: bool) -> list[Any]:
        return list(zip(("weight", "bias"), of.params)) if named else of.params

    problem, twin = Problem(), Problem()
    optimizer = make(VARIANTS[variant], problem, pairs(problem, named))
    problem.train(optimizer, 5)
    other = make(VARIANTS[variant], twin.like(problem), pairs(twin, renamed))
    other.load_state_dict(optimizer.state_dict())
    assert_goes_on_alike((problem, optimizer), (twin, other))


@EACH
def test_step_hooks(variant: str) -> None:
    problem, seen = Problem(), []
    optimizer = make(VARIANTS[variant], problem)
    handles = [
        register(lambda *_, name=name: seen.append(name))
        for name, register in {
            "own pre": optimizer.register_step_pre_hook,
            "own post": optimizer.register_step_post_hook,
            "pre": torch_optimizer.register_optimizer_step_pre_hook,
            "post": torch_optimizer.register_optimizer_step_post_hook,
        }.items()
    ]
    problem.train(optimizer, 3)
    for handle in handles:
        handle.remove()
    problem.train(optimizer, 1)
    assert seen == ["pre", "own pre", "own post", "post"] * 3


@EACH
@pytest.mark.parametrize("prepend", [False, True])
def test_state_dict_hooks(variant: str, prepend: bool) -> None:
    """Hooks run in their order, and what one returns goes to the next."""
    problem, optimizer = trained(variant)
    seen: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pre 1"))
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pre 2"), prepend=prepend)
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "ema": 0.5})
    optimizer.register_state_dict_post_hook(lambda opt, saved: seen.append(saved["ema"]))
    saved = optimizer.state_dict()
    assert seen == [*(["pre 2", "pre 1"] if prepend else ["pre 1", "pre 2"]), saved["ema"]]

    def set_rate(lr: float) -> Any:
        def hook(opt: Any, state_dict: Any) -> Any:
            groups = [{**group, "lr": lr} for group in state_dict["param_groups"]]
            return {**state_dict, "param_groups": groups}

        return hook

    optimizer.register_load_state_dict_pre_hook(set_rate(0.002))
    optimizer.register_load_state_dict_pre_hook(set_rate(0.003), prepend=prepend)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert seen[3:] == [0.002 if prepend else 0.003]
    start = problem.value()
    problem.train(optimizer)
    assert problem.value() < start


@EACH
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_deepcopy_and_pickle_copy_all_public_attrs(variant: str, copier: Any) -> None:
    problem, optimizer = trained(variant)
    twin, other = copier((problem, optimizer))
    for name in vars(optimizer):
        assert name.startswith("_") or hasattr(other, name)
    assert_goes_on_alike((problem, optimizer), (twin, other))


@EACH
def test_mixed_dtypes(variant: str) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    params = [nn.Parameter(torch.ones(3, 2, dtype=dtype)) for dtype in dtypes]
    optimizer = HybridOptimizer(params, 0.01, **VARIANTS[variant])
    for _ in range(10):
        for param in params:
            param.grad = 2 * param.detach() if optimizer.needs_backward else None
        optimizer.step()
    assert all(bool(((param < 1) & (param > 0.5)).all()) for param in params)


@EACH
def test_no_warning_and_no_graph(variant: str) -> None:
    """A plain loop warns of nothing, and no step is recorded for a backward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the parameters are on the CPU although")
        problem, optimizer = trained(variant)
    assert all(param.is_leaf and param.grad_fn is None for param in problem.params)
    for entry in optimizer.state.values():
        assert not any(v.requires_grad for v in entry.values() if isinstance(v, Tensor))


def test_what_does_not_apply_is_refused_or_not_tested() -> None:
    for dtype in (torch.complex64, torch.complex128):
        with pytest.raises((ValueError, RuntimeError), match="complex"):
            HybridOptimizer([nn.Parameter(torch.ones(2, 2, dtype=dtype))])
    assert not {f"test_{name}" for name in NOT_APPLICABLE} & globals().keys()
