# SPDX-License-Identifier: Apache-2.0
"""Where the PTX ISA puts matrix elements, written from its text and figures and not from the emulator's code.

Swizzles are given as the figures give them: rows of an atom whose 16-byte chunks are permuted, not as an xor of address
bits. Modes are those of a WGMMA descriptor: 0 none, 1 128 bytes, 2 64 bytes, 3 32 bytes (PTX ISA 9.7.15.5.1).
"""

import numpy as np

ATOM_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of one row of the atom


def accumulator_fragment(matrix):
    """(64, N) -> (128 threads, N / 2): register i of thread t of a warpgroup (PTX ISA 9.7.15.5.2, "D fragment")."""
    t, i = np.arange(128)[:, None], np.arange(matrix.shape[1] // 2)[None]
    row = (t // 32) * 16 + (t % 32) // 4 + 8 * ((i // 2) % 2)
    return matrix[row, (i // 4) * 8 + (t % 4) * 2 + i % 2]


def operand_fragment(a_bytes):
    """A of a register-A wgmma, bytes (64, K, es) -> uint32 (128, 4) (PTX ISA 9.7.15.5.2, figure "A fragment")."""
    es = a_bytes.shape[2]
    per_register = 4 // es
    out = np.zeros((128, 4), np.uint32)
    for t in range(128):
        for r in range(4):
            row = t // 32 * 16 + t % 32 // 4 + 8 * (r % 2)
            col = (t % 4) * per_register + (r // 2) * 4 * per_register
            out[t, r] = int.from_bytes(a_bytes[row, col : col + per_register].tobytes(), "little")
    return out


def swizzled(offset, mode):
    """Byte offset of an element of a TMA tile that starts on a 1024-byte boundary (PTX ISA 5.5.7, figures "swizzle
    mode").

    In each 128-byte line the eight 16-byte chunks change places: with 128-byte swizzle chunk c of line n goes to c ^
    (n % 8), with 64-byte swizzle to c ^ (n % 4), with 32-byte swizzle to c ^ (n % 2).
    """
    line, chunk, rest = offset // 128, offset % 128 // 16, offset % 16
    flip = {0: 0 * line, 1: line % 8, 2: line % 4, 3: line % 2}[mode]
    return line * 128 + (chunk ^ flip) * 16 + rest


def place(elements, major, mode, lbo, sbo, size=32768):
    """The bytes of a shared-memory tile that holds an operand.

    Args:
        elements: uint8 (MN, K, es).
        major: "k" or "mn": the contiguous direction.
        mode: Swizzle mode of the descriptor.
        lbo, sbo: Leading and stride byte offsets of the descriptor.
    """
    n_mn, n_k, es = elements.shape
    width, out = ATOM_BYTES[mode], np.zeros(size, np.uint8)
    for mn in range(n_mn):
        for k in range(n_k):
            along, across = (k * es, mn) if major == "k" else (mn * es, k)
            if mode == 0:
                chunk_step, group_step = (lbo, sbo) if major == "k" else (sbo, lbo)
                at = along // 16 * chunk_step + across // 8 * group_step + across % 8 * 16 + along % 16
            else:
                at = along // width * lbo + across // 8 * sbo + swizzle_in_atom(across % 8, along % width, mode)
            out[at : at + es] = elements[mn, k]
    return out


def swizzle_in_atom(row, byte, mode):
    """Offset in an atom of 8 rows x ATOM_BYTES: chunks are permuted within the 128-byte line that the row lies in."""
    width = ATOM_BYTES[mode]
    line = row * width // 128
    flip = {1: line, 2: line % 4, 3: line % 2}[mode]
    chunk = byte // 16 ^ flip
    return row * width + chunk * 16 + byte % 16
