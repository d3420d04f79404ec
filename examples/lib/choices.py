"""What fields of HybridConfig may be: the one place here that knows where the library says it."""

from __future__ import annotations

from triton_hybrid.config import OFFLOADS, predictor_names

__all__ = ["OFFLOADS", "PREDICTORS"]

PREDICTORS = predictor_names()
