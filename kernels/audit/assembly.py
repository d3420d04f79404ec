"""What a compiled kernel takes and how wide it reaches memory, read from its code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton


@dataclass(frozen=True)
class Access:
    """A load from or a store to global memory.

    Attributes:
        store: Whether it is a store.
        bits: Bits that one thread moves.
        scratch: Whether it goes around the first-level cache: a look at the partial sums of
            other programs, not at a role of a tensor.
    """

    store: bool
    bits: int
    scratch: bool = False


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


_LLVM_BITS = {"half": 16, "bfloat": 16, "i16": 16, "float": 32, "i32": 32, "double": 64, "i64": 64}
_LLVM_LOAD = re.compile(r"\bload (?:volatile )?<(\d+) x (\w+)>, ptr addrspace\(1\)(.*)")
_LLVM_STORE = re.compile(r"\bstore (?:volatile )?<(\d+) x (\w+)> .*, ptr addrspace\(1\)(.*)")
_LLVM_BUFFER = re.compile(
    r"@llvm\.amdgcn\.raw\.ptr\.buffer\.(load|store)\.v(\d+)(\w+)\(.*?i32 (?:noundef )?(\d+)\)"
)
_SHORT_NAMES = {"f16": "half", "bf16": "bfloat", "f32": "float", "f64": "double"}


def llvm_accesses(llvm: str) -> list[Access]:
    """Global vector loads and stores of AMD's LLVM code.

    Assembly does not tell a row of a tensor from two neighbouring table entries, which its
    compiler loads at once; the vector types of the LLVM code do.
    """
    found = []
    for line in llvm.splitlines():
        for pattern, store in ((_LLVM_LOAD, False), (_LLVM_STORE, True)):
            match = pattern.search(line)
            if match and match[2] in _LLVM_BITS:
                bits = int(match[1]) * _LLVM_BITS[match[2]]
                found.append(Access(store, bits, "nontemporal" in match[3]))
        match = _LLVM_BUFFER.search(line)
        if match and not line.startswith("declare"):
            kind = _SHORT_NAMES.get(match[3], match[3])
            found.append(
                Access(match[1] == "store", int(match[2]) * _LLVM_BITS[kind], match[4] != "0")
            )
    return found


_GCN = re.compile(r"^\s*(?:global|buffer|flat)_(load|store)_(\w+)", re.MULTILINE)
_GCN_BITS = {
    "b128": 128, "dwordx4": 128, "b96": 96, "dwordx3": 96, "b64": 64, "dwordx2": 64, "b32": 32,
    "dword": 32, "b16": 16, "short": 16, "ushort": 16, "sshort": 16, "short_d16": 16,
    "short_d16_hi": 16, "b8": 8, "byte": 8, "ubyte": 8, "sbyte": 8,
}  # fmt: skip


def gcn_accesses(assembly: str) -> list[Access]:
    """Global loads and stores of AMD assembly."""
    found = []
    for kind, width in _GCN.findall(assembly):
        if width in _GCN_BITS:
            found.append(Access(kind == "store", _GCN_BITS[width]))
    return found


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: Registers of a thread.
        spills: Bytes of stack of a thread (NVIDIA), or spilled registers (AMD).
    """

    registers: int
    spills: int


def nvidia_resources(cubin: bytes) -> Resources:
    """Resources of the kernel in a cubin, as ``cuobjdump`` reads them.

    Raises:
        RuntimeError: ``cuobjdump`` failed, or printed something else.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(r"REG:(\d+) STACK:(\d+)", run.stdout)
    if match is None:
        raise RuntimeError(f"{' '.join(command)} printed no resources: {run.stdout}{run.stderr}")
    return Resources(int(match[1]), int(match[2]))


def amd_resources(assembly: str) -> Resources:
    """Resources of the kernel in AMD assembly, from its metadata.

    Raises:
        RuntimeError: An entry is missing.
    """

    def entry(name: str) -> int:
        match = re.search(rf"^\s*\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if match is None:
            raise RuntimeError(f"assembly has no entry .{name}")
        return int(match[1])

    spills = entry("vgpr_spill_count") + entry("sgpr_spill_count")
    return Resources(entry("vgpr_count"), spills + entry("private_segment_fixed_size"))
