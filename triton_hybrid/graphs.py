"""Steps replayed from CUDA graphs: one for each kind of step, selected on the host.

With ``capturable=True`` nobody asks the device what comes next, so the phases follow a schedule
that the host knows: what a step launches is a function of numbers on the host, its *kind*. A graph
is a step of one kind with everything baked in but what lies in device memory: weights, gradients,
state, learning rates. Those the host uploads before a replay, as an eager step does.
"""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from triton_hybrid.capturing import SCALED
from triton_hybrid.engine import Engine
from triton_hybrid.groups import every_parameter, first_device
from triton_hybrid.hooked import HookedStep, eager, evaluated
from triton_hybrid.kernels.capture import CAPTURED_ON
from triton_hybrid.kernels.launch import on_device
from triton_hybrid.optimizer import HybridOptimizer
from triton_hybrid.phases import NOBODY_ASKED, Phase

_PLAIN = (bool, int, float)


class GraphedSteps:
    """Takes the steps of an optimizer from CUDA graphs, as soon as it has captured them.

    ``graphs.step()`` stands for ``optimizer.step()`` in either drive, and leaves the same bits.
    Steps run eagerly at first. A kind of step that comes again in a later cycle is captured, which
    does nothing on the device, and replayed; from then on it is replayed. Everything else goes on
    between the steps as usual: schedulers, `observe_loss`, accumulation, `verified_weights`,
    checkpoints, writes to weights. Whatever makes the optimizer bind its memory anew (a checkpoint
    loaded, other parameters) drops the graphs, and they are captured again.

    Gradients must stay in their memory: ``optimizer.zero_grad(set_to_none=False)``. A capture waits
    for the device; replays never do. `stats` counts a replay's host time for the phase of the call.

    Args:
        optimizer: Made with ``capturable=True``, on a CUDA device.

    Attributes:
        optimizer: The same.

    Raises:
        TypeError: Not a HybridOptimizer.
        ValueError: ``capturable=False``, offloaded state, or parameters on another kind of device.
        NotImplementedError: Several ranks.
    """

    def __init__(self, optimizer: HybridOptimizer) -> None:
        if not isinstance(optimizer, HybridOptimizer):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}: must be a HybridOptimizer, without "
                "wrappers (triton_hybrid.find looks through them)"
            )
        settings = optimizer._settings
        if not settings.capturable:
            raise ValueError("capturable=False: must be True for steps in CUDA graphs")
        if settings.config.offload != "none":
            raise ValueError(
                f"offload={settings.config.offload!r}: must be 'none', a graph keeps the addresses "
                "of state, which moves"
            )
        self.optimizer = optimizer
        self._check_place()
        me = weakref.proxy(self)  # no cycle, which would keep graphs until the garbage is collected
        self._announced = HookedStep.profile_hook_step(lambda _, closure=None: me._step(closure))
        self.reset()

    def reset(self) -> None:
        """Drops the graphs, and begins anew with eager steps; after gradients were moved."""
        self._graphs: dict[Any, tuple[Any, Any]] = {}  # with what the predictors know afterwards
        self._ran: dict[Any, int] = {}  # how often steps of a kind ran eagerly
        self._last: Any = None  # the kind of the last step
        self._present: list[list[bool]] = []  # who had a gradient then
        self._places: list[list[int]] = []  # of the gradients that were captured
        self._engine: weakref.ref[Engine] | None = None
        self._pool: Any = None  # what one step allocates, all others may use: none outlives it
        self._stream: Any = None

    @eager
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As `HybridOptimizer.step`, hooks included.

        Raises:
            RuntimeError: Gradients are in other memory than when they were captured, or a
                GradScaler was used; nothing has changed.
        """
        optimizer = self.optimizer
        if optimizer._scaler() is not None:
            raise RuntimeError(f"GraphedSteps: {SCALED}")
        if optimizer._engine is None or optimizer._engine is not self._bound():
            self._check_place()
            self.reset()
            loss = optimizer.step(closure)
            if optimizer._engine is not None:
                self._engine = weakref.ref(optimizer._engine)
            return loss
        return self._announced(optimizer, closure)

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def _bound(self) -> Engine | None:
        """The engine whose steps are captured."""
        return None if self._engine is None else self._engine()

    def _check_place(self) -> None:
        device = first_device(self.optimizer.param_groups)
        if device.type not in CAPTURED_ON:
            raise ValueError(
                f"the parameters are on {device}: must be on a CUDA device; elsewhere there are no "
                "graphs, use optimizer.step()"
            )
        if self.optimizer._binding.ranks.together:
            raise NotImplementedError(
                "GraphedSteps on several ranks is not built: replays would not find out where one "
                "rank disagrees; use optimizer.step(), or process_group=False"
            )

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        optimizer, binding = self.optimizer, self.optimizer._binding
        optimizer._forget_swaps()
        phase, groups = optimizer.phase, optimizer.param_groups
        if phase is Phase.PREDICT:
            binding.unread.mention(groups)
        loss = evaluated(optimizer, closure) if phase.needs_gradient else None
        started = time.perf_counter()
        engine = binding.bind(groups, optimizer.state)  # uploads what has changed
        if engine is None:
            return loss
        ready = engine is self._bound() and (phase is Phase.PREDICT or self._has_gradients(engine))
        if not ready:
            _eager_step(optimizer)  # the next one begins anew, if the engine is another
            return loss
        kind, runs = self._kind(engine), self._ran
        # What comes again later comes periodically; the first cycles have kinds of their own.
        often = runs.get(kind, 0) > (self._last == kind) * optimizer.hybrid.full_steps
        self._last = kind
        if kind in self._graphs:
            graph, after = self._graphs[kind]
            graph.replay()
            self._go_on(engine, phase, after, started)
        elif often and phase is not Phase.WARMUP:
            self._graphs[kind] = graph, _ = self._capture(engine)
            graph.replay()
        else:
            _eager_step(optimizer)
            runs[kind] = runs.get(kind, 0) + 1
        return loss

    def _has_gradients(self, engine: Engine) -> bool:
        """Whether there are any; begins anew where other tensors have some than before."""
        if not engine.take_gradients():
            return False
        sets = [batch.tensors for batch in engine.batches]
        if [its.present for its in sets] != self._present:
            self.reset()
            self._engine = weakref.ref(engine)
            self._present = [its.present for its in sets]
        windows = self.optimizer._binding.windows
        if windows is not None:
            windows.require_count()
        places = [its.places_of("grad") for its in sets]
        if not self._graphs:
            self._places = places
        elif places != self._places:
            engine.release_gradients()
            raise RuntimeError(
                "gradients are in other memory than when the step was captured: let them stay "
                "there (optimizer.zero_grad(set_to_none=False), and the memory order of their "
                "parameters), or call reset() to capture anew"
            )
        return True

    def _kind(self, engine: Engine) -> Any:
        """Everything on the host that decides what the coming step launches."""
        controller, predictor = self.optimizer._progress.controller, engine.predictor
        numbers = [tuple(its.items()) for its in _numbers(engine).values()]
        return controller.kind, predictor.ready, engine.stretches.known, *numbers

    def _capture(self, engine: Engine) -> tuple[Any, dict[Any, dict[str, Any]]]:
        """A graph of the coming step, and its predictors' numbers after it.

        The host goes on as after an eager step; the device waits for the replay.
        """
        for batch in engine.batches:
            batch.tensors.tables()  # no upload is left for the capture
        with on_device(engine.device), self._unless_it_fails(engine):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._stream = torch.cuda.Stream(engine.device)  # type: ignore[no-untyped-call]
            graph = torch.cuda.CUDAGraph()
            # The threads of a loader that pins memory may go on meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):
                _eager_step(self.optimizer)
        return graph, _numbers(engine)

    @contextmanager
    def _unless_it_fails(self, engine: Engine) -> Iterator[None]:
        """Puts the host back to before a capture that raises: the device did nothing."""
        progress, windows = self.optimizer._progress, self.optimizer._binding.windows
        changed = [progress.controller, windows, engine, *_numbers(engine)]
        dicts = [
            progress.steps,
            progress.seconds,
            *(vars(its) for its in changed if its is not None),
        ]
        before = [dict(its) for its in dicts]
        try:
            yield
        except BaseException:
            for its, values in zip(dicts, before):
                its.update(values)  # type: ignore[arg-type]
            raise

    def _go_on(self, engine: Engine, phase: Phase, after: Any, started: float) -> None:
        """Does on the host what an eager step does: as in `HybridOptimizer.step`."""
        optimizer, progress = self.optimizer, self.optimizer._progress
        controller, predictor = progress.controller, engine.predictor
        for its, values in after.items():
            vars(its).update(values)
        progress.steps[phase] += 1
        if phase is Phase.PREDICT:
            controller.after_prediction(alone=predictor.keeps_pairs)
        else:
            engine.end_gradient()
            controller.after_gradient(NOBODY_ASKED, predictor.ready, predictor.refit_steps)
            while optimizer.hybrid.inline and controller.phase is Phase.PREDICT:
                controller.after_prediction(alone=predictor.keeps_pairs)
                progress.steps[Phase.PREDICT] += 1
            engine.release_gradients()
            windows = optimizer._binding.windows
            if windows is not None:
                windows.close(every_parameter(optimizer.param_groups))
        progress.seconds[phase] += time.perf_counter() - started


def _eager_step(optimizer: HybridOptimizer) -> None:
    """A step without hooks, which were called already."""
    inspect.unwrap(type(optimizer).step)(optimizer)


def _numbers(engine: Engine) -> dict[Any, dict[str, Any]]:
    """Of the predictors, the attributes by which they decide on the host."""
    return {
        its: {name: value for name, value in vars(its).items() if isinstance(value, _PLAIN)}
        for its in (engine.choice, engine.predictor)
    }
