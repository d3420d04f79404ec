"""The GPU suite without a GPU: its frame, its numbers, and every section in the interpreter."""

from __future__ import annotations

import importlib
import json
import math
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_suite_sections
import pytest
import torch
from fake_graphs import FakeGraph, graphs_made
from triton_hybrid.kernels.audit.cases import cases
from triton_hybrid.kernels.launch import INTERPRETED, default_tiling

from gpu import command, kernels, machine, muon, promises, runs
from gpu.command import SUITE, TRAINING, Options, Section, main, run
from gpu.context import Context, OutOfTimeError, different
from gpu.kernels import KINDS
from gpu.record import Record, SectionResult
from gpu.timing import DROPPED, ratios, spread, turns
from gpu.worker import Task, Worker
from lib.gpt2_shapes import PARAMETERS, gpt2_small_shapes
from triton_hybrid import AccumulationConfig, offload
from triton_hybrid.graphs import GraphedSteps
from triton_hybrid.phases import PhaseController

__all__ = ["graphs_made"]  # a fixture
pytestmark = pytest.mark.usefixtures("own_cache")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="the suite itself runs there")
CPU = torch.device("cpu")
Capture = pytest.CaptureFixture[str]


def context_for(result: SectionResult, **options: Any) -> Context:
    return Context(CPU, result.take, **{"seed": 5, **options})


