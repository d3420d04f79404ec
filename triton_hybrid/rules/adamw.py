"""AdamW (Loshchilov and Hutter, arXiv 1711.05101).

exp_avg    ← β1 · exp_avg    + (1 - β1) · gradient
exp_avg_sq ← β2 · exp_avg_sq + (1 - β2) · gradient²
update     = exp_avg / (1 - β1ᵗ) / (√(exp_avg_sq / (1 - β2ᵗ)) + ε)
weight     ← (1 - lr · weight_decay) · weight - lr · update
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_hybrid.kernels.rows import EXP_AVG, address_row, load_row, store_row
from triton_hybrid.kernels.scalars import (
    BETA1,
    BETA2,
    EPS,
    HYPER,
    LOG_BETA2,
    LOG_EXP_AVG,
    precise_div,
    precise_sqrt,
    precise_sqrt_torch,
)
from triton_hybrid.kernels.update_rule import Block, UpdateRule
from triton_hybrid.rules.rule import Rule
from triton_hybrid.state import Home, StateRow

EXP_AVG_SQ = address_row("exp_avg_sq")


# A trajectory's slope is measured by the first prediction in a row.
FIRST_MOMENT = StateRow(
    "exp_avg",
    home=Home.LENT,
    when=lambda plan: plan.gradient or plan.first or not plan.trajectory,
)
SECOND_MOMENT = replace(FIRST_MOMENT, name="exp_avg_sq")
MOMENTS = (FIRST_MOMENT.name, SECOND_MOMENT.name)


@triton.jit
def _constants(row, step, rate, STATE: tl.constexpr):
    correction1 = 1.0 - tl.exp(step * tl.load(row + LOG_EXP_AVG))
    correction2 = 1.0 - tl.exp(step * tl.load(row + LOG_BETA2))
    size = (rate / correction1).to(STATE)
    # In FP32, 1 - 0.999 is off by 7e-6 of itself.
    rate1 = (1.0 - tl.load(row + BETA1)).to(STATE)
    rate2 = (1.0 - tl.load(row + BETA2)).to(STATE)
    return size, rate1, rate2, tl.sqrt(correction2).to(STATE), tl.load(row + EPS).to(STATE)


@triton.jit
def _direction(
    addresses, tensor, begin, length, g, rate1, rate2, root_correction2, eps,
    STATE: tl.constexpr, UPDATE_TYPE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    m = load_row(addresses, EXP_AVG, tensor, begin, length, STATE, STATE, BLOCK, FULL)
    # Ones beyond the end keep the quotients finite there, also where eps is 0.
    v = load_row(addresses, EXP_AVG_SQ, tensor, begin, length, STATE, STATE, BLOCK, FULL, 1.0)
    m = m + rate1 * (g - m)
    v = v + rate2 * (g * g - v)
    denominator = precise_div(precise_sqrt(v), root_correction2) + eps
    store_row(addresses, EXP_AVG, tensor, begin, length, m, STATE, STATE, BLOCK, FULL)
    store_row(addresses, EXP_AVG_SQ, tensor, begin, length, v, STATE, STATE, BLOCK, FULL)
    return precise_div(m, denominator), denominator


@triton.jit
def _denominator(
    addresses, tensor, begin, length, rate1, rate2, root_correction2, eps,
    STATE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    v = load_row(addresses, EXP_AVG_SQ, tensor, begin, length, STATE, STATE, BLOCK, FULL, 1.0)
    return precise_div(precise_sqrt(v), root_correction2) + eps


@triton.jit
def _along(
    addresses, tensor, begin, length, x, denominator,
    STATE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    return precise_div(x, denominator)


class _Torch:
    """AdamW in plain torch.

    On the CPU by torch's own fused operator. Measured on 2 cores with GPT-2 small: it takes 0.09 s,
    plain operations block by block 0.31 s, ``AdamW(foreach=True)`` 0.38 s.
    """

    takes_lists = True

    def update(self, block: Block) -> None:
        numbers = block.numbers
        m, v = block.rows["exp_avg"], block.rows["exp_avg_sq"]
        if isinstance(numbers.lr, float):
            torch._fused_adamw_(
                block.w, block.g, m, v, [], block.step,
                lr=numbers.lr, beta1=numbers.beta1, beta2=numbers.beta2,
                weight_decay=numbers.weight_decay, eps=numbers.eps,
                amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        g = block.g
        m.add_(numbers.rate1 * (g - m))
        v.add_(numbers.rate2 * (g * g - v))
        denominator = v.sqrt() / numbers.root_correction2 + numbers.eps
        block.w.mul_(numbers.decay).sub_(numbers.size * (m / denominator))

    def compare(self, block: Block) -> tuple[Tensor, Tensor, Any]:
        rows, numbers, out = block.rows, block.numbers, block.scratch
        eps = numbers.eps * numbers.root_correction2
        denominator = torch.sqrt(rows["exp_avg_sq"], out=out[0]).add_(eps)
        ahead = torch.div(rows["slow_ema"], denominator, out=out[1])
        update = torch.div(rows["exp_avg"], denominator, out=denominator)
        return update, ahead, (numbers.size * numbers.root_correction2) ** 2

    def numbers(self, rows: Tensor, step: Tensor) -> list[Tensor]:
        rates = [1.0 - rows[:, HYPER[name]] for name in ("beta1", "beta2")]
        root = (1.0 - (step * rows[:, HYPER["log_beta2"]]).exp()).sqrt()
        return [*rates, root, rows[:, HYPER["eps"]]]

    def along(self, rows: Mapping[str, Tensor], x: Tensor, numbers: Any, out: Tensor) -> Tensor:
        _, _, root, eps = numbers
        denominator = precise_sqrt_torch(rows["exp_avg_sq"], out[1]).div_(root).add_(eps)
        return torch.div(x, denominator, out=out[0])


ADAMW = Rule(
    name="adamw",
    kernels=UpdateRule(
        _constants, _direction, _denominator, _along, _Torch(), MOMENTS, MOMENTS, MOMENTS[1:]
    ),
    rows=(FIRST_MOMENT, SECOND_MOMENT),
)
