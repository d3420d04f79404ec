"""Lion (Chen et al., arXiv 2302.06675).

    update  = sign(β1 · exp_avg + (1 - β1) · gradient)
    exp_avg ← β2 · exp_avg + (1 - β2) · gradient
    weight  ← (1 - lr · weight_decay) · weight - lr · update

Its authors use betas of (0.9, 0.99), a third to a tenth of AdamW's learning rate, and as many times
its weight decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_hybrid.kernels.rows import EXP_AVG, load_row, store_row
from triton_hybrid.kernels.scalars import BETA1, BETA2
from triton_hybrid.kernels.update_rule import Block, UpdateRule
from triton_hybrid.rules.adamw import FIRST_MOMENT
from triton_hybrid.rules.rule import Betas, Rule, no_denominator


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def _constants(row, step, rate, STATE: tl.constexpr):
    size = rate.to(STATE)
    rate1, rate2 = 1.0 - tl.load(row + BETA1), 1.0 - tl.load(row + BETA2)
    return size, rate1.to(STATE), rate2.to(STATE), size, size


@triton.jit
def _direction(
    addresses, tensor, begin, length, g, rate1, rate2, c, d,
    STATE: tl.constexpr, UPDATE_TYPE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    m = load_row(addresses, EXP_AVG, tensor, begin, length, STATE, STATE, BLOCK, FULL)
    direction = _sign(m + rate1 * (g - m))
    m = m + rate2 * (g - m)
    store_row(addresses, EXP_AVG, tensor, begin, length, m, STATE, STATE, BLOCK, FULL)
    return direction, direction


@triton.jit
def _along(
    addresses, tensor, begin, length, x, denominator,
    STATE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    return _sign(x)


class _Torch:
    """Lion in plain torch; its direction waits in the block's scratch memory for `compare`."""

    takes_lists = False

    def update(self, block: Block) -> None:
        numbers, m, direction = block.numbers, block.rows["exp_avg"], block.scratch[0]
        direction.copy_(torch.lerp(m, block.g, numbers.rate1)).sign_()
        m.lerp_(block.g, numbers.rate2)
        block.w.mul_(numbers.decay).sub_(numbers.lr * direction)

    def compare(self, block: Block) -> tuple[Tensor, Tensor, Any]:
        ahead = torch.sign(block.rows["slow_ema"], out=block.scratch[1])
        return block.scratch[0], ahead, block.numbers.lr**2

    def numbers(self, rows: Tensor, step: Tensor) -> list[Tensor]:
        return [torch.zeros_like(step)] * 4

    def along(self, rows: Mapping[str, Tensor], x: Tensor, numbers: Any, out: Tensor) -> Tensor:
        return torch.sign(x, out=out[0])


LION = Rule(
    name="lion",
    kernels=UpdateRule(
        _constants, _direction, no_denominator, _along, _Torch(), ("exp_avg",), ("exp_avg",)
    ),
    rows=(FIRST_MOMENT,),
    betas=lambda group, _: Betas(group["betas"], exp_avg=group["betas"][1]),
)
