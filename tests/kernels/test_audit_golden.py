"""The audit's memory and its counts: the golden file, Triton's IR, occupancy, roofline."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from test_audit import run
from triton_hybrid.kernels.audit.cases import cases
from triton_hybrid.kernels.audit.counts import Counts, counted, short_offsets
from triton_hybrid.kernels.audit.findings import Finding
from triton_hybrid.kernels.audit.golden import FILE, Golden
from triton_hybrid.kernels.audit.mix import gcn_mix, sass_mix
from triton_hybrid.kernels.audit.occupancy import occupancy, resident_programs
from triton_hybrid.kernels.audit.roofline import DEVICES, roofline, work

ROOT = Path(__file__).resolve().parents[2]
CASES = {case.name: case for case in cases()}
A100, H100, _, RTX = DEVICES


# ------------------------------------------------------------------------------ counts in the IR

IR = """
module {
  tt.func public @kernel(%x: !tt.ptr<f32> loc("x"(#loc))) attributes {noinline = false} {
    %total = arith.addf %a, %b : tensor<1024xf64> loc(#loc1)
    scf.for %chunk = %program to %n_chunks step %programs  : i32 {
      %address = tt.load %table : !tt.ptr<i64> loc(#loc2)
      scf.for %inner = %c0_i32 to %c8192_i32 step %c256_i32  : i32 {
        %tail = tt.load %p, %mask, %zero : tensor<256x!tt.ptr<f32>> loc(#loc2)
        %never = arith.mulf %tail, %tail : tensor<256xf32> loc(#loc2)
      } loc(#loc2)
      %sum = scf.for %inner = %c0_i32 to %c8192_i32 step %c1024_i32 iter_args(%s = %z) -> (f32)  : i32 {
        %g = tt.load %p : tensor<1024x!tt.ptr<f32>> loc(#loc3)
        %h = tt.load %q : tensor<128x8x!tt.ptr<bf16>> loc(#loc3)
        %addresses = tt.load %r : tensor<16x!tt.ptr<i64>> loc(#loc3)
        %partial = tt.load %t {cachePolicy = #tt.cache_policy<cache_modifier = cg>} : tensor<1024x!tt.ptr<f32>> loc(#loc3)
        %square = arith.mulf %g, %g : tensor<1024xf32> loc(#loc3)
        %root = tt.precise_sqrt %square : tensor<1024xf32> loc(#loc3)
        %wide = arith.divf %e, %f : tensor<1024xf64> loc(#loc3)
        %less = arith.cmpf olt, %g, %h : tensor<1024xf32> loc(#loc3)
        %scalar = arith.addf %u, %v : f32 loc(#loc3)
        scf.for %number = %c0_i32 to %history step %c1_i32  : i32 {
          %pair = tt.load %pp : tensor<1024x!tt.ptr<f32>> loc(#loc3)
          %along = arith.addf %pair, %pair : tensor<1024xf32> loc(#loc3)
        } loc(#loc3)
        scf.for %number = %c0_i32 to %c3_i32 step %c1_i32  : i32 {
          %thrice = arith.addf %g, %g : tensor<1024xf32> loc(#loc3)
        } loc(#loc3)
        scf.if %tall {
          tt.store %there, %narrow : tensor<1024x!tt.ptr<bf16>> loc(#loc3)
        } else {
          tt.store %here, %g : tensor<1024x!tt.ptr<f32>> loc(#loc3)
        } loc(#loc3)
        %sums = "tt.reduce"(%square) <{axis = 1 : i32}> ({
        ^bb0(%left: f32 loc(callsite(#loc1 at #loc2)), %right: f32):
          %one = arith.addf %left, %right : f32 loc(#loc4)
          tt.reduce.return %one : f32 loc(#loc4)
        }) : (tensor<256x4xf32>) -> tensor<256xf32> loc(#loc4)
        scf.yield %sums : f32 loc(#loc3)
      } loc(#loc3)
    } loc(#loc1)
    tt.return loc(#loc1)
  } loc(#loc)
} loc(#loc)
"""  # noqa: E501


def test_bytes_and_operations_of_the_full_path_in_triton_ir() -> None:
    found = counted(IR, times=10)
    assert found is not None
    # Two rows, ten pairs, and the wider of two ways to store; neither tables nor partial sums.
    assert found.bytes == 4 + 2 + 10 * 4 + 4
    # A product, a root, ten and three additions, and the 768 additions of a sum to 256 numbers.
    assert found.flops == 1 + 1 + 10 + 3 + 0.75
    assert found.fp64_flops == 1
    assert found.tensor_flops == 0
    assert counted("module {\n} loc(#loc)") is None


DOT = """
scf.for %begin = %c0_i64 to %8 step %c64_i64 iter_args(%t = %z) -> (tensor<128x128xf32>)  : i64 {{
  %a = tt.load %x : tensor<128x64x!tt.ptr<{dtype}>>
  %b = tt.load %y : tensor<128x64x!tt.ptr<{dtype}>>
  %c = tt.dot %a, %b, %t : tensor<128x64x{dtype}> * tensor<64x128x{dtype}> -> tensor<128x128xf32>
}}
"""


def test_matrix_products_count_for_an_element_of_an_operand() -> None:
    assert counted(DOT.format(dtype="bf16")) == Counts(4, 0, 0, 256)
    assert counted(DOT.format(dtype="f32")) == Counts(8, 256, 0, 0)


OFFSETS = """
%near = tt.addptr %base, %offsets : tensor<1024x!tt.ptr<f32>>, tensor<1024xi32> loc(#loc2)
%far = tt.addptr %base, %offsets : tensor<1024x!tt.ptr<f32>>, tensor<1024xi64> loc(#loc2)
%a = tt.load %near : tensor<1024x!tt.ptr<f32>> loc(#loc2)
%b = tt.load %far : tensor<1024x!tt.ptr<f32>> loc(#loc2)
%c = tt.load %near, %mask, %zero : tensor<1024x!tt.ptr<f32>> loc(#loc2)
tt.store %near, %a : tensor<1024x!tt.ptr<f32>> loc(#loc2)
"""


def test_offsets_of_32_bits_are_seen() -> None:
    assert short_offsets(OFFSETS) == 2
    assert short_offsets(OFFSETS.replace("xi32>", "xi64>")) == 0


# ------------------------------------------------------------------------------ the golden file


def test_the_golden_file_knows_every_launch_and_belongs_to_the_pinned_triton() -> None:
    golden = Golden.read()
    assert f"triton=={golden.triton}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert {case for case, _ in golden.values} == set(CASES), "run the audit with --write"
    targets = {target for _, target in golden.values}
    assert len(golden.values) == len(targets) * len(CASES)


def test_bytes_in_the_golden_file_are_those_on_paper() -> None:
    """Counted in the IR when it was written, which the audit does anew at each run."""
    for (name, _), values in Golden.read().values.items():
        known = CASES[name].bytes_per_element
        assert values["bytes"] == ("-" if known is None else str(known + CASES[name].repeats)), name


@pytest.mark.parametrize(
    ("name", "on_paper"),
    [
        # Weights, gradient and two moments read, weights and moments written.
        ("adamw fp32, update, clip", 4 * (1 + 1 + 2) + 4 * (1 + 2)),
        # Masters beside 16-bit parameters; clipping reads gradients once more.
        ("adamw bf16, one launch, clip", (4 + 2 + 2 + 8) + (4 + 2 + 8) + 2),
        ("lion fp32, one launch, clip", 4 * 3 + 4 * 2 + 4),
        ("gram fp32", 4 * 3 + 4 * 2),
        # 8 h + 16: the pairs, weights, gradient, and the two moments.
        ("secant products fp32", 8 * 10 + 16),
        # Gradient, momentum both ways, and the matrix in BF16; then it alone.
        ("muon gather fp32", 4 + 4 + 4 + 2),
        ("muon gather bf16, slow EMA", 2 + 4 + 4 + 4 + 2),
        ("muon normalise bf16", 2 + 2),
    ],
)
def test_bytes_on_paper(name: str, on_paper: int) -> None:
    assert CASES[name].bytes_per_element == on_paper


GOOD = """
# Triton 1.2.3: how it is written
# launch | bytes, flops, fp64 flops, tensor flops | sm_90 registers, ... | gfx942
adamw, clip | 32 18 0 0 | 120 8 256 128 24+50 13+20 2 | -
decide | - - - - | 120 0 16 64 0+20 0+9 4 | 60 0 16 64 0+20 0+9 4
""".lstrip()
BETTER = Finding(
    "adamw, clip", "adamw", "sm_90", registers=120, spills=8, shared_bytes=256, widest_bits=128,
    ir_bytes=32.0, flops=18, fp64_flops=0, tensor_flops=0, loads=(24, 50), stores=(13, 20), warps=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"registers": 124, "spills": 0, "loads": (23, 40), "ir_bytes": 30.0}, None),
        ({"loads": (30, 60), "stores": (14, 21), "shared_bytes": 300}, None),
        ({"registers": 125}, "registers 125, was 120: at most 4 more"),
        ({"registers": 121, "warps": 4}, "registers 121, was 120, and 4 programs are resident"),
        ({"shared_bytes": 30_000}, "shared 30000, was 256, and 7 programs"),
        ({"spills": 16}, "spills 16, was 8"),
        ({"widest_bits": 64}, "widest 64, was 128"),
        ({"loads": (23, 54)}, r"loads 23\+54, was 24\+50 .*became narrower"),
        ({"stores": (12, 24)}, r"stores 12\+24, was 13\+20 .*became narrower"),
        ({"ir_bytes": 34.0}, "bytes 34, was 32"),
        ({"flops": 19}, "flops 19, was 18"),
        ({"fp64_flops": 1}, "fp64 flops 1, was 0"),
        ({"flops": None}, "flops -, was 18 .counted and not counted"),
        ({"target": "gfx942"}, "is not in the golden file: .*--write"),
    ],
)
def test_what_is_worse_is_named_with_its_old_and_new_value(
    change: dict[str, Any], message: str | None
) -> None:
    found = Golden(GOOD).worse(replace(BETTER, **change))
    if message is None:
        assert found == []
    else:
        (words,) = found
        assert re.match(message, words), words


def test_it_is_compared_under_its_own_triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no golden file" in Golden().why_not()
    assert "belongs to Triton 1.2.3" in Golden(GOOD).why_not()
    monkeypatch.setattr(triton, "__version__", "1.2.3")
    assert Golden(GOOD).why_not() == ""
    assert Golden(GOOD).gone(["adamw, clip"]) == ["decide"]


def test_writing_keeps_what_was_not_run_and_drops_what_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    committed = Golden.read()
    monkeypatch.setattr(triton, "__version__", committed.triton)
    text = FILE.read_text(encoding="utf-8")
    assert committed.updated([], list(CASES)) == text
    names = [line.split(" | ")[0] for line in text.splitlines()[2:]]
    assert names == sorted(names)
    monkeypatch.setattr(triton, "__version__", "1.2.3")
    change = replace(BETTER, registers=90)
    again = Golden(Golden(GOOD).updated([change], ["adamw, clip"]))
    assert again.worse(change) == []
    assert [case for case, _ in again.values] == ["adamw, clip"]
    monkeypatch.setattr(triton, "__version__", "1.2.4")
    assert Golden(GOOD).updated([], ["decide"]).count("\n") == 2, "another compiler's are dropped"


PLANTED = """
    import sys
    from triton_hybrid.kernels.audit import __main__ as audit
    from triton_hybrid.kernels.audit.golden import Golden

    text = audit.FILE.read_text()
    old = next(line for line in text.splitlines() if line.startswith("correct fp32, restart |"))
    registers, spills, shared, widest, *_ = old.split("|")[3].split()
    cell = f" {int(registers) - 5} {spills} {shared} 256 99+1 0+0 2 "
    cells = old.split("|")
    planted = "|".join([*cells[:3], cell, *cells[4:]])
    version = sys.argv[1]
    text = "\\n".join(["# Triton " + (version or audit.triton.__version__), *text.splitlines()[1:]])
    audit.Golden.read = classmethod(lambda cls: Golden(text.replace(old, planted)))
    sys.exit(audit.main(["--target", "sm_90", "--kernel", "correct fp32, restart", "--jobs", "1"]))
"""


@pytest.mark.parametrize("version", ["", "0.0.1"])
def test_the_audit_fails_on_a_change_for_the_worse(tmp_path: Path, version: str) -> None:
    script = tmp_path / "planted.py"
    script.write_text(textwrap.dedent(PLANTED))
    done = run(str(script), version)
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    if version:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "belongs to Triton 0.0.1" in done.stdout
        assert failures == []
    else:
        assert done.returncode == 1, done.stdout + done.stderr
        registers, widest, loads = failures
        assert "FAIL correct fp32, restart, sm_90: registers" in registers
        assert "widest 128, was 256" in widest
        assert "was 99+1" in loads


# -------------------------------------------------------------- occupancy, instructions, roofline


@pytest.mark.parametrize(
    ("target", "taken", "programs", "share"),
    [
        ("sm_90", (128, 256, 2), 8, 0.25),  # 65,536 registers for 8 times 2 warps of 32 times 128
        ("sm_90", (121, 256, 2), 8, 0.25),  # given out by eights
        ("sm_90", (120, 256, 2), 8, 0.25),  # 17 warps, 4 in each of 4 units
        ("sm_90", (96, 256, 2), 10, 0.3125),
        ("sm_90", (16, 0, 1), 32, 0.5),
        ("sm_90", (32, 0, 4), 16, 1.0),
        ("sm_120", (32, 0, 4), 12, 1.0),
        ("sm_80", (174, 65536, 8), 1, 0.125),
        ("sm_90", (111, 98304, 8), 2, 0.25),
        ("sm_120", (168, 65536, 8), 1, 1 / 6),
        ("gfx942", (128, 512, 2), 8, 0.5),
        ("gfx942", (116, 32768, 8), 2, 0.5),
    ],
)
def test_programs_that_are_resident_together(
    target: str, taken: tuple[int, int, int], programs: int, share: float
) -> None:
    assert resident_programs(target, *taken) == programs
    assert occupancy(target, programs, taken[2]) == share


SASS = """
        /*0150*/                   STL.64 [R1+0x8], R4 ;
        /*0170*/               @P0 BRA 0x2e70 ;
        /*0180*/              @!P1 LDG.E.128 R6, desc[UR4][R2.64] ;
        /*0190*/                   FFMA R2, R3, R4, R5 ;
        /*01a0*/                   FMUL R2, R3, R4 ;
        /*01b0*/                   MUFU.RCP R2, R3 ;
        /*01c0*/                   F2F.F64.F32 R2, R3 ;
        /*01d0*/                   DFMA R2, R4, R6, R8 ;
        /*01e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*01f0*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*0200*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
"""
AMD = """
	global_load_dwordx4 v[0:3], v[4:5], off
	buffer_store_dword v1, v2, s[0:3], 0 offen
	v_fma_f32 v1, v2, v3, v4
	v_pk_mul_f32 v[0:1], v[2:3], v[4:5]
	v_add_f64 v[0:1], v[2:3], v[4:5]
	v_rcp_f32_e32 v1, v2
	v_cvt_f64_f32_e32 v[0:1], v2
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
	s_barrier
	ds_read_b32 v1, v2
"""


def test_instructions_by_kind() -> None:
    each = (
        "loads",
        "stores",
        "fma",
        "add, mul",
        "fp64",
        "special",
        "convert",
        "matrix",
        "barriers",
    )
    assert sass_mix(SASS) == {**dict.fromkeys(each, 1), "all": 11}
    assert gcn_mix(AMD) == {**dict.fromkeys(each, 1), "all": 10}


def _counted(name: str, **counts: int) -> Finding:
    return Finding(name, CASES[name].kernel, "sm_90", fp64_flops=0, tensor_flops=0, **counts)


def test_least_times_follow_from_published_peaks() -> None:
    name = "adamw fp32, update, clip"
    done = work(CASES[name], _counted(name, flops=15))
    assert done is not None
    assert done.bound(H100) == (28 * 124_439_808 / 3.35e12, "memory")
    name = "secant products fp32"
    finding = replace(_counted(name, flops=785), fp64_flops=177)
    done = work(CASES[name], finding)
    assert done is not None
    seconds, kind = done.bound(RTX)
    assert kind == "FLOPs", "FP64 sums at 1/64 of the rate"
    assert seconds == pytest.approx(2 * 124_439_808 * (177 / 0.88e12 + 785 / 56.3e12))
    assert work(CASES["decide"], Finding("decide", "decide", "sm_90")) is None
    first, row = roofline([CASES[name]], [finding])
    assert first[-len(DEVICES) :] == [f"{device.name} ms" for device in DEVICES]
    assert row[0] == name
    assert row[-1].endswith("FLOPs")


def test_products_of_the_roofline_are_those_that_muon_cost_counts() -> None:
    results = ROOT / "examples" / "benchmarks" / "results" / "muon_cost.json"
    (small,) = (m for m in json.loads(results.read_text())["models"] if m["model"] == "GPT-2 small")
    names = [f"muon product bf16, {words}" for words in ("X Xᵀ", "b A + c A A", "a X + B X")]
    flops = 0.0
    for name in names:
        done = work(CASES[name], _counted(name, flops=0))
        assert done is not None
        assert done.elements == small["parameters_of_muon"]
        flops += done.counts.tensor_flops
        seconds, _ = done.bound(A100)
        assert seconds >= done.counts.tensor_flops / 312e12
    assert 5 * flops == small["ours"]["flops"]
