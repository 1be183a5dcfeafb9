# SPDX-License-Identifier: Apache-2.0
"""Facts about a compiled kernel, read out of its cubin (an ELF image) without a GPU or CUDA tools.

Registers, stack and code size come from the ELF sections; instructions need NVIDIA's nvdisasm (PyPI package
nvidia-cuda-nvdisasm, in the extra ``dev``).
"""

from __future__ import annotations

import collections
import dataclasses
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from .errors import CompileError

_FATBIN_MAGIC = 0xBA55ED50
_ELF_MAGIC = b"\x7fELF"
_ELF_HEADER_BYTES = 64

# Attributes of the .nv.info sections: format byte, attribute byte, then 16 bits of value or size.
_EIFMT_SIZED = 4
_EIATTR_FRAME_SIZE = 0x11
_EIATTR_REGCOUNT = 0x2F
_FIELD_OF = {_EIATTR_FRAME_SIZE: "stack_bytes", _EIATTR_REGCOUNT: "registers"}


@dataclasses.dataclass(frozen=True)
class CubinFacts:
    """Of the one kernel in a cubin.

    kernel: its symbol.
    registers: per thread at launch (setmaxnreg changes it later).
    stack_bytes: local memory of a thread, 0 without spills or local arrays.
    code_bytes: machine code.
    """

    kernel: str
    registers: int
    stack_bytes: int
    code_bytes: int


def facts(cubin: bytes) -> CubinFacts:
    """Reads the sections of a cubin with one kernel.

    Raises:
        CompileError: not a cubin, or not exactly one kernel in it.
    """
    found = _sections(cubin)
    kernels = [name.removeprefix(".text.") for name in found if name.startswith(".text.")]
    if len(kernels) != 1:
        raise CompileError(f"the cubin holds {len(kernels)} kernels, not one: {', '.join(kernels)}")
    kernel = kernels[0]
    values = _info(found.get(".nv.info", b""))
    if "registers" not in values:
        raise CompileError(f"the cubin of {kernel} does not say how many registers it needs")
    return CubinFacts(
        kernel=kernel,
        registers=values["registers"],
        stack_bytes=values.get("stack_bytes", 0),
        code_bytes=len(found[f".text.{kernel}"]),
    )


def from_object(object_file: bytes) -> bytes:
    """The cubin inside a host object file that the DSL has exported (it lies there in a fat binary).

    Raises:
        CompileError: there is none.
    """
    at = object_file.find(struct.pack("<I", _FATBIN_MAGIC))
    while at >= 0:
        # fat binary: a 16-byte header, then an entry header whose size stands at its byte 4, then the image
        if at + 24 <= len(object_file):
            start = at + 16 + struct.unpack_from("<I", object_file, at + 20)[0]
            if object_file[start : start + 4] == _ELF_MAGIC:
                return object_file[start : start + _elf_bytes(object_file[start : start + _ELF_HEADER_BYTES])]
        at = object_file.find(struct.pack("<I", _FATBIN_MAGIC), at + 4)
    raise CompileError("the object file holds no cubin")


def nvdisasm() -> str | None:
    """Path of NVIDIA's disassembler (package nvidia-cuda-nvdisasm, or PATH); None where it is missing."""
    for folder in map(Path, sys.path):
        for path in sorted(folder.glob("nvidia/*/bin/nvdisasm")):
            return str(path)
    return shutil.which("nvdisasm")


