"""The predictors: models of where training goes. A file each; here they are registered."""

from __future__ import annotations

from collections.abc import Callable

from triton_hybrid.config import HybridConfig
from triton_hybrid.predictors.auto import Auto
from triton_hybrid.predictors.linear import Linear
from triton_hybrid.predictors.nothing import Nothing
from triton_hybrid.predictors.predictor import Choice
from triton_hybrid.predictors.secant import Secant
from triton_hybrid.predictors.slow_ema import SlowEMA

PREDICTORS: dict[str, Callable[[HybridConfig], Choice]] = {
    predictor.name: predictor for predictor in (Auto, SlowEMA, Secant, Linear, Nothing)
}
"""Every predictor by its value of ``HybridConfig.predictor``."""
