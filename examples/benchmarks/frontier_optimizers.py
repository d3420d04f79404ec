"""The optimizers of the frontier, by name: ours, its controls, and what it is measured against.

HybridOptimizer runs in its inline drive, where every step is one gradient evaluation, and gets
the complete schedule of its budget. So AdamW (`adamw`) at the same budget is exactly the
decisive control: as many gradients, and its schedule compressed to them. The other controls
have names of their own.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from frontier_drivers import (
    HYBRID_OPTIONS,
    Driver,
    HybridDriver,
    RandomMoves,
    ScheduleFreeDriver,
    TailOff,
    hybrid_config,
)
from torch import nn
from triton_hybrid.kernels.newton_schulz import POLAR

from triton_hybrid import HybridOptimizer, split_param_groups

SCHEDULES = ("linear", "cosine", "constant")
# A tenth of the run. With a twentieth, and 20 steps at most, AdamW on `lm` was unstable above a
# rate of 2e-3 and ended at 1.84 after 1,000 steps; with a tenth at 1.75, at 6e-3.
WARM_UP_STEPS = 100
WARM_UP_SHARE = 0.1
BETAS = (0.9, 0.999)
TAIL = 0.3
GAIN = 1.5
PLANTED_BUDGET = 1.5
SEED_SHIFT = 1000
# Lion's rates are about a tenth of AdamW's; with ten times the decay the weights shrink alike.
LION_SCALE = 0.1
COMMON = frozenset({"betas", "eps", "weight_decay"})


def warm_up_steps(budget: int) -> int:
    """Returns how many steps the learning rate rises."""
    return max(1, min(WARM_UP_STEPS, round(WARM_UP_SHARE * budget)))


def rate_factor(schedule: str, index: int, budget: int) -> float:
    """Returns the learning rate of a step relative to its peak.

    Args:
        schedule: ``"linear"`` and ``"cosine"`` decay to zero, ``"constant"`` does not.
        index: The step, counted from zero.
        budget: Steps in all.
    """
    warm_up = warm_up_steps(budget)
    if index < warm_up:
        return (index + 1) / warm_up
    if schedule == "constant":
        return 1.0
    done = (index - warm_up) / max(1, budget - warm_up)
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"schedule={schedule!r}: must be one of {SCHEDULES}")


@dataclass(frozen=True)
class Plan:
    """What an optimizer is built for.

    Attributes:
        model: The model.
        lr: Peak learning rate.
        options: Settings, ``weight_decay`` always among them.
        budget: Gradient evaluations it will get.
        seed: For what is random in the optimizer itself.
    """

    model: nn.Module
    lr: float
    options: dict[str, Any]
    budget: int
    seed: int

    def shared(self, betas: tuple[float, ...] | None = BETAS) -> dict[str, Any]:
        """Returns rate, betas and decay, as most constructors take them."""
        settings = {"lr": self.lr, "weight_decay": float(self.options["weight_decay"])}
        if "eps" in self.options:
            settings["eps"] = float(self.options["eps"])
        chosen = self.options.get("betas", betas)
        return settings if chosen is None else settings | {"betas": tuple(chosen)}


@dataclass(frozen=True)
class Entry:
    """An optimizer that runs can name.

    Attributes:
        build: Makes its driver.
        options: Settings that a run may give.
        package: The PyPI package it needs, of the extra `peers`.
        planted: What is false about its name, where the harness tests itself with it.
        full_batch_only: Whether it needs gradients without noise.
        closure: Whether it calls for as many gradients a step as it likes.
        scheduled: Whether the run's schedule applies to it.
        budget_factor: Gradients it really gets for each that it is said to get.
        seed_shift: Added to the seed of weights and data.
        rate_scale: Its grid of learning rates relative to AdamW's.
        rates: A grid of its own.
    """

    build: Callable[[Plan], Driver]
    options: frozenset[str] = COMMON
    package: str | None = None
    planted: str | None = None
    full_batch_only: bool = False
    closure: bool = False
    scheduled: bool = True
    budget_factor: float = 1.0
    seed_shift: int = 0
    rate_scale: float = 1.0
    rates: tuple[float, ...] | None = field(default=None)

    def grid(self, task_rates: tuple[float, ...]) -> tuple[float, ...]:
        """Returns its default grid of learning rates on a task with this grid for AdamW."""
        return self.rates or tuple(rate * self.rate_scale for rate in task_rates)


def make_optimizer(
    name: str, model: nn.Module, lr: float, options: Mapping[str, Any], budget: int, seed: int = 0
) -> Driver:
    """Builds an optimizer.

    Args:
        name: One of `OPTIMIZERS`.
        model: What it trains.
        lr: Peak learning rate.
        options: Settings; which, its entry says.
        budget: Gradient evaluations it will get.
        seed: For what is random in the optimizer itself.

    Raises:
        ValueError: An unknown name or option.
        RuntimeError: The package it needs is not installed.
    """
    entry = find_optimizer(name)
    for option in options:
        if option not in entry.options:
            raise ValueError(
                f"option {option!r} of optimizer {name!r}: must be one of {sorted(entry.options)}"
            )
    return entry.build(Plan(model, lr, {"weight_decay": 0.0} | dict(options), budget, seed))


def find_optimizer(name: str) -> Entry:
    """Returns the entry of an optimizer.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r}: must be one of {sorted(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def require_package(package: str) -> ModuleType:
    """Imports a peer's package.

    Raises:
        RuntimeError: It is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RuntimeError(
            f"{package} is not installed; it comes with the extra 'peers': "
            "pip install -e '.[peers]'"
        ) from error


def _adamw(plan: Plan) -> Driver:
    return Driver(torch.optim.AdamW(plan.model.parameters(), **plan.shared(), fused=True))


def _adamw_with_gain(plan: Plan) -> Driver:
    gain = float(plan.options.get("gain", GAIN))
    settings = plan.shared() | {"lr": plan.lr * gain}
    return Driver(torch.optim.AdamW(plan.model.parameters(), **settings, fused=True))


def _nadam(plan: Plan) -> Driver:
    settings = plan.shared() | {"decoupled_weight_decay": True}
    return Driver(torch.optim.NAdam(plan.model.parameters(), **settings))


def _muon(plan: Plan) -> Driver:
    """Muon on the hidden matrices, AdamW on the rest.

    Muon's updates are scaled to the root mean square of AdamW's, so one rate serves both.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(f"optimizer 'muon': torch {torch.__version__} has none, needs 2.9")
    hidden, rest = (group["params"] for group in split_param_groups(plan.model))
    shared = plan.shared()
    muon = torch.optim.Muon(
        hidden,
        lr=shared["lr"],
        weight_decay=shared["weight_decay"],
        momentum=float(plan.options.get("momentum", 0.95)),
        adjust_lr_fn="match_rms_adamw",
    )
    return Driver(muon, torch.optim.AdamW(rest, **shared, fused=True))


def _lbfgs(plan: Plan) -> Driver:
    optimizer = torch.optim.LBFGS(
        plan.model.parameters(),
        lr=plan.lr,
        max_iter=plan.budget,
        max_eval=plan.budget,
        history_size=int(plan.options.get("history_size", 50)),
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    return Driver(optimizer, scheduled=False)


def _schedule_free(plan: Plan) -> Driver:
    optimizer = require_package("schedulefree").AdamWScheduleFree(
        plan.model.parameters(), **plan.shared(), warmup_steps=warm_up_steps(plan.budget)
    )
    driver = ScheduleFreeDriver(optimizer, scheduled=False)
    driver.after_evaluation()  # ready to train
    return driver


def _from_pytorch_optimizer(
    name: str, betas: tuple[float, ...] | None = None, **fixed: Any
) -> Callable[[Plan], Driver]:
    def build(plan: Plan) -> Driver:
        settings = plan.shared(betas) | fixed
        if name == "AdEMAMix":
            settings["t_alpha_beta3"] = float(plan.budget)
            settings["alpha"] = float(plan.options.get("alpha", 5.0))
        if name == "Lion":
            settings["weight_decay"] /= LION_SCALE
        if name == "SOAP":
            settings["precondition_frequency"] = int(plan.options.get("precondition_frequency", 10))
        make = getattr(require_package("pytorch_optimizer"), name)
        return Driver(make(plan.model.parameters(), **settings))

    return build


def _hybrid(predictor: str | None = None) -> Callable[[Plan], Driver]:
    def build(plan: Plan) -> Driver:
        return HybridDriver(_hybrid_optimizer(plan, predictor))

    return build


def _hybrid_optimizer(plan: Plan, predictor: str | None, inline: bool = True) -> HybridOptimizer:
    config = hybrid_config(plan.options, predictor, inline)
    return HybridOptimizer(plan.model.parameters(), **plan.shared(), hybrid=config)


def _hybrid_muon(predictor: str | None = None) -> Callable[[Plan], Driver]:
    """HybridOptimizer with Muon as the base rule of the hidden matrices."""

    def build(plan: Plan) -> Driver:
        chosen = {name: plan.options[name] for name in MUON_OPTIONS if name in plan.options}
        if chosen.get("ns_coefficients") == "polar":
            chosen["ns_coefficients"] = POLAR
        parts = int(plan.options.get("blocks", FUSED_PARTS))
        groups = split_param_groups(plan.model, blocks={FUSED_NAMES: parts}, **chosen)
        config = hybrid_config(plan.options, predictor, inline=True)
        return HybridDriver(HybridOptimizer(groups, **plan.shared(), hybrid=config))

    return build


def _hybrid_random(plan: Plan) -> Driver:
    return RandomMoves(_hybrid_optimizer(plan, None, inline=False), plan.seed)


def _hybrid_tail_off(plan: Plan) -> Driver:
    tail = float(plan.options.get("tail", TAIL))
    return TailOff(_hybrid_optimizer(plan, None), round((1 - tail) * plan.budget))


HYBRID = COMMON | frozenset(HYBRID_OPTIONS)
VARIANT = HYBRID - {"predictor"}
# The task's fused projection lies in thirds, which its name alone does not tell.
FUSED_NAMES, FUSED_PARTS = "*query_key_value.weight", 3
MUON_OPTIONS = ("momentum", "nesterov", "ns_steps", "ns_coefficients", "ns_dtype")
PEERS = "pytorch_optimizer"
OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry(_adamw),
    "nadam": Entry(_nadam),
    "muon": Entry(_muon, COMMON | {"momentum"}),
    "lbfgs": Entry(
        _lbfgs,
        frozenset({"history_size", "weight_decay"}),
        full_batch_only=True,
        closure=True,
        scheduled=False,
        rates=(0.25, 0.5, 1.0, 2.0),
    ),
    "schedulefree": Entry(_schedule_free, package="schedulefree", scheduled=False),
    "ademamix": Entry(
        _from_pytorch_optimizer("AdEMAMix", (*BETAS, 0.9999), weight_decouple=True),
        COMMON | {"alpha"},
        package=PEERS,
    ),
    "soap": Entry(
        _from_pytorch_optimizer("SOAP"), COMMON | {"precondition_frequency"}, package=PEERS
    ),
    "lion": Entry(
        _from_pytorch_optimizer("Lion", weight_decouple=True),
        frozenset({"betas", "weight_decay"}),
        package=PEERS,
        rate_scale=LION_SCALE,
    ),
    "adan": Entry(_from_pytorch_optimizer("Adan", weight_decouple=True), package=PEERS),
    "hybrid": Entry(_hybrid(), HYBRID),
    "hybrid-slow_ema": Entry(_hybrid("slow_ema"), VARIANT),
    "hybrid-subspace": Entry(_hybrid("subspace"), VARIANT),
    "hybrid-linear": Entry(_hybrid("linear"), VARIANT),
    "hybrid-none": Entry(_hybrid("none"), VARIANT),
    "hybrid-muon": Entry(_hybrid_muon(), HYBRID | {"blocks", *MUON_OPTIONS}),
    "hybrid-muon-none": Entry(_hybrid_muon("none"), VARIANT | {"blocks", *MUON_OPTIONS}),
    "hybrid-random": Entry(_hybrid_random, HYBRID),
    "hybrid-tail-off": Entry(_hybrid_tail_off, HYBRID | {"tail"}),
    "adamw-gain": Entry(_adamw_with_gain, COMMON | {"gain"}),
    "adamw-x1.5": Entry(
        _adamw,
        planted="AdamW with 1.5 times the gradients it is said to have",
        budget_factor=PLANTED_BUDGET,
    ),
    "adamw-again": Entry(
        _adamw, planted="AdamW with other weights and batches", seed_shift=SEED_SHIFT
    ),
}
