"""The data sets that come with scikit-learn: real data without a download."""

from __future__ import annotations

from typing import Any


def scikit_datasets() -> Any:
    """Returns ``sklearn.datasets``; a RuntimeError says where it comes from."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise RuntimeError(
            "scikit-learn is missing; it comes with pip install -e '.[benchmarks]'"
        ) from error
    return datasets
