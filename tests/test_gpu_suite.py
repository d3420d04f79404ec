"""The GPU suite, as far as it goes without a GPU: its frame, its numbers, and its checks."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "benchmarks"))

import gpu_suite
import suite_correctness
import suite_kernels
import suite_muon
import suite_offload
import suite_process
from suite_bandwidth import KERNELS, SIZES, Buffers, traffic
from suite_barrier import LAYOUTS
from suite_context import DTYPES, Context
from suite_correctness import correctness
from suite_gpt2_shapes import PARAMETERS, Matrix, gpt2_small_shapes
from suite_kernels import ADAMW_VARIANTS, KernelBench
from suite_muon_contenders import COMPILED, OURS, TORCH_BLOCKS, TORCH_WHOLE, Contenders
from suite_problems import GPU_LAYOUTS, Launches, Problem, relative_error
from suite_records import Check, Row, SectionResult, Skip, SuiteRecord, Timing
from triton_hybrid.kernels.chunks import INTERPRETED, Tiling, default_tiling

from triton_hybrid import offload

interpreted = pytest.mark.skipif(not INTERPRETED, reason="the suite itself runs there")
CPU = torch.device("cpu")

# ------------------------------------------------------------------------------- the command


def test_without_a_gpu_it_says_so_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "suite.json"
    assert gpu_suite.main(["--output", str(output)]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not output.exists(), "an earlier result is not overwritten by nothing"


def test_interpreted_kernels_are_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_suite.main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--minutes", "0"],
        ["--minutes", "-1"],
        ["--minutes", "nan"],
        ["--minutes", "inf"],
        ["--minutes", "soon"],
        ["--only", "barrier"],
        ["--only"],
        ["--seed", "1.5"],
        ["--output"],
        ["--unknown"],
    ],
    ids=" ".join,
)
def test_wrong_flags_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu_suite.main(flags)
    assert refused.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_flags_have_defaults() -> None:
    options = gpu_suite.parse([])
    assert (options.output, options.minutes, options.only) == (Path("gpu_suite.json"), 8.0, None)
    assert options.seed != gpu_suite.parse([]).seed, "fresh data each time"
    assert gpu_suite.parse(["--only", "steps", "memory"]).only == ["steps", "memory"]


def test_the_sections_have_names_and_the_whole_time() -> None:
    sections = gpu_suite.all_sections()
    names = [section.name for section in sections]
    assert tuple(name for name in names if name in gpu_suite.OPTIONAL) == gpu_suite.OPTIONAL
    assert [s.name for s in sections if s.required] == ["environment", "barrier", "correctness"]
    assert sum(section.share for section in sections) == pytest.approx(1.0)
    for section in sections[1:]:
        module, function = section.run.__qualname__.split(".")
        assert callable(getattr(importlib.import_module(module), function))


def test_a_section_that_cannot_be_imported_fails_alone(tmp_path: Path) -> None:
    missing = gpu_suite.imported("suite_of_another_day", "run")
    code, content, _ = executed(tmp_path, missing, good)
    assert code == 1
    assert [section["status"] for section in content["sections"]] == ["failed", "passed"]
    assert "suite_of_another_day" in content["sections"][0]["error"]


# ----------------------------------------------------------------------------------- running


@dataclass
class Number(Row):
    HEAD: ClassVar[tuple[str, ...]] = ("what", "number")
    what: str
    number: float

    def cells(self) -> tuple[str, ...]:
        return self.what, f"{self.number:.1f}"


def good(context: Context, result: SectionResult) -> None:
    result.rows.append(Number("answer", 42.0))
    result.facts.update(nothing=math.nan, where=Path("here"), timing=[math.inf])
    context.note(result, Check("holds", "gram", "fp32", True, 0.0, 1e-6))


def bad(context: Context, result: SectionResult) -> None:
    good(context, result)
    raise RuntimeError("the kernel is broken\nand more")


def wrong(context: Context, result: SectionResult) -> None:
    context.note(result, Check("against FP64", "slopes", "fp32", False, math.nan, 1e-6, "why"))


def late(context: Context, result: SectionResult) -> None:
    result.rows.append(Number("first", 1.0))
    context.deadline = time.monotonic() - 1.0
    context.check_time()


def executed(
    tmp_path: Path, *functions: Any, required: bool = False
) -> tuple[int, dict[str, Any], Context]:
    sections = [gpu_suite.Section(f.__name__, f.__name__, f, 0.1, required) for f in functions]
    results = [SectionResult(section.name, section.title) for section in sections]
    record = SuiteRecord(tmp_path / "folder" / "suite.json", {"seed": 1}, results)
    context = Context(CPU)
    code = gpu_suite.run_suite(sections, record, context, 600.0)
    content = json.loads(record.output.read_text(encoding="utf-8"))
    assert content == json.loads(json.dumps(content, allow_nan=False))
    assert not list(record.output.parent.glob("*.partial"))
    return code, content, context


def test_what_holds_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, content, _ = executed(tmp_path, good)
    assert code == 0
    assert content["passed"] is True
    (section,) = content["sections"]
    assert section["status"] == "passed"
    assert section["rows"] == [{"what": "answer", "number": 42.0}]
    assert section["facts"] == {"nothing": "nan", "where": "here", "timing": ["inf"]}
    assert section["checks"][0]["kernel"] == "gram"
    printed = capsys.readouterr().out
    assert "answer" in printed
    assert "1 of 1 checks hold" in printed
    assert printed.rstrip().splitlines()[-1].startswith("PASSED")


@pytest.mark.parametrize(("failing", "error"), [(bad, "the kernel is broken"), (wrong, "nan")])
def test_a_failed_section_is_in_the_file_and_the_table_and_the_rest_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], failing: Any, error: str
) -> None:
    code, content, _ = executed(tmp_path, failing, good)
    assert code == 1
    assert content["passed"] is False
    first, second = content["sections"]
    assert (first["status"], second["status"]) == ("failed", "passed")
    if failing is bad:
        assert first["error"] == "RuntimeError: the kernel is broken"
        assert "in bad" in first["traceback"]
        assert first["rows"], "what was measured before stays"
    else:
        assert first["checks"][0] == {
            "name": "against FP64", "kernel": "slopes", "dtype": "fp32", "passed": False,
            "error": "nan", "tolerance": 1e-6, "detail": "why",
        }  # fmt: skip
    printed = capsys.readouterr().out
    assert error in printed
    assert printed.rstrip().splitlines()[-1].startswith("FAILED")


@pytest.mark.parametrize("required", [False, True])
def test_out_of_time_leaves_measurements_out_but_never_checks(
    tmp_path: Path, required: bool
) -> None:
    code, content, _ = executed(tmp_path, late, required=required)
    (section,) = content["sections"]
    assert section["skipped"] == [{"what": "the rest of this section", "reason": "out of time"}]
    assert section["rows"]
    assert code == int(required)
    assert section["status"] == ("failed" if required else "passed")


def test_a_section_that_hangs_is_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [SectionResult("one", "One"), SectionResult("two", "Two")]
    results[0].state = "running"
    record = SuiteRecord(tmp_path / "suite.json", {}, results)
    watchdog = gpu_suite.Watchdog(record, 600.0)
    watchdog.stop()
    watchdog.report()
    content = json.loads(record.output.read_text(encoding="utf-8"))
    assert [section["status"] for section in content["sections"]] == ["failed", "not run"]
    assert "600 s" in content["sections"][0]["error"]
    assert not content["passed"]
    assert "FAILED" in capsys.readouterr().out


def test_no_speed_is_told_of_a_kernel_that_is_wrong_or_unchecked() -> None:
    context, result = Context(CPU), SectionResult("speeds", "")
    for passed in (True, False):
        context.note(result, Check("x", "gram", "fp32", passed))
    context.note(result, Check("x", "slopes", "fp32", True))
    context.note(result, Check("x", "judge", "any", True))
    assert context.refusal(["slopes", "judge"], "fp32") is None
    assert "gram failed" in str(context.refusal(["slopes", "gram"], "fp32"))
    assert "slopes was not checked" in str(context.refusal(["slopes"], "bf16"))
    assert context.refuses(result, "gram fp32", ["gram"], "fp32")
    assert result.skipped == [Skip("gram fp32", "a correctness check of gram failed")]


def test_the_environment_is_described() -> None:
    result = SectionResult("environment", "")
    gpu_suite.environment(Context(CPU, seed=5), result)
    assert result.facts["torch"].startswith(torch.__version__.split("+")[0])
    assert result.facts["seed"] == 5
    assert result.facts["python"]
    assert gpu_suite.command_output("no such program") is None


class FakeChild:
    """Stands in for the process that checks one dtype."""

    stopped: ClassVar[list[str]] = []

    def __init__(self, flags: list[str]) -> None:
        self.flags, self.seconds, self.lines = flags, 1.5, ["compiling", "Segmentation fault"]
        self.label = flags[flags.index("--check") + 1]

    def wait(self, seconds: float) -> int | None:
        if self.label != "bf16":
            assert "--two-launches" in self.flags
            checks = [
                Check("against FP64", "gram", self.label, True, 1e-7, 2e-6),
                Check("against FP64", "slopes", self.label, False, math.nan, 1e-5, "worst"),
            ]
            result = SectionResult("correctness", "", checks, state="done")
            output = Path(self.flags[self.flags.index("--output") + 1])
            SuiteRecord(output, {}, [result]).write()
        return {"fp32": 0, "fp16": None, "bf16": -11}[self.label]

    def stop(self) -> None:
        self.stopped.append(self.label)


def test_checks_in_other_processes_are_adopted_and_missing_ones_are_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(suite_correctness, "Child", FakeChild)
    context = Context(CPU, seed=3, cooperative=False)
    result = SectionResult("correctness", "")
    correctness(context, result)
    assert FakeChild.stopped == list(DTYPES)
    assert context.refusal(["gram"], "fp32") is None
    assert "slopes failed" in str(context.refusal(["slopes"], "fp32"))
    assert "not checked" in str(context.refusal(["gram"], "bf16"))
    made = {c.dtype: c for c in result.checks if c.name == "all its checks were made"}
    assert [made[label].passed for label in DTYPES] == [True, False, False]
    assert "out of time" in made["fp16"].detail
    assert "Segmentation fault" in made["bf16"].detail


@interpreted
def test_what_a_child_writes_is_what_its_parent_adopts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def kernels(bench: KernelBench) -> dict[str, Any]:
        def broken() -> None:
            raise RuntimeError("out of registers")

        return {"slopes": bench.slopes, "gram": broken}

    output = tmp_path / "fp32.json"
    monkeypatch.setattr(KernelBench, "kernels", kernels)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu_suite, "Context", lambda _, seed: Context(CPU, seed, tiny=True))
    options = gpu_suite.parse(["--check", "fp32", "--seed", "4", "--output", str(output)])
    assert gpu_suite.check(options) == 0
    context, result = Context(CPU), SectionResult("correctness", "")
    suite_correctness.adopt(context, result, "fp32", output)
    assert context.refusal(["slopes", "judge"], "fp32") is None
    assert "gram failed" in str(context.refusal(["gram"], "fp32"))
    assert [check.detail for check in result.failures] == ["RuntimeError: out of registers"]
    assert "in broken" in result.facts["checks of fp32"]["gram fp32"]


def test_a_child_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = "import time; print('asleep', flush=True); time.sleep(60)"
    monkeypatch.setattr(suite_process, "SUITE", "-c")
    child = suite_process.Child([sleeper])
    while not os.fstat(child._output.fileno()).st_size:
        time.sleep(0.01)
    assert child.wait(0.05) is None
    assert child.lines == ["asleep"]
    assert child._process.poll() is not None
    assert suite_process.Child(["raise SystemExit(3)"]).wait(30.0) == 3
    assert suite_process.Child.running == []


# ----------------------------------------------------------------------------------- numbers


def test_percentiles() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (timing.median, timing.p20, timing.p80, timing.repeats) == (3.5, 2.0, 5.0, 6)
    assert Timing.of([7.0]) == Timing(7.0, 7.0, 7.0, 1)


def test_gpt2_small() -> None:
    shapes = gpt2_small_shapes()
    assert len(shapes) == 148
    assert sum(math.prod(shape) for shape in shapes) == PARAMETERS == sum(SIZES["124M"])
    assert sum(SIZES["1M"]) == pytest.approx(1e6, rel=0.05)
    assert sum(SIZES["1B"]) == pytest.approx(1e9, rel=1e-6)


def test_what_is_measured_is_the_compiled_code_that_was_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton compiles other code for the number 1 and for multiples of 16."""
    large = SimpleNamespace(multi_processor_count=148)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: large)
    tiling = default_tiling(torch.device("cuda"))
    lists = [*SIZES.values(), [layout.length for layout in LAYOUTS]]
    lists.append([layout.length for layout in GPU_LAYOUTS])
    lists.append([layout.length if layout.present else 0 for layout in GPU_LAYOUTS])
    for lengths in lists:
        chunks = sum(-(-length // tiling.chunk) for length in lengths)
        for number in (len(lengths), chunks):
            assert number > 1
            assert number % 16
    # Programs take several chunks, as they do with a large model.
    assert sum(-(-layout.length // tiling.chunk) for layout in GPU_LAYOUTS) > 2 * tiling.programs


def test_bytes_for_each_parameter() -> None:
    """AdamW's are the ones that kernels/adamw.py names: 28, the gradient again, 8 for each EMA."""
    for dtype, again in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)):
        for kernel, counted in (("adamw", 28), ("adamw+clip", 28), ("adamw+slow", 44)):
            bytes_ = traffic(kernel, dtype)
            # The weight EMA is read twice, the second time from cache.
            level = 4 if kernel == "adamw+slow" else 0
            assert (bytes_.counted, bytes_.moved) == (counted, counted + again + level)
    assert set(ADAMW_VARIANTS) < set(KERNELS)


@contextmanager
def counted_bytes(block: int) -> Iterator[dict[str, int]]:
    """Bytes that interpreted kernels read and write, in accesses of a whole block."""
    from triton.runtime.interpreter import InterpreterBuilder

    count = {"read": 0, "written": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(kind: str, pointers: Any, mask: Any) -> None:
        if pointers.data.size == block:
            width = pointers.get_element_ty().primitive_bitwidth // 8
            count[kind] += int(mask.data.sum()) * width

    def counted_load(self: Any, pointers: Any, mask: Any, *more: Any, **options: Any) -> Any:
        note("read", pointers, mask)
        return load(self, pointers, mask, *more, **options)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        note("written", pointers, mask)
        return store(self, pointers, value, mask, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        yield count


@interpreted
@pytest.mark.parametrize("label", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_bytes_for_each_parameter_are_those_that_the_kernel_moves(kernel: str, label: str) -> None:
    block, parameters = 512, 1024
    dtype = DTYPES[label]
    buffers = Buffers([parameters], dtype, CPU, Tiling(block, block, 1))
    with counted_bytes(block) as count:
        KERNELS[kernel](buffers)
    expected = traffic(kernel, dtype)
    assert count["read"] == (expected.read + expected.again) * parameters
    assert count["written"] == expected.written * parameters


def test_launches_are_counted_and_kernels_given_back() -> None:
    from triton_hybrid.kernels import gram

    before = gram._reduce_kernel
    launches = Launches()
    with launches.counted():
        assert gram._reduce_kernel is not before
    assert gram._reduce_kernel is before
    assert launches.names == []


# ------------------------------------------------------------------------------- correctness


@interpreted
def test_every_check_passes_in_the_interpreter() -> None:
    context = Context(CPU, seed=7, dtypes=("bf16",), tiny=True)
    result = SectionResult("correctness", "")
    correctness(context, result)
    assert result.failures == []
    checked = {check.kernel for check in result.checks}
    assert checked == {*KERNELS, "settle", "judge"}
    assert context.refusal(KERNELS, "bf16") is None
    names = {check.name for check in result.checks if check.kernel == "adamw+slow"}
    assert {"one launch is two", "no gradient, no change", "one launch against FP64"} <= names


@interpreted
@pytest.mark.parametrize("kernel", ["adamw+clip+slow", "predict slow", "correct"])
def test_checks_without_masters_pass_too(kernel: str) -> None:
    context, result = Context(CPU, seed=8, tiny=True), SectionResult("correctness", "")
    KernelBench(context, result, "fp32", torch.float32, 8).kernels()[kernel]()
    assert result.failures == []
    assert context.refusal([kernel], "fp32") is None


@interpreted
def test_a_wrong_kernel_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves one element of the snapshot as it was, and another one a little off."""
    real = suite_kernels.gram

    def spoilt(tensors: Any, history: int, slot: int, partials: Any, sums: Any) -> None:
        kept = tensors.flat["snapshot"][1][5].clone()
        real(tensors, history, slot, partials, sums)
        tensors.flat["snapshot"][1][5] = kept
        tensors.flat[f"history_{slot}"][2][0] += 1e-3

    monkeypatch.setattr(suite_kernels, "gram", spoilt)
    context, result = Context(CPU, seed=7, tiny=True), SectionResult("correctness", "")
    KernelBench(context, result, "fp32", torch.float32, 7).gram()
    failed = [check.name for check in result.failures]
    assert failed == ["against FP64", "the snapshot is the weights"]
    assert result.failures[1].error == 1.0


@interpreted
def test_a_kernel_that_does_not_launch_leaves_the_others_to_be_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("too many blocks in cooperative launch")

    for name in ("adamw_step", "predict", "gram", "correct"):
        monkeypatch.setattr(suite_kernels, name, broken)
    context = Context(CPU, seed=7, dtypes=("fp32",), tiny=True)
    result = SectionResult("correctness", "")
    correctness(context, result)
    assert context.refusal(["slopes", "judge"], "fp32") is None
    assert "adamw failed" in str(context.refusal(["adamw"], "fp32"))
    assert {check.detail for check in result.failures} == {
        "RuntimeError: too many blocks in cooperative launch"
    }


def test_memory_between_tensors_and_rounding_are_watched() -> None:
    context = Context(CPU, seed=7, tiny=True)
    bench = KernelBench(context, SectionResult("", ""), "bf16", torch.bfloat16, 7)
    problem: Problem = bench.problem()
    for param, weight in zip(problem.rows["param"], problem.rows["weight"]):
        param.copy_(weight)
    assert (problem.spoiled_guards(), problem.misrounded()) == (0, 0)
    problem.rows["param"][2][7] *= 1.01
    assert problem.misrounded() == 1
    stray = problem.rows["weight"][1]
    stray.as_strided((1,), (1,), stray.storage_offset() + len(stray)).fill_(1.0)
    assert problem.spoiled_guards() == 4


# -------------------------------------------------------------------------------------- Muon


@interpreted
def test_the_update_of_muon_is_checked() -> None:
    context, result = Context(CPU, seed=9, tiny=True), SectionResult("muon", "")
    suite_muon.check_updates(context, result)
    assert result.failures == []
    assert context.refusal([suite_muon.KERNEL], "fp32") is None
    names = [check.name for check in result.checks]
    assert any(name.startswith("1x20: FP32") for name in names)
    assert any(name.startswith("16x48 in blocks (1, 3)") for name in names)
    if hasattr(torch.optim, "Muon"):
        assert len(names) == 3 * len(suite_muon.TINY_SHAPES)
        assert len(result.facts["updates in BF16"]) == len(suite_muon.TINY_SHAPES)


@interpreted
def test_a_wrong_update_of_muon_is_found_out_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of one matrix is a tenth too large."""
    real = suite_muon.our_updates

    def spoilt(*arguments: Any) -> list[torch.Tensor]:
        updates = real(*arguments)
        updates[1][0, 3] *= 1.1
        return updates

    monkeypatch.setattr(suite_muon, "our_updates", spoilt)
    monkeypatch.setattr(suite_muon, "TINY_SHAPES", suite_muon.TINY_SHAPES[:2])
    context, result = Context(CPU, seed=9, tiny=True), SectionResult("muon", "")
    suite_muon.muon(context, result)
    assert {check.name.split(":")[0] for check in result.failures} == {"1x20"}
    assert [skip.what for skip in result.skipped if "newton_schulz" in skip.reason] == [
        "GPT-2 small", "GPT-2 medium", "GPT-2 xl",
    ]  # fmt: skip
    assert result.rows == []
    assert set(result.facts["limits"].values()) == {0.05, 0.5}


@interpreted
def test_without_torchs_muon_the_rest_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    monkeypatch.setattr(suite_muon, "TINY_SHAPES", suite_muon.TINY_SHAPES[:1])
    context, result = Context(CPU, seed=9, tiny=True), SectionResult("muon", "")
    suite_muon.check_updates(context, result)
    assert [check.passed for check in result.checks] == [True]
    assert "torch.optim.Muon" in result.skipped[0].what
    contenders = Contenders([Matrix((16, 16))], CPU, 1, compiled=False)
    assert set(contenders.steps) == {OURS, COMPILED}
    assert set(contenders.missing) == {TORCH_BLOCKS, TORCH_WHOLE}


@interpreted
def test_all_contenders_do_the_same() -> None:
    matrices = [Matrix((16, 48), (1, 3)), Matrix((16, 24)), Matrix((24, 16))]
    contenders = Contenders(matrices, CPU, seed=3, compiled=False)
    start = [param.detach().clone() for param in contenders.ours]
    blocks = [weight.clone() for weight in contenders.weights.tensors]
    contenders.steps[OURS]()
    ours = [suite_muon.moved(w, p) for w, p in zip(start, contenders.ours)]
    contenders.steps[COMPILED]()
    plain = [suite_muon.moved(w, p) for w, p in zip(blocks, contenders.weights.tensors)]
    # The fused matrix and the first stack hold the same blocks.
    fused = torch.stack(suite_muon.blocks_of_matrix(matrices[0], ours[0]))
    assert relative_error([fused, ours[1][None], ours[2][None]], plain) < 0.05
    if TORCH_BLOCKS not in contenders.steps:
        return
    for weight, begin in zip(contenders.weights.tensors, blocks):
        weight.copy_(begin)
    contenders.steps[TORCH_BLOCKS]()
    same = [suite_muon.moved(w, p) for w, p in zip(blocks, contenders.weights.tensors)]
    assert relative_error(plain, same) < 0.05
    contenders.steps[TORCH_WHOLE]()
    whole = [suite_muon.moved(w, p) for w, p in zip(start, contenders.whole)]
    assert relative_error(ours[1:], whole[1:]) < 0.05


def test_contenders_take_turns_and_ratios_are_of_one_round() -> None:
    order: list[str] = []
    cost = {OURS: 1.0, TORCH_BLOCKS: 4.0, COMPILED: 2.0}

    def measure(step: Any) -> tuple[float, float]:
        step()
        # A machine that slows down slows all of them.
        slower = 1.0 + len(order) // 3
        return cost[order[-1]] * slower, 2.0 * cost[order[-1]]

    steps = {name: (lambda name=name: order.append(name)) for name in cost}
    context, result = Context(CPU), SectionResult("muon", "")
    samples = suite_muon.alternating(context, steps, 3, measure)
    assert len(order) == 3 * (suite_muon.DROPPED + 3)
    assert order[:6] == [OURS, TORCH_BLOCKS, COMPILED, TORCH_BLOCKS, COMPILED, OURS]
    assert {len(each.device) for each in samples.values()} == {3}
    samples = {name: suite_muon.Samples([cost[name], 3 * cost[name]], [1.0, 1.0]) for name in cost}
    suite_muon.add_rows(context, result, "GPT-2 tiny", samples, 34)
    rows = {row.optimizer: row for row in result.rows if isinstance(row, suite_muon.MuonRow)}
    assert rows[OURS].ratio is None
    assert rows[OURS].launches == 34
    assert rows[TORCH_BLOCKS].ratio == Timing(0.25, 0.25, 0.25, 2)
    assert rows[COMPILED].ratio == Timing(0.5, 0.5, 0.5, 2)
    (check,) = result.checks
    assert (check.passed, check.error, check.tolerance) == (True, 0.25, 0.5)
    assert all(len(row.cells()) == len(row.HEAD) for row in result.rows)


@pytest.mark.parametrize(("matrices", "passed"), [(4.0, True), (6.0, False)])
def test_the_share_of_training_is_judged(matrices: float, passed: bool) -> None:
    context, result = Context(CPU), SectionResult("muon", "")
    suite_muon.add_share(context, result, "16x1024", [[100.0, matrices, 1.0]] * 3)
    (check,) = result.checks
    assert (check.passed, check.tolerance) == (passed, 0.05)
    (row,) = result.rows
    assert isinstance(row, suite_muon.ShareRow)
    assert row.share_with_rest.median == pytest.approx((matrices + 1.0) / 100.0)
    assert len(row.cells()) == len(row.HEAD)


# ---------------------------------------------------------------------------------- offload


@pytest.fixture
def offload_result(monkeypatch: pytest.MonkeyPatch) -> SectionResult:
    """A result for the section, which copies from host memory to host memory here."""
    monkeypatch.setattr(offload, "COPY_ON_CPU", True)
    monkeypatch.setattr(suite_offload, "SIDE", 64)

    def no_model(context: Context, name: str) -> Any:
        raise ImportError("no transformers")

    monkeypatch.setattr(suite_offload, "trained", no_model)
    return SectionResult("offload", "")


def test_offload_checks_pass_between_two_places_of_host_memory(
    offload_result: SectionResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite_offload, "MOST_BYTES", 0.5)  # small matrices
    suite_offload.offload(Context(CPU), offload_result)
    assert offload_result.failures == []
    assert len(offload_result.checks) == 12
    assert offload_result.skipped[0].reason == "not installed: no transformers"


def test_state_that_is_not_taken_back_is_found_out(
    offload_result: SectionResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.Offload, "_take_back", lambda self, rows: None)
    suite_offload.offload(Context(CPU), offload_result)
    assert {check.name for check in offload_result.failures} == {
        f"{predictor}, {kind}: B/param between steps"
        for predictor in ("slow_ema", "subspace", "auto")
        for kind in ("cpu", "pinned")
    }


def test_state_that_is_not_written_back_is_found_out(
    offload_result: SectionResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload.Offload, "_write_back", lambda self, rows: None)
    suite_offload.offload(Context(CPU), offload_result)
    assert "slow_ema, cpu: same bits" in {check.name for check in offload_result.failures}