_INSTRUCTION = re.compile(r"^\s*/\*(?P<at>[0-9a-f]{4,})\*/\s+(?P<if>@!?U?P[0-9T]+\s+)?(?P<opcode>[A-Z][A-Za-z0-9_.]*)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
# What a loop does its work with. A stretch of a loop that a branch skips and that holds none of these is a slow path.
_WORK = ("HGMMA", "LDGSTS", "UTMALDG", "MUFU.EX2")


def _disassemble(cubin: bytes) -> list[str]:
    tool = nvdisasm()
    if tool is None:
        raise CompileError("nvdisasm was not found: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"nvdisasm failed: {done.stderr.strip()}")
    return done.stdout.splitlines()


def opcodes(cubin: bytes) -> list[str]:
    """Every instruction's full opcode ("HGMMA.64x80x16.F32.BF16") in program order.

    Raises:
        CompileError: nvdisasm is not installed, or does not understand the cubin.
    """
    return [found["opcode"] for line in _disassemble(cubin) if (found := _INSTRUCTION.match(line))]


def loops(cubin: bytes) -> dict[str, list[str]]:
    """Opcodes of one round of a forward kernel's two steady loops: {"consumer": ..., "producer": ...}.

    The consumer's is the innermost loop with HGMMA, the producer's the innermost one with LDGSTS, or with UTMALDG where
    all keys come by TMA. Slow paths inside
    them (retries of a barrier, the guard of fixed_ref) are left out: stretches without work that a branch skips.

    Raises:
        CompileError: as ``opcodes``, or the kernel has no such loops.
    """
    code, labels, branches = [], {}, []
    for line in _disassemble(cubin):
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            if target := _BRANCH.search(line):
                branches.append((len(code), target[1], found["if"] is not None))
            code.append(found["opcode"])
    jumps = [(at, labels[target], maybe) for at, target, maybe in branches]
    loads = "LDGSTS" if count(code, "LDGSTS") else "UTMALDG"
    return {role: _innermost(code, jumps, wanted) for role, wanted in (("consumer", "HGMMA"), ("producer", loads))}


def _innermost(code: list[str], jumps: list[tuple[int, int, bool]], wanted: str) -> list[str]:
    # The way back from an out-of-line retry is a backward branch too, but an unconditional one. So is that of a loop
    # which tests its end at the top: it counts where no other loop is found.
    back = [(start, end, maybe) for end, start, maybe in jumps if start <= end and count(code[start:end], wanted)]
    spans = [(start, end) for start, end, maybe in back if maybe] or [(start, end) for start, end, _ in back]
    if not spans:
        raise CompileError(f"the kernel has no loop with {wanted}")
    start, end = min(spans, key=lambda span: span[1] - span[0])
    cold: set[int] = set()
    for at, target, maybe in jumps:
        if maybe and start <= at < target <= end and not any(count(code[at:target], op) for op in _WORK):
            cold.update(range(at + 1, target))
    return [code[i] for i in range(start, end + 1) if i not in cold]


def count(instructions: list[str], prefix: str) -> int:
    """How many opcodes are ``prefix`` or start with ``prefix.``."""
    return sum(op == prefix or op.startswith(f"{prefix}.") for op in instructions)


def histogram(instructions: list[str]) -> collections.Counter:
    """Counts by the opcode's first word."""
    return collections.Counter(op.split(".")[0] for op in instructions)


# ---- ELF -----------------------------------------------------------------------------------------------------------
def _headers(elf: bytes):
    """(name, type, offset, size) of every section."""
    if elf[:4] != _ELF_MAGIC:
        raise CompileError("not an ELF image")
    (table,) = struct.unpack_from("<Q", elf, 40)
    entry_bytes, number, names_index = struct.unpack_from("<HHH", elf, 58)
    raw = []
    for i in range(number):
        name_at, kind, _, _, offset, size = struct.unpack_from("<IIQQQQ", elf, table + i * entry_bytes)
        raw.append((name_at, kind, offset, size))
    names = raw[names_index][2]
    for name_at, kind, offset, size in raw:
        end = elf.index(b"\0", names + name_at)
        yield elf[names + name_at : end].decode(), kind, offset, size


def _sections(elf: bytes) -> dict[str, bytes]:
    return {name: elf[offset : offset + size] for name, _, offset, size in _headers(elf)}


def _info(section: bytes) -> dict[str, int]:
    """Attributes of .nv.info that matter here. Each is about the kernel: the cubin has only one."""
    values, at = {}, 0
    while at + 4 <= len(section):
        form, attribute, size = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == _EIFMT_SIZED:
            if attribute in _FIELD_OF:  # symbol index, then the value
                values[_FIELD_OF[attribute]] = struct.unpack_from("<II", section, at)[1]
            at += size
    return values


def _elf_bytes(header: bytes) -> int:
    """Length of an ELF64 image from its header: the end of the section or of the program header table."""
    phoff, shoff = struct.unpack_from("<QQ", header, 32)
    phentsize, phnum, shentsize, shnum = struct.unpack_from("<HHHH", header, 54)
    return max(shoff + shentsize * shnum, phoff + phentsize * phnum)