def record_of(folder: Path, *results: SectionResult) -> Record:
    return Record(folder / "new" / "suite.json", 5, 8.0, list(results))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)
    return content


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize(("there", "words"), [(False, "no GPU"), (True, "TRITON_INTERPRET")])
def test_without_a_gpu_or_interpreted_nothing_is_measured(
    there: bool, words: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refused(["--output", str(tmp_path / "suite.json")])
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "an earlier result is not overwritten by nothing"


@pytest.mark.parametrize(
    "flags",
    [
        "--minutes 200", "--only barrier", "--output /dev/null/suite.json", "--only source",
        "--train --only muon",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("with_gpu")
def test_wrong_flags_are_refused(flags: str, capsys: Capture) -> None:
    refused(flags.split())
    assert flags.split()[-2 if len(flags.split()) > 1 else 0] in capsys.readouterr().err


@pytest.mark.usefixtures("with_gpu")
def test_the_chosen_sections_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fake(sections: Any, record: Record, seconds: float) -> int:
        names = ["environment", "barrier", "correctness", "memory", "muon"]
        names = ["environment", "source"] if record.benchmark == "gpu_train" else names
        assert [section.name for section in sections] == names
        assert [section.name for section in record.sections] == names
        assert seconds < 60.0 * record.minutes == 180.0
        return 0

    monkeypatch.setattr(command, "run", fake)
    output = tmp_path / "suite.json"
    flags = ["--minutes", "3", "--output", str(output), "--only"]
    assert main([*flags, "source", "--train"]) == 0
    assert main([*flags, "muon", "memory"]) == 0
    assert {section["status"] for section in read(output)["sections"]} == {"not run"}


@pytest.mark.parametrize("sections", [SUITE, TRAINING])
def test_sections_have_the_whole_time_and_can_be_imported(sections: tuple[Section, ...]) -> None:
    assert sum(section.share for section in sections) == pytest.approx(1.0)
    assert Options().seed is None, "fresh data each time"
    for section in sections:
        module, _, function = section.target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.fixture(autouse=True)
def _fakes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(gpu_suite_sections.__file__).parent))


def task(name: str, seconds: float = 60.0, **options: Any) -> Task:
    return Task(f"gpu_suite_sections:{name}", seconds, device="cpu", **options)


def test_a_worker_takes_section_after_section_until_one_hangs() -> None:
    worker = Worker()
    found = {}
    for name in ("good", "wrong", "late", "absent", "distrust", "missing"):
        found[name] = SectionResult(name, "")
        again = worker.run(task(name, cooperative=name != "distrust"), found[name], 1.0)
        assert again == (name not in ("late", "missing")), "what it has started may still run"
    assert found["good"].rows == [{"answer": 42, "number": math.inf, "nothing": None}]
    statuses = [result.status for result in found.values()]
    assert statuses == ["passed", "failed", "timeout", "skipped", "passed", "failed"]
    assert "missing" in str(found["missing"].error)
    hung = SectionResult("hang", "")
    assert not worker.run(task("hang", 0.5), hung, 0.2)
    assert (hung.status, hung.rows) == ("timeout", [{"first": 1}])
    assert "no answer" in str(hung.error)
    assert worker._process.poll() is not None


def test_what_crashes_or_fails_is_in_the_file_and_the_rest_runs(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("crash", "bad", "good")
    sections = [Section(name, name, 0.25, task(name).target) for name in names]
    record = record_of(tmp_path, *map(SectionResult, names, names))
    written, write = [], Record.write
    monkeypatch.setattr(Record, "write", lambda self: (written.append(1), write(self))[1])
    assert run(sections, record, 120.0, "cpu") == 1
    content = read(record.output)
    told = sum(len(s["rows"]) + len(s["checks"]) for s in content["sections"])
    assert len(written) == told + len(names) + 1, "what a section tells is in the file at once"
    assert [s["status"] for s in content["sections"]] == ["failed", "failed", "passed"]
    crash, bad, good = content["sections"]
    assert "status -11" in crash["error"]
    assert crash["rows"], "what was measured before stays"
    assert bad["error"].startswith("RuntimeError: the kernel is broken (gpu_suite_sections.py:")
    assert good["rows"] == [{"answer": 42, "number": None, "nothing": None}]
    assert (content["held"], content["seed"]) == (False, 5)
    assert "FAILED bad: RuntimeError: the kernel is broken" in capsys.readouterr().out
    assert run(sections, record_of(tmp_path, *map(SectionResult, names, names)), 0.0, "cpu") == 1
    assert {s["status"] for s in read(record.output)["sections"]} == {"not run"}


def test_what_holds_passes_and_untested_kernels_are_pointed_out(
    tmp_path: Path, capsys: Capture
) -> None:
    result, tests = SectionResult("environment", "Good"), SectionResult("correctness", "Tests")
    gpu_suite_sections.good(context_for(result))
    context_for(result).tell("fact", {"hardware": {"gpu": "none"}})
    result.end()
    tests.end()
    record = record_of(tmp_path, result, tests)
    record.write()
    record.show()
    assert read(record.output)["hardware"] == {"gpu": "none"}
    printed = capsys.readouterr().out
    assert "42" in printed
    assert printed.rstrip().splitlines()[-1].startswith("PASSED")
    tests.end(late=True)
    record.show()
    assert "not shown to be right" in capsys.readouterr().out


PASSES = "def test_one():\n    pass\n"
MIXED = f"import pytest\n{PASSES}def test_two():\n    assert 1 == 2, 'of no use'\n"
MIXED += "@pytest.mark.skip\ndef test_three():\n    pass\n"


def results_of(tmp_path: Path, **options: Any) -> SectionResult:
    result = SectionResult("correctness", "")
    names = [path.name for path in sorted(tmp_path.glob("test_*.py"))]
    machine.correctness(context_for(result, **options), names, tmp_path)
    result.end()
    return result


def test_results_of_tests_are_taken_over(tmp_path: Path) -> None:
    (tmp_path / "test_good.py").write_text(PASSES)
    (tmp_path / "test_mixed.py").write_text(MIXED)
    result = results_of(tmp_path)
    counts = [(r["file"], r["passed"], r["failed"], r["skipped"]) for r in result.rows]
    assert counts == [("test_good", 1, 0, 0), ("test_mixed", 1, 1, 1)]
    (failure,) = result.failures
    assert failure["name"] == "test_mixed::test_two"
    assert "of no use" in failure["detail"]


def test_where_the_barrier_does_not_hold_tests_do_not_wait_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(command: list[str], **_: Any) -> None:
        raise OSError(" ".join(command))

    monkeypatch.setattr(machine.subprocess, "Popen", refused)
    with pytest.raises(OSError, match=r"-p gpu\.fallback -k not cooperative"):
        results_of(tmp_path, cooperative=False)
    with pytest.raises(OSError, match="pytest tests/kernels/test_verify") as found:
        results_of(tmp_path)
    assert "fallback" not in str(found.value)


def test_tests_that_hang_or_cannot_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="status"):
        results_of(tmp_path)
    slow = f"import time\n{PASSES}def test_two():\n    open('begun', 'w').close()\n"
    (tmp_path / "test_slow.py").write_text(f"{slow}    time.sleep(600)\n")

    class LateOnceItHangs(subprocess.Popen[bytes]):
        """Its time is up when the second test has begun, and the first has been reported."""

        def wait(self, timeout: float | None = None) -> int:
            begun, busy = tmp_path / "begun", 120.0
            if timeout is not None and timeout > 1000.0:
                assert 3600.0 - machine.FAREWELL - 60.0 < timeout < 3600.0 - machine.FAREWELL
                while not begun.exists() and self.poll() is None and busy > 0:
                    time.sleep(0.1)
                    busy -= 0.1
                time.sleep(2.0)
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(machine.subprocess, "Popen", LateOnceItHangs)
    # On a busy machine pytest takes over 5 s to write its report.
    monkeypatch.setattr(machine, "FAREWELL", 60.0)
    result = SectionResult("correctness", "")
    context = context_for(result, deadline=time.monotonic() + 3600.0)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    try:
        with pytest.raises(OutOfTimeError):
            machine.correctness(context, ["test_slow.py"], tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [row["passed"] for row in result.rows] == [1]


def test_without_pytest_nothing_is_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "NEEDED", ("pytest", "no_such_module"))
    with pytest.raises(RuntimeError, match="no_such_module not installed"):
        machine.correctness(context_for(SectionResult("correctness", "")))


def test_contenders_take_turns_and_ratios_are_of_one_round() -> None:
    gpu = SimpleNamespace(on_gpu=True, check_time=lambda: None)
    order = list(turns("abc", 3, gpu))  # type: ignore[arg-type]
    assert len(order) == 3 * (DROPPED + 3)
    assert "".join(name for _, name in order[:6]) == "bcacab"
    assert [number for number, _ in order[::3]] == [-2, -1, 0, 1, 2]
    summary = {"median": 3.5, "p20": 2.0, "p80": 5.0, "samples": 6}
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == summary
    assert ratios([1.0, 4.0], [2.0, 8.0])["median"] == 0.5
    nan = torch.tensor([math.nan, 0.0])
    assert different([nan, torch.tensor(1.0)], [nan.clone(), torch.tensor(1.0)]) == 0
    assert different([nan], [-nan]) == 1
    with pytest.raises(OutOfTimeError):
        next(turns("a", 1, context_for(SectionResult("", ""), deadline=0.0)))


def test_sizes_are_compiled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles other code for the number 1 and for multiples of 16."""
    large = SimpleNamespace(multi_processor_count=148)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: large)
    chunk = default_tiling(torch.device("cuda")).chunk
    for lengths in kernels.SIZES.values():
        numbers = len(lengths), sum(-(-length // chunk) for length in lengths)
        assert all(number > 1 and number % 16 for number in numbers)
    assert sum(map(math.prod, gpt2_small_shapes())) == PARAMETERS == sum(kernels.SIZES["124M"])


@contextmanager
def counted_bytes(block: int) -> Iterator[dict[str, int]]:
    """Bytes that interpreted kernels read and write, in accesses of a whole block."""
    from triton.runtime.interpreter import InterpreterBuilder

    count = {"load": 0, "store": 0}
    with pytest.MonkeyPatch.context() as patch:
        for kind in count:
            plain = getattr(InterpreterBuilder, f"create_masked_{kind}")

            def counted(
                self: Any, pointers: Any, *more: Any, kind: str = kind, plain: Any = plain
            ) -> Any:
                if pointers.data.size == block:
                    mask = more[kind == "store"]
                    width = pointers.get_element_ty().primitive_bitwidth // 8
                    count[kind] += int(mask.data.sum()) * width
                return plain(self, pointers, *more)

            patch.setattr(InterpreterBuilder, f"create_masked_{kind}", counted)
        yield count


@interpreted
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " ".join(kind[:2]))
def test_kernels_move_the_bytes_that_are_counted(kind: kernels.Kind) -> None:
    (block,) = kernels.CHUNK
    known = {case.name: case for case in cases()}
    buffers = kernels.Buffers(context_for(SectionResult("", "")), (block,), kind)
    # What is counted on paper loads again what lies in a cache by then.
    names = [n for n in buffers.runs if n in known and known[n].reads]
    assert len(names) >= (14 if kind[0] == "adamw" else 2)
    for name in names:
        case = known[name]
        buffers.ready()
        with counted_bytes(block) as count:
            buffers.runs[name]()
        read = sum((*case.reads, *case.first_pass, *case.inner * case.times))
        # A second look at exp_avg_sq, which a compiled kernel has at hand.
        read += 4 * (name == "secant move fp32")
        assert count == {"load": read * block, "store": sum(case.writes) * block}, name
        moved = kernels.counted_bytes(case) + sum(case.first_pass)
        assert moved == case.bytes_per_element


def test_every_kernel_of_a_kind_is_touched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    runs = {name: partial(seen.append, name) for name in "ab"}
    fake = SimpleNamespace(ready=partial(seen.append, "ready"), runs=runs)
    monkeypatch.setattr(kernels, "Buffers", lambda *given: (seen.append(given[1:]), fake)[1])
    kernels.touch(3, "cpu", 5, True)
    assert seen == [(kernels.CHUNK, KINDS[3]), "ready", "a", "b"]


@interpreted
@pytest.mark.parametrize(
    "section", [s for s in (*SUITE, TRAINING[1]) if s.name != "correctness"], ids=lambda s: s.name
)
def test_a_section_runs(
    section: Section, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    monkeypatch.setattr(offload, "COPY_ON_CPU", True)
    monkeypatch.setattr(promises, "MOST_BYTES", 0.5)  # small matrices
    module, _, function = section.target.partition(":")
    result = SectionResult(section.name, section.title)
    context = context_for(result, folder=tmp_path / "kept")
    getattr(importlib.import_module(module), function)(context)
    result.end()
    assert (result.failures, result.status) == ([], "passed")
    record = record_of(tmp_path, result)
    record.write()
    record.show()
    assert (section.title.split()[0] in capsys.readouterr().out) == bool(result.rows)


def test_runs_that_time_does_not_allow_are_named_and_made_the_next_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runs, "SLOWER", 1e9)
    cut = SectionResult("large", "")
    with pytest.raises(OutOfTimeError):
        runs.large(context_for(cut, folder=tmp_path, deadline=time.monotonic() + 1e6))
    assert [row["run"] for row in cut.rows] == ["AdamW fused"]
    names = [f"{name}, seed 0" for name in runs.CONTENDERS]
    assert [skipped["what"] for skipped in cut.skipped] == names[1:]
    whole = SectionResult("large", "")
    runs.large(context_for(whole, folder=tmp_path))
    whole.end()
    assert whole.status == "passed"
    assert [row["from_before"] for row in whole.rows] == [True, False, False, False]
    assert whole.rows[0] == {**cut.rows[0], "from_before": True}
    assert whole.rows[2]["predicted"] > 0


def test_graphs_replay_eager_steps(
    graphs_made: list[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for graphs, and a kind that forgets who predicts."""
    monkeypatch.setattr(promises, "graphed", lambda _, optimizer: GraphedSteps(optimizer))
    context = context_for(SectionResult("", ""))
    for predictor in ("none", *promises.CAPTURED):
        config = replace(promises.STEPPED, predictor=predictor)
        held, detail = promises.replayed(torch.float32, config, None, context)
        assert held, detail
    assert promises.replayed(torch.bfloat16, promises.STILL, AccumulationConfig(4), context)[0]
    monkeypatch.setattr(PhaseController, "kind", property(lambda self: ()))
    config = replace(promises.STEPPED, predictor="slow_ema")
    held, detail = promises.replayed(torch.float32, config, None, context)
    assert not held
    assert "tensors differ" in detail


@interpreted
def test_what_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    result = SectionResult("", "")
    context = context_for(result)
    monkeypatch.setattr(offload, "COPY_ON_CPU", True)
    monkeypatch.setattr(offload.Offload, "_write_back", lambda self, rows: None)
    monkeypatch.setattr(promises, "cost", lambda context: None)
    promises.offload(context)
    assert any(f["name"].startswith("slow_ema, cpu: tensors") for f in result.failures)
    result.checks.clear()
    monkeypatch.setattr(promises, "SLACK_BYTES", 0)
    monkeypatch.setattr(promises, "promised_bytes", lambda *_: 8)
    promises.count_state(context, "adamw", "slow_ema", torch.float32, "auto")
    monkeypatch.setattr(muon, "rate_scale", lambda *_: 0.1)
    muon.compare(context, "tiny", muon.Contenders(context, muon.TINY[0].matrices()))
    promises.guarded(context, "waits", lambda context: [][0])
    assert len(result.failures) == 3
    assert "IndexError" in result.failures[2]["detail"]
