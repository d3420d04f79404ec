"""What a compiled kernel takes and how wide it reaches memory, read from its code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton


class Access(NamedTuple):
    """A load from or a store to global memory."""

    store: bool
    bits: int  # that one thread moves
    scratch: bool = False
    """Whether it goes around the first-level cache: a look at the partial sums of other programs,
    not at a role of a tensor."""


_PTX = re.compile(r"(?<![\w.])(ld|st)((?:\.[\w:]+)+)\s")
_PTX_WORD = re.compile(r"(?:b|u|s|f|bf)(\d+)(?:x(\d))?$")


def ptx_accesses(ptx: str) -> list[Access]:
    """Global loads and stores of PTX code."""
    found = []
    for kind, tail in _PTX.findall(ptx):
        words = tail[1:].split(".")
        width = _PTX_WORD.match(words[-1])
        if "global" not in words or width is None:
            continue
        vector = [int(word[1:]) for word in words if re.fullmatch(r"v\d+", word)]
        bits = int(width[1]) * int(width[2] or 1) * (vector[0] if vector else 1)
        found.append(Access(kind == "st", bits, "cg" in words))
    return found


_ASYNC = re.compile(r"cp\.async\.\w+\.shared\.global[.\w:]* \[[^\]]*\], \[[^\]]*\], (\w+)")


def async_copies(ptx: str) -> list[int]:
    """Bits of each copy from global to shared memory in PTX code."""
    return [8 * int(size, 0) for size in _ASYNC.findall(ptx)]


_LLVM_PLAIN = re.compile(
    r"\b(load|store) (?:volatile )?<(\d+) x (\w+)>(?: .*)?, ptr addrspace\(1\)(.*)"
)
_LLVM_BUFFER = re.compile(
    r"call .*@llvm\.amdgcn\.raw\.ptr\.buffer\.(load|store)\.v(\d+)(\w+)\(.*?"
    r"i32 (?:noundef )?(\d+)\)"
)
_LLVM_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}


def llvm_accesses(llvm: str) -> list[Access]:
    """Global vector loads and stores of AMD's LLVM code.

    Assembly does not tell a row of a tensor from two neighbouring table entries, which its
    compiler loads at once; the vector types of the LLVM code do.
    """
    found = []
    for line in llvm.splitlines():
        plain, buffer = _LLVM_PLAIN.search(line), _LLVM_BUFFER.search(line)
        match = plain or buffer
        if match:
            kind, length, scalar, hints = match.groups()
            # The name of any other type (i32, bf16) ends with its bits.
            bits = _LLVM_BITS.get(scalar) or int(scalar.lstrip("bfi"))
            scratch = "nontemporal" in hints if plain else hints != "0"
            found.append(Access(kind == "store", int(length) * bits, scratch))
    return found


_GCN = re.compile(
    r"^\s*(?:global|buffer|flat)_(load|store)_(?:b(\d+)|dword(?:x(\d))?|[us]?(short|byte))", re.M
)
_GCN_BITS = {"short": 16, "byte": 8}


def gcn_accesses(assembly: str) -> list[Access]:
    """Global loads and stores of AMD assembly."""
    return [
        Access(kind == "store", int(bits or _GCN_BITS.get(name, 32 * int(words or 1))))
        for kind, bits, words, name in _GCN.findall(assembly)
    ]


class Resources(NamedTuple):
    """What a compiled kernel takes of each thread."""

    registers: int
    spills: int  # bytes of stack (NVIDIA), or spilled registers (AMD)


def nvidia_tool(cubin: bytes, name: str, flag: str) -> str:
    """What one of NVIDIA's tools, which come with Triton, prints of a cubin.

    Raises:
        RuntimeError: It failed.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{tool} {flag} failed: {run.stdout}{run.stderr}")
    return run.stdout


def nvidia_resources(cubin: bytes) -> Resources:
    """Resources of the kernel in a cubin, as ``cuobjdump`` reads them.

    Raises:
        RuntimeError: ``cuobjdump`` failed, or printed something else.
    """
    printed = nvidia_tool(cubin, "cuobjdump", "-res-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    if match is None:
        raise RuntimeError(f"cuobjdump printed no resources: {printed}")
    return Resources(int(match[1]), int(match[2]))


def amd_resources(assembly: str) -> Resources:
    """Resources of the kernel in AMD assembly, from its metadata.

    Raises:
        RuntimeError: An entry is missing.
    """
    spills = ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    entries = {}
    for name in ("vgpr_count", *spills):
        match = re.search(rf"^\s*\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if match is None:
            raise RuntimeError(f"assembly has no entry .{name}")
        entries[name] = int(match[1])
    return Resources(entries["vgpr_count"], sum(entries[name] for name in spills))
