from __future__ import annotations

import dataclasses
import json

import pytest

from triton_hybrid import HybridConfig

BAD = [
    ("warmup_steps", -1),
    ("warmup_steps", 1.5),
    ("warmup_steps", True),
    ("full_steps", 0),
    ("full_steps", "3"),
    ("max_predict_steps", 0),
    ("correction_interval", 0),
    ("divergence_threshold", 0.0),
    ("divergence_threshold", float("nan")),
    ("divergence_threshold", float("inf")),
    ("divergence_threshold", "2"),
    ("confidence_threshold", -0.1),
    ("confidence_threshold", 1.1),
    ("confidence_threshold", None),
    ("predictor", "magic"),
    ("predictor", None),
    ("history", 0),
    ("history", 33),
    ("slow_beta", 0.0),
    ("slow_beta", 1.0),
    ("inline", 1),
    ("offload", "disk"),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_value_names_field_value_and_range(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"must be") as error:
        HybridConfig(**{field: value})
    assert f"{field}={value!r}" in str(error.value)


def test_quick_validation_is_the_sources_run() -> None:
    config = HybridConfig.quick_validation()
    assert (config.warmup_steps, config.full_steps, config.max_predict_steps) == (5, 10, 5)
    assert config.correction_interval == 2
    assert (config.divergence_threshold, config.confidence_threshold) == (2.5, 0.3)


def test_dict_round_trip_through_json() -> None:
    config = HybridConfig(full_steps=7, predictor="linear", inline=False)
    assert HybridConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match="full_step=3"):
        HybridConfig.from_dict({"full_step": 3})
    for other in (None, 3, "full_steps", [1]):
        with pytest.raises(ValueError, match=r"values=.*must be a dictionary of fields"):
            HybridConfig.from_dict(other)


def test_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        HybridConfig().full_steps = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        HybridConfig(3)  # type: ignore[misc]
