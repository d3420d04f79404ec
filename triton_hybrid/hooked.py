"""What surrounds ``step``: no gradients are recorded, nothing is compiled, hooks are called.

And nothing is cast automatically, which would round the products of matrices.

Torch's own decorators of these take 20 calls of Python functions, 20 µs a step; here each is left
out where it would do nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer

try:
    from torch._C._dynamo.eval_frame import get_eval_frame_callback  # in no manual, as the next
except ImportError:
    get_eval_frame_callback = None  # type: ignore[assignment]

_GLOBAL = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
_OWN_PRE, _OWN_POST = "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"
_NOTHING = nullcontext()
Step = Callable[..., Any]


def eager(step: Step) -> Step:
    """A step without gradients, which ``torch.compile`` leaves as it is."""
    anywhere: Step = torch._dynamo.disable(torch.no_grad()(step))  # type: ignore[no-untyped-call]
    if get_eval_frame_callback is None:
        return anywhere

    @functools.wraps(step)
    def called(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        if torch.compiler.is_compiling() or get_eval_frame_callback() is not None:
            return anywhere(self, closure)
        before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return step(self, closure)
        finally:
            torch._C._set_grad_enabled(before)

    return called


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Switches autocast off on a kind of device."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else _NOTHING


def evaluated(optimizer: Any, closure: Callable[[], Any] | None) -> Any:
    """What a closure returns, if there is one; a loss of one number is observed."""
    if closure is None:
        return None
    with torch.enable_grad():
        loss = closure()
    if isinstance(loss, float) or (isinstance(loss, Tensor) and loss.numel() == 1):
        optimizer.observe_loss(loss)
    windows = optimizer._binding.windows
    if windows is not None:
        windows.closure_ran()
    return loss


class HookedStep:
    """An optimizer whose steps are announced to hooks and to a running profiler."""

    @staticmethod
    def profile_hook_step(func: Step) -> Step:
        """What torch wraps ``step`` in, left out where nobody listens."""
        announced = Optimizer.profile_hook_step(func)
        everywhere = [getattr(torch_optimizer, name, None) for name in _GLOBAL]
        if None in everywhere:  # a torch that keeps them elsewhere
            return announced
        before, after = everywhere

        @functools.wraps(func)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            own = self.__dict__
            heard = before or after or own.get(_OWN_PRE) or own.get(_OWN_POST)
            if heard or _profiler_enabled():
                return announced(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return step
