"""The parameters of GPT-2 small, without needing transformers."""

from __future__ import annotations

PARAMETERS = 124_439_808


def gpt2_small_shapes() -> list[tuple[int, ...]]:
    """The 148 shapes, in the model's order; the output layer shares the first one."""
    width, vocabulary, positions, layers = 768, 50257, 1024, 12
    block: list[tuple[int, ...]] = [
        (width,), (width,),
        (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,),
        (width, 4 * width), (4 * width,), (4 * width, width), (width,),
    ]  # fmt: skip
    return [(vocabulary, width), (positions, width), *(block * layers), (width,), (width,)]
