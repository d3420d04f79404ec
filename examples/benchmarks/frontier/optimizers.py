"""The optimizers of the frontier, by name: ours, its controls, and what it is measured against.

HybridOptimizer runs in its inline drive, where every step is one gradient evaluation, and gets
the complete schedule of its budget. So AdamW (`adamw`) at the same budget is exactly the
decisive control: as many gradients, and its schedule compressed to them. The other controls
have names of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from torch import nn

from frontier.drivers import Driver, RandomMoves, TailOff, warm_up_steps
from lib.choices import PREDICTORS
from triton_hybrid import HybridConfig, HybridOptimizer, split_param_groups

BETAS = (0.9, 0.999)
# Lion's rates are about a tenth of AdamW's; with ten times the decay the weights shrink alike.
LION_SCALE = 0.1
COMMON = frozenset({"betas", "eps", "weight_decay"})


@dataclass(frozen=True)
class Plan:
    """What an optimizer is built for; ``weight_decay`` is always among the options."""

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

    def own(self) -> dict[str, Any]:
        """Returns the settings that not all optimizers have."""
        return {name: value for name, value in self.options.items() if name not in COMMON}


@dataclass(frozen=True)
class Entry:
    """An optimizer that runs can name."""

    build: Callable[[Plan], Driver]
    options: Set[str] = COMMON  # settings that a run may give, beside those with defaults
    defaults: Mapping[str, Any] = field(default_factory=dict)
    package: str | None = None  # the PyPI package it needs, of the extra `peers`
    planted: str | None = None  # what is false about its name, where the harness tests itself
    full_batch_only: bool = False  # whether it needs gradients without noise
    closure: bool = False  # whether it calls for as many gradients a step as it likes
    budget_factor: float = 1.0  # gradients it really gets for each that it is said to get
    seed_shift: int = 0  # added to the seed of weights and data
    rate_scale: float = 1.0  # its grid of learning rates relative to AdamW's
    rates: tuple[float, ...] | None = None  # a grid of its own

    def grid(self, task_rates: tuple[float, ...]) -> tuple[float, ...]:
        """Returns its default grid of learning rates on a task with this grid for AdamW."""
        return self.rates or tuple(rate * self.rate_scale for rate in task_rates)


def make_optimizer(
    name: str, model: nn.Module, lr: float, options: Mapping[str, Any], budget: int, seed: int = 0
) -> Driver:
    """Builds one of `OPTIMIZERS` for a model and so many gradient evaluations.

    Its entry says which options it takes. The seed is for what is random in the optimizer itself.

    Raises:
        ValueError: An unknown name or option.
        RuntimeError: The package it needs is not installed.
    """
    entry = find_optimizer(name)
    allowed = entry.options | entry.defaults.keys()
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"option {option!r} of optimizer {name!r}: must be one of {sorted(allowed)}"
            )
    settings = {"weight_decay": 0.0, **entry.defaults, **options}
    return entry.build(Plan(model, lr, settings, budget, seed))


def find_optimizer(name: str) -> Entry:
    """Returns the entry of an optimizer, or raises a ValueError where there is none."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r}: must be one of {sorted(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def require_package(package: str) -> ModuleType:
    """Imports a peer's package, or raises a RuntimeError that names the extra that brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RuntimeError(
            f"{package} is not installed; it comes with the extra 'peers': "
            "pip install -e '.[peers]'"
        ) from error


def _adamw(plan: Plan) -> Driver:
    settings = plan.shared()
    settings["lr"] *= float(plan.options.get("gain", 1.0))
    return Driver(torch.optim.AdamW(plan.model.parameters(), **settings, fused=True))


def _nadam(plan: Plan) -> Driver:
    parameters = plan.model.parameters()
    return Driver(torch.optim.NAdam(parameters, **plan.shared(), decoupled_weight_decay=True))


def _muon(plan: Plan) -> Driver:
    """Muon on the hidden matrices, AdamW on the rest.

    Muon's updates are scaled to the root mean square of AdamW's, so one rate serves both.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(f"optimizer 'muon': torch {torch.__version__} has none, needs 2.9")
    hidden, rest = (group["params"] for group in split_param_groups(plan.model))
    shared = plan.shared()
    settings = {name: shared[name] for name in ("lr", "weight_decay")} | plan.own()
    muon = torch.optim.Muon(hidden, **settings, adjust_lr_fn="match_rms_adamw")
    return Driver(muon, torch.optim.AdamW(rest, **shared, fused=True))


def _lbfgs(plan: Plan) -> Driver:
    optimizer = torch.optim.LBFGS(
        plan.model.parameters(),
        lr=plan.lr,
        max_iter=plan.budget,
        max_eval=plan.budget,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
        **plan.own(),
    )
    return Driver(optimizer, scheduled=False)


def _schedule_free(plan: Plan) -> Driver:
    optimizer = require_package("schedulefree").AdamWScheduleFree(
        plan.model.parameters(), **plan.shared(), warmup_steps=warm_up_steps(plan.budget)
    )
    optimizer.train()
    return Driver(optimizer, scheduled=False)


