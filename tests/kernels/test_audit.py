"""The compile audit: what it prints, what it refuses, and how it reads assembly."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton_hybrid.kernels.audit import assembly
from triton_hybrid.kernels.audit.__main__ import main
from triton_hybrid.kernels.audit.assembly import Access
from triton_hybrid.kernels.audit.cases import Case, cases
from triton_hybrid.kernels.audit.findings import MOST_PARKED, moved_bytes

from triton_hybrid.rules import RULES

READ, WRITE, CACHED = Access(False, 128), Access(True, 128), Access(False, 128, scratch=True)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, in which kernels are compiled and not interpreted."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


PTX = """
    ld.param.b64 %rd1, [_kernel_param_0];
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p3 ld.global.L1::evict_last.L2::cache_hint.v2.b64 { %rd2, %rd3 }, [ %rd1 + 16 ], %rd9;
    ld.global.nc.v8.f32 { %f1 }, [%rd1];
    @!%p1 ld.global.b32 { %r5 }, [ %rd1 + 32 ];
    ld.global.cg.v4.b32 { %r6 }, [ %rd4 + 0 ];
    ld.relaxed.gpu.global.v4.f32 {%f1,%f2,%f3,%f4}, [%rd1];
    ld.shared.v4.b32 {%r1}, [%r9];
    st.shared.v2.b32 [%r9], {%r1, %r2};
    @%p2 st.global.b16 [ %rd5 + 0 ], { %rs1 };
    st.global.wb.v2.u64 [ %rd5 + 0 ], { %rd1, %rd2 };
    atom.global.gpu.acq_rel.add.u32 %r7, [ %rd6 + 0 ], 1;
"""


def test_widths_in_ptx() -> None:
    others = Access(False, 256), Access(False, 32), CACHED, READ, Access(True, 16), WRITE
    assert assembly.ptx_accesses(PTX) == [READ, READ, *others]


LLVM = """
declare <4 x float> @llvm.amdgcn.raw.ptr.buffer.load.v4f32(ptr addrspace(8), i32, i32, i32)
  %1 = load i64, ptr addrspace(1) %0, align 8
  %2 = load <4 x float>, ptr addrspace(1) %9, align 16, !amdgpu.noclobber !1
  %3 = load <8 x half>, ptr addrspace(1) %8, align 16
  %4 = load <4 x i32>, ptr addrspace(3) %8, align 16
  %5 = call <4 x i32> @llvm.amdgcn.raw.ptr.buffer.load.v4i32(ptr addrspace(8) %7, i32 %6, i32 0, i32 3)
  %6 = call <4 x float> @llvm.amdgcn.raw.ptr.buffer.load.v4f32(ptr addrspace(8) %7, i32 %6, i32 0, i32 0)
  store <4 x float> %2, ptr addrspace(1) %9, align 16
  store <8 x bfloat> %3, ptr addrspace(1) %8, align 16
"""  # noqa: E501


def test_vectors_in_llvm_code_for_amd() -> None:
    assert assembly.llvm_accesses(LLVM) == [READ, READ, CACHED, READ, WRITE, WRITE]


AMD = """
	global_load_dwordx4 v[0:3], v[4:5], off
	buffer_load_dword v1, v2, s[0:3], 0 offen
	global_store_dwordx2 v[4:5], v[0:1], off offset:16
	global_atomic_add v1, v1, v2, s[36:37] sc0
	s_load_dwordx4 s[0:3], s[4:5], 0x0
    .private_segment_fixed_size: 8
    .sgpr_spill_count: 1
    .vgpr_count:     112
    .vgpr_spill_count: 2
"""


def test_widths_and_resources_in_amd_assembly() -> None:
    assert assembly.gcn_accesses(AMD) == [READ, Access(False, 32), Access(True, 64)]
    resources = assembly.amd_resources(AMD)
    assert resources.registers == 112
    assert resources.spills == 1 + 2 + 8
    with pytest.raises(RuntimeError, match="vgpr_spill_count"):
        assembly.amd_resources(".vgpr_count: 3")


def no_launch(target: object) -> None:
    raise AssertionError("only the byte counts of this case are used")


ADAMW = Case("adamw", no_launch, (4, 4, 4, 2), (4, 4, 4, 2), first_pass=(2,))  # type: ignore[arg-type]
"""One block with a first pass: 8 elements a thread, copied by the compiler."""


@pytest.mark.parametrize("copies", [1, 8])
@pytest.mark.parametrize("first_copies", [1, 5])
def test_bytes_are_those_of_the_wide_accesses(copies: int, first_copies: int) -> None:
    wide = [READ] * (7 * copies + first_copies) + [WRITE] * 7 * copies
    # Neither masked accesses nor a look at the partial sums count.
    others = [Access(False, 32), Access(True, 16), CACHED]
    assert moved_bytes(ADAMW, [*wide, *others], elements=8) == 30


@pytest.mark.parametrize(
    ("loads", "stores"),
    [
        (7, 7),  # the first pass is not vectorised
        (6, 7),  # a load is not
        (8, 6),  # a store is not
        (0, 0),  # nothing is
        (15, 8),  # a store that nobody knows of
    ],
)
def test_an_access_too_narrow_or_unknown_breaks_the_count(loads: int, stores: int) -> None:
    with pytest.raises(ValueError, match="do not add up"):
        moved_bytes(ADAMW, [READ] * loads + [WRITE] * stores, elements=8)


def test_bytes_of_adamw_are_the_floor_the_first_pass_and_the_averages() -> None:
    known = {case.name: case for case in cases()}
    updates = {"fp32": 28, "bf16": 30, "bf16 split": 26, "bf16 alone": 22}
    for words, expected in updates.items():
        assert known[f"adamw {words}, update, clip"].bytes_per_element == expected
    assert known["adamw fp32, one launch, clip"].bytes_per_element == 32
    assert known["adamw fp16, one launch, clip, slow EMA"].bytes_per_element == 40
    floors = {known[name].floor for name in known if name.startswith("adamw") and "launch" in name}
    assert floors == {22, 26, 28, 30, 56}
    assert len(known) == len(cases())


def test_every_rule_and_every_kernel_is_audited() -> None:
    kernels = {case.kernel for case in cases()}
    assert {
        *RULES,
        "predict",
        "check",
        "slopes",
        "decide",
        "correct",
        "gram",
        "fingerprint",
        "settle",
        "reduce",
    } <= kernels


def test_kernels_join_two_conditions_at_a_time() -> None:
    """Triton 3.2's compiler takes no more; its interpreter does."""
    for name in sorted(sys.modules):
        module = sys.modules[name]
        if not name.startswith(("triton_hybrid.kernels.", "triton_hybrid.rules.")):
            continue
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list
            ):
                chains = [n for n in ast.walk(node) if isinstance(n, ast.BoolOp)]
                assert all(len(chain.values) == 2 for chain in chains), f"{name}.{node.name}"


