"""The tasks of the frontier, by name. Real or generated data, nothing is downloaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from frontier.tasks.base import Batch, Task
from frontier.tasks.images import Pictures
from frontier.tasks.pde import Poisson
from frontier.tasks.tables import DigitsConvolution, DigitsFullBatch, Tabular
from frontier.tasks.text import FineTuning, LanguageModel

__all__ = ["TASKS", "Batch", "Task", "build_task"]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        LanguageModel,
        DigitsConvolution,
        DigitsFullBatch,
        Pictures,
        Poisson,
        FineTuning,
        Tabular,
    )
}
SHORT_NAMES = {"batch": "batch_size"}


def build_task(name: str, options: Mapping[str, Any]) -> Task:
    """Returns a task of `TASKS`; its options are its fields, ``batch`` is short for ``batch_size``.

    Raises:
        ValueError: An unknown task or option, or a value out of range.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r}: must be one of {sorted(TASKS)}")
    known = {field.name: type(field.default) for field in dataclasses.fields(TASKS[name])}
    values: dict[str, Any] = {}
    for given, value in options.items():
        option = SHORT_NAMES.get(given, given)
        if option not in known:
            raise ValueError(f"option {given!r} of task {name!r}: must be one of {sorted(known)}")
        if type(value) is not known[option]:
            raise ValueError(f"{given}={value!r}: must be of type {known[option].__name__}")
        values[option] = value
    return TASKS[name](**values)