def _peer(
    name: str, betas: tuple[float, ...] | None = None, **fixed: Any
) -> Callable[[Plan], Driver]:
    """An optimizer of the package pytorch_optimizer."""

    def build(plan: Plan) -> Driver:
        settings = plan.shared(betas) | plan.own() | fixed
        if name == "AdEMAMix":
            settings["t_alpha_beta3"] = float(plan.budget)
        if name == "Lion":
            settings["weight_decay"] /= LION_SCALE
        make = getattr(require_package(PEERS), name)
        return Driver(make(plan.model.parameters(), **settings))

    return build


def _hybrid_optimizer(plan: Plan, inline: bool = True, params: Any = None) -> HybridOptimizer:
    fields = {name: value for name, value in plan.options.items() if name in HYBRID_FIELDS}
    config = HybridConfig.from_dict(fields | {"inline": inline})
    return HybridOptimizer(params or plan.model.parameters(), **plan.shared(), hybrid=config)


def _hybrid(plan: Plan) -> Driver:
    return Driver(_hybrid_optimizer(plan))


def _hybrid_muon(plan: Plan) -> Driver:
    """HybridOptimizer with Muon as the base rule of the hidden matrices."""
    chosen = {name: plan.options[name] for name in MUON_OPTIONS if name in plan.options}
    if chosen.get("ns_coefficients") == "polar":
        from triton_hybrid.kernels.newton_schulz import POLAR

        chosen["ns_coefficients"] = POLAR
    blocks = {FUSED_NAMES: int(plan.options["blocks"])}
    groups = split_param_groups(plan.model, blocks=blocks, **chosen)
    return Driver(_hybrid_optimizer(plan, params=groups))


def _hybrid_tail_off(plan: Plan) -> Driver:
    return TailOff(_hybrid_optimizer(plan), round((1 - plan.options["tail"]) * plan.budget))


def _fixed(build: Callable[[Plan], Driver], **options: Any) -> Callable[[Plan], Driver]:
    return lambda plan: build(replace(plan, options=plan.options | options))


# The fields of HybridConfig that a run may set.
HYBRID_FIELDS = frozenset(HybridConfig().to_dict()) - {"inline", "offload"}
HYBRID = COMMON | HYBRID_FIELDS
VARIANT = HYBRID - {"predictor"}
# The task's fused projection lies in thirds, which its name alone does not tell.
FUSED_NAMES, FUSED_PARTS = "*query_key_value.weight", 3
MUON_OPTIONS = {"momentum", "nesterov", "ns_steps", "ns_coefficients", "ns_dtype"}
PEERS = "pytorch_optimizer"
OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry(_adamw),
    "nadam": Entry(_nadam),
    "muon": Entry(_muon, COMMON, {"momentum": 0.95}),
    "lbfgs": Entry(
        _lbfgs,
        {"weight_decay"},
        {"history_size": 50},
        full_batch_only=True,
        closure=True,
        rates=(0.25, 0.5, 1.0, 2.0),
    ),
    "schedulefree": Entry(_schedule_free, package="schedulefree"),
    "ademamix": Entry(
        _peer("AdEMAMix", (*BETAS, 0.9999), weight_decouple=True), COMMON, {"alpha": 5.0}, PEERS
    ),
    "soap": Entry(_peer("SOAP"), defaults={"precondition_frequency": 10}, package=PEERS),
    "lion": Entry(
        _peer("Lion", weight_decouple=True),
        {"betas", "weight_decay"},
        package=PEERS,
        rate_scale=LION_SCALE,
    ),
    "adan": Entry(_peer("Adan", weight_decouple=True), package=PEERS),
    "hybrid": Entry(_hybrid, HYBRID),
    **{
        f"hybrid-{name}": Entry(_fixed(_hybrid, predictor=name), VARIANT)
        for name in PREDICTORS
        if name != "auto"  # what `hybrid` has
    },
    "hybrid-muon": Entry(_hybrid_muon, HYBRID | MUON_OPTIONS, {"blocks": FUSED_PARTS}),
    "hybrid-muon-none": Entry(
        _fixed(_hybrid_muon, predictor="none"), VARIANT | MUON_OPTIONS, {"blocks": FUSED_PARTS}
    ),
    "hybrid-random": Entry(
        lambda plan: RandomMoves(_hybrid_optimizer(plan, inline=False), plan.seed), HYBRID
    ),
    "hybrid-tail-off": Entry(_hybrid_tail_off, HYBRID, {"tail": 0.3}),
    "adamw-gain": Entry(_adamw, defaults={"gain": 1.5}),
    "adamw-x1.5": Entry(
        _adamw, planted="AdamW with 1.5 times the gradients it is said to have", budget_factor=1.5
    ),
    "adamw-again": Entry(_adamw, planted="AdamW with other weights and batches", seed_shift=1000),
}