def test_audit_compiles_prints_a_table_and_succeeds(tmp_path: Path) -> None:
    report = tmp_path / "audit.json"
    words = ("--kernel", "fp32, one launch, clip, slow EMA", "--kernel", "correct fp32")
    audit = ("-m", "triton_hybrid.kernels.audit", "--target", "sm_90", "--jobs", "1")
    result = run(*audit, *words, "--json", str(report))
    assert result.returncode == 0, result.stdout + result.stderr
    header, rule, *lines = result.stdout.splitlines()
    assert header.split() == (
        ["launch", "target", "registers", "spills", "shared", "widest", "bytes/element", "floor"]
    )
    assert set(rule) == {"-", " "}
    (line,) = (text for text in lines if text.startswith("adamw fp32, one launch, clip, slow EMA "))
    assert line.split()[-8] == "sm_90"
    assert line.split()[-3:] == ["40", "28", "ok"]
    findings = {f["case"]: f for f in json.loads(report.read_text())["findings"]}
    adamw = findings["adamw fp32, one launch, clip, slow EMA"]
    assert adamw["widest_bits"] == 128
    assert adamw["spills"] <= MOST_PARKED
    assert adamw["bytes_per_element"] == adamw["known_bytes"] == 40
    assert 0 < adamw["registers"] <= 128
    assert adamw["cooperative"]
    assert not findings["correct fp32, restart"]["cooperative"]


# A kernel that always masks, one that does not compile, a case that forgets a row, and a
# limit that no kernel keeps.
PLANTED = """
    import dataclasses
    import sys

    import torch
    import triton
    import triton.language as tl

    from triton_hybrid.kernels.audit import __main__ as audit
    from triton_hybrid.kernels.audit import findings
    from triton_hybrid.kernels.audit.cases import Case, cases
    from triton_hybrid.kernels.audit.targets import launches
    from triton_hybrid.kernels.launch import LAUNCH


    @triton.jit
    def masked(source, target, length, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        here = offsets < length
        tl.store(target + offsets, tl.load(source + offsets, mask=here), mask=here)


    @triton.jit
    def broken(source, target, length, BLOCK: tl.constexpr):
        tl.store(target, missing_name)


    def launch(kernel):
        call = lambda: kernel[(1,)](torch.zeros(8), torch.zeros(8), 7, BLOCK=1024, **LAUNCH)
        return lambda target: launches(target, call)[0]


    def planted():
        known = {case.name: case for case in cases()}
        correct = known["correct fp32, restart"]
        return [
            Case("masked", launch(masked), (4,), (4,), floor=8),
            Case("broken", launch(broken), (4,), (4,), floor=8),
            dataclasses.replace(correct, name="forgotten", writes=(4,)),
            known["adamw fp32, one launch"],
            correct,
        ]


    audit.cases = planted
    findings.REGISTER_LIMIT = 16
    sys.exit(audit.main(["--target", "sm_90", "--jobs", "1"]))
"""


def test_audit_fails_on_what_is_planted(tmp_path: Path) -> None:
    script = tmp_path / "planted.py"
    script.write_text(textwrap.dedent(PLANTED))
    result = run(str(script))
    assert result.returncode == 1, result.stdout + result.stderr
    failures = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    expected = [
        ("FAIL masked, sm_90", "loads 0 and stores 0 bytes"),
        ("FAIL broken, sm_90", "CompilationError"),
        ("FAIL forgotten, sm_90", "do not add up"),
        ("FAIL adamw fp32, one launch, sm_90", "at most 16"),
    ]
    assert len(failures) == len(expected), failures
    for failure, (start, part) in zip(failures, expected):
        assert failure.startswith(start)
        assert part in failure
    assert "5 compiled, 4 failed" in result.stdout


def test_audit_refuses_the_interpreter_and_unknown_kernels(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--target", "sm_90"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    assert main(["--kernel", "unheard-of"]) == 2
    assert "unheard-of" in capsys.readouterr().err
