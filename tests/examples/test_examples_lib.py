"""What the examples share: statistics, stored runs, flags, progress, files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from lib import flags
from lib.environment import environment
from lib.files import replacing, write_json
from lib.progress import progress
from lib.run_store import RunStore, run_key
from lib.statistics import bootstrap, estimate, estimate_ratio, paired_percent, paired_ratios

# -------------------------------------------------------------------------------- statistics


def test_t_tests_agree_with_scipy() -> None:
    ours, theirs = [5.1, 5.3, 5.0, 5.6], [5.0, 5.25, 5.1, 5.2]
    found = paired_ratios(ours, theirs)
    expected = stats.ttest_rel(np.log(ours), np.log(theirs))
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert math.log(found.low or 0) == pytest.approx(interval.low, rel=1e-9)
    assert math.log(found.high or 0) == pytest.approx(interval.high, rel=1e-9)
    assert found.values == pytest.approx(np.divide(ours, theirs))
    inverse = paired_ratios(theirs, ours)
    assert inverse.p_value == pytest.approx(found.p_value)
    assert inverse.mean == pytest.approx(1 / found.mean)
    percent = paired_percent(ours, theirs)
    differences = 100 * (np.divide(ours, theirs) - 1)
    assert percent.p_value == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=1e-9)


def test_the_intervals_are_the_textbook_ones() -> None:
    # Mean 2, standard error 1/sqrt(3), t(2, 97.5%) = 4.302653.
    percent = paired_percent([101.0, 102.0, 103.0], [100.0] * 3)
    assert percent.p_value == pytest.approx(0.0741799, rel=1e-5)
    for found in (estimate([1.0, 2.0, 3.0]), percent):
        assert found is not None
        assert found.mean == pytest.approx(2.0)
        assert found.high == pytest.approx(2.0 + 4.302653 / math.sqrt(3.0))
        assert found.low == pytest.approx(2.0 - 4.302653 / math.sqrt(3.0))
    assert estimate([]) is None
    single = estimate([4.0])
    assert single is not None
    assert single.interval() == {"mean": 4.0, "low": None, "high": None, "n": 1}
    ratio = estimate_ratio([2.0, 0.5])
    assert ratio is not None
    assert ratio.mean == pytest.approx(1)
    far_apart = estimate_ratio([1e-300, 1e300])
    assert far_apart is not None
    assert math.isfinite(far_apart.high or math.inf)


def test_the_bootstrap_is_that_of_students_t_where_values_are_normal() -> None:
    assert bootstrap([1.0, 2.0, 3.0, 4.0]) is None
    values = np.random.default_rng(0).normal(size=30).tolist()
    found, student = bootstrap(values), estimate(values)
    assert found is not None
    assert student is not None
    assert found.low == pytest.approx(student.low, abs=0.05)
    assert found == bootstrap(values)


def test_no_test_without_spread() -> None:
    single = paired_ratios([2.0], [1.0])
    assert (single.mean, single.low, single.high, single.p_value) == (2, None, None, None)
    same = paired_ratios([2.0, 4.0], [1.0, 2.0])
    assert (same.mean, same.p_value) == (pytest.approx(2), None)
    assert same.low == same.high == pytest.approx(2)
    tiny = estimate([1e-13, 2e-13, 3e-13])
    assert tiny is not None
    assert tiny.low != tiny.high, "small numbers have a spread too"


@pytest.mark.parametrize(
    "bad", [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([math.nan], [1.0])]
)
@pytest.mark.parametrize("compare", [paired_ratios, paired_percent])
def test_what_cannot_be_compared_is_refused(
    bad: tuple[list[float], list[float]], compare: Any
) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        compare(*bad)


# ------------------------------------------------------------------------------------- files


def test_a_run_is_found_by_its_key(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "runs.jsonl"
    store = RunStore(path, ("trial", "surroundings"))
    trial, around = {"name": "a", "rates": (1, 2)}, {"text": "b"}
    store.add({"trial": trial, "surroundings": around, "loss": 3.0})
    for known in (store, RunStore(path, ("trial", "surroundings"))):
        found = known.get({"rates": [1, 2], "name": "a"}, around)
        assert found is not None
        assert found["loss"] == 3.0
        assert known.get(trial, {"text": "c"}) is None
    written = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.add({"trial": 1, "surroundings": 2, "loss": math.inf})
    assert path.read_bytes() == written


def test_a_key_depends_on_every_field_and_not_on_their_order() -> None:
    assert run_key({"a": 1, "b": [2]}) == run_key({"b": [2], "a": 1}) == "0855bfc20eb6cfaa"
    assert run_key({"a": 1, "b": [3]}) != run_key({"a": 1, "b": [2]})


def test_torn_lines_are_left_out_and_do_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"key": "a", "n": 1}\n\n{"key": "a", "n": 2}\n{"key": "torn", "fin')
    with pytest.warns(UserWarning, match=r"runs.jsonl:4: is not JSON"):
        store = RunStore(path)
    assert store.lines == [{"key": "a", "n": 1}], "of equal keys the first counts"
    store.add({"key": "b"})
    with pytest.warns(UserWarning, match="is not JSON"):
        again = RunStore(path)
    assert again.lines == store.lines == [{"key": "a", "n": 1}, {"key": "b"}]
    path.write_text("3\n")
    with pytest.raises(ValueError, match="'3' is not a JSON object with a key"):
        RunStore(path)


def test_files_are_strict_json_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"nan": math.nan, 1: (math.inf, 2.5, True), "folder": tmp_path})
    assert json.loads(path.read_text()) == {
        "nan": None, "1": [None, 2.5, True], "folder": str(tmp_path)
    }  # fmt: skip
    before = path.read_bytes()
    with contextlib.suppress(ArithmeticError), replacing(path) as part:
        part.write_text("half")
        raise ArithmeticError
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_environment_has_what_results_depend_on() -> None:
    found = environment(torch.device("cpu"), ["scipy", "not_there"])
    assert found["hardware"]["threads"] == torch.get_num_threads()
    assert found["hardware"]["processor"]
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["versions"]["scipy"]
    assert found["versions"]["not_there"] is None


# ---------------------------------------------------------------------------- flags, progress


CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Options:
    rates: Annotated[tuple[float, ...], flags.real_number(0, 1, above=True, many=True)] = (0.5,)
    count: Annotated[int, flags.whole_number(1, 9)] = 2
    name: Annotated[str, flags.choice(("one", "two"))] = "one"
    device: Annotated[torch.device, flags.device()] = CPU
    quick: bool = False


def test_flags_become_values() -> None:
    given = "--rates 1e-3 0.25 --count=9 --name two --device cpu --quick"
    found = flags.parse(Options, given.split())
    assert found == Options((1e-3, 0.25), 9, "two", CPU, True)
    assert flags.parse(Options, []) == Options()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--rates 0.1 0", "--rates: '0' is not possible; allowed: numbers above 0 and below 1"),
        ("--rates nan", "--rates: 'nan' is not possible; allowed: numbers above 0 and below 1"),
        ("--rates", "--rates: '' is not possible; allowed: one or more values, each once"),
        ("--rates 0.1 0.1", "--rates: '0.1 0.1' is not possible; allowed: one or more values"),
        ("--count 10", "--count: '10' is not possible; allowed: whole numbers from 1 to 9"),
        ("--count 1.5", "--count: '1.5' is not possible; allowed: whole numbers from 1 to 9"),
        ("--name three", "--name: 'three' is not possible; allowed: one, two"),
        ("--device abacus", "--device: 'abacus' is not possible; allowed: auto, cpu"),
        ("--quicker", "Unrecognized options: --quicker"),
    ],
)
def test_bad_flags_are_refused(given: str, message: str, refusal: Any) -> None:
    assert message in refusal(lambda: flags.parse(Options, given.split()))


def test_progress_shows_at_once_where_there_is_no_terminal(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    with path.open("w") as file:
        console = Console(file=file, width=40)
        with progress(console, 2000, "steps", seconds_between_lines=0) as report:
            report(1000, "a rather long name of what is going on")
            assert path.read_text().startswith("a rather long name of what is going on: 1,000 of 2")
        with progress(console, 10, "steps") as report:
            report(1, "first")
            report(5, "too soon")
            report(10, "done")
    ends = "first: 1 of 10 steps, 0:00:00 left", "done: 10 of 10 steps, 0:00:00 left"
    assert path.read_text().splitlines()[1:] == list(ends)
