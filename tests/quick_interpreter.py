"""Triton's interpreter without what it repeats."""

from __future__ import annotations

import functools
from typing import Any


def patch_language_once_a_launch() -> None:
    """Lets the interpreter patch `triton.language` once a launch.

    It does so again at every call of a device function, of which a launch makes up to a hundred:
    of 14 steps with both backends that took 6.0 s, 2.5 s.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[tuple[bool, ...]] = set()

    @functools.cache
    def seen_by(function: Any) -> tuple[bool, ...]:
        values = [*function.__globals__.values()]
        return tuple(any(value is module for value in values) for module in (tl, tl.core))

    def patch_once(function: Any) -> Any:
        modules = seen_by(function)
        if modules in done:
            return None  # of a device function nobody takes it
        done.add(modules)
        return patch(function)

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        done.clear()
        run(executor, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch
