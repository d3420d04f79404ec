"""Which instructions a compiled kernel consists of.

Counted in machine code (SASS by ``nvdisasm``, which comes with Triton, and amdgcn assembly), once
each wherever they stand: of the path for full chunks, the one for the rest, and what is outside.
"""

from __future__ import annotations

import re

KINDS = ("loads", "stores", "fma", "add, mul", "fp64", "special", "convert", "matrix", "barriers")

_SASS = {
    "loads": r"LDG|LD|LDGSTS|UTMALDG",
    "stores": r"STG|ST",
    "fma": r"FFMA2?",
    "add, mul": r"FADD2?|FMUL2?|FMNMX3?",
    "fp64": r"D(FMA|ADD|MUL|MNMX|SETP)",
    "special": r"MUFU",
    "convert": r"F2FP?|F2I|I2FP?",
    "matrix": r"HMMA|HGMMA|DMMA|UTCHMMA",
    "barriers": r"BAR|WARPSYNC",
}
_GCN = {
    "loads": r"(global|buffer|flat)_load_\w+",
    "stores": r"(global|buffer|flat)_store_\w+",
    "fma": r"v_(pk_)?(fma|fmac|fmaak|fmamk)_f32\w*",
    "add, mul": r"v_(pk_)?(add|sub|subrev|mul|max3?|min3?)_f32\w*",
    "fp64": r"v_\w+_f64(?!_f)\w*",
    "special": r"v_(rcp|rsq|sqrt|exp|log)_f32\w*",
    "convert": r"v_cvt_\w+",
    "matrix": r"v_mfma_\w+",
    "barriers": r"s_barrier\w*",
}
_SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", re.M)
_GCN_LINE = re.compile(r"^\s+([a-z]+_\w+)", re.M)


def _sorted(names: list[str], kinds: dict[str, str]) -> dict[str, int]:
    patterns = {kind: re.compile(pattern) for kind, pattern in kinds.items()}
    found = {kind: sum(map(bool, map(p.fullmatch, names))) for kind, p in patterns.items()}
    return {**found, "all": len(names)}


def sass_mix(sass: str) -> dict[str, int]:
    """Instructions of each kind in NVIDIA's machine code, and of all."""
    return _sorted(_SASS_LINE.findall(sass), _SASS)


def gcn_mix(assembly: str) -> dict[str, int]:
    """Instructions of each kind in AMD assembly, and of all."""
    names = [n for n in _GCN_LINE.findall(assembly) if n.startswith(("v_", "s_", "ds_"))]
    return _sorted(names + re.findall(r"^\s+((?:global|buffer|flat)_\w+)", assembly, re.M), _GCN)
