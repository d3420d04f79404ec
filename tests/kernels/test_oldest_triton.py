"""What the oldest supported Triton, 3.2, cannot do, and newer ones can."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import triton_hybrid.kernels

FILES = sorted(Path(triton_hybrid.kernels.__path__[0]).glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_constant_stands_beside_a_tensor_in_a_bitwise_operation(path: Path) -> None:
    """Its interpreter has no builder of 1-bit constants (`get_int1_ty`)."""
    for function in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        constants = {
            argument.arg
            for argument in function.args.args
            if argument.annotation is not None
            and ast.unparse(argument.annotation) == "tl.constexpr"
        }
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.BitAnd):
                sides = {side.id for side in (node.left, node.right) if isinstance(side, ast.Name)}
                assert not sides & constants, f"{path.name}:{node.lineno}: {ast.unparse(node)}"
