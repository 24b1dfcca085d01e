"""From codes, scales, zero points and groups, as files have them, to the fields of the scaled formats.

    codes  [K, N] unsigned, of b bits       planes of 4, 2 and 1 bits, consecutive rows of K in a byte, low bits first
    scale  [G, N]                           as it is
    zero   [G, N] unsigned                  dropped where all are 2**(b-1), which is what its absence means
    group  [K], the group of each row       order: rows sorted by group (None: they are); scales repeated where groups
                                            differ in size, so that each serves as many rows
Codes and zero points of 8 bits become signed.
"""

from __future__ import annotations

import math

import numpy as np

from trustcore.errors import ModelError

# Bits of the planes of each width, lowest-order plane first, and their names.
PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
PLANE_NAMES = ("codes", "high", "top")

SMALLEST_GROUP = 8  # rows; with fewer the scales would outweigh the codes


def integer_fields(
    codes: np.ndarray, bits: int, scale: np.ndarray, zero: np.ndarray | None = None, order: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Returns the fields of `int{bits}`.

    Args:
        codes: uint8 `[K, N]`, unsigned codes of `bits` bits.
        bits: 2 to 8.
        scale: float `[G, N]`.
        zero: unsigned integers `[G, N]` in units of the codes; None: 2**(bits-1).
        order: `[K]`: row r of `codes` is row order[r] of the matrix.

    Raises:
        ModelError: K is no whole number of the bytes of a plane.
    """
    fields = {"codes": signed(codes)} if bits == 8 else plane_fields(codes, bits)
    return {**fields, "scale": scale, **zero_field(zero, bits), **({} if order is None else {"order": order})}


def signed(codes: np.ndarray) -> np.ndarray:
    """Returns unsigned 8-bit codes as signed ones, less by 128."""
    return (codes ^ np.uint8(128)).view(np.int8)


def zero_field(zero: np.ndarray | None, bits: int) -> dict[str, np.ndarray]:
    """Returns the field of unsigned zero points of codes of `bits` bits; none where they say what is said without."""
    if zero is None or bool((zero == 1 << (bits - 1)).all()):
        return {}
    return {"zero": (zero.astype(np.int16) - 128).astype(np.int8) if bits == 8 else zero.astype(np.uint8)}


def plane_fields(codes: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """Returns the planes of `codes` (uint8 `[K, N]`) of 1 to 7 bits.

    Raises:
        ModelError: K is no whole number of the bytes of a plane.
    """
    fields, shift = {}, 0
    for name, width in zip(PLANE_NAMES, PLANES[bits], strict=False):
        fields[name] = pack_rows((codes >> np.uint8(shift)) & np.uint8((1 << width) - 1), width)
        shift += width
    return fields


def planes_to_codes(fields: dict[str, np.ndarray], bits: int) -> np.ndarray:
    """Returns uint8 `[K, N]`: the inverse of `plane_fields`."""
    parts, shift = [], 0
    for name, width in zip(PLANE_NAMES, PLANES[bits], strict=False):
        parts.append(unpack_rows(fields[name], width) << np.uint8(shift))
        shift += width
    return np.bitwise_or.reduce(parts)


def pack_rows(codes: np.ndarray, width: int) -> np.ndarray:
    """Returns `codes` (below 2**width) with 8 / width consecutive rows in a byte, low bits first."""
    each = 8 // width
    if codes.shape[0] % each:
        raise ModelError(f"{codes.shape[0]} inputs are no multiple of {each}, of which a byte holds the {width} bits")
    runs = codes.reshape(-1, each, codes.shape[1])
    packed = runs[:, 0].copy()
    for j in range(1, each):
        packed |= runs[:, j] << np.uint8(j * width)
    return packed


def unpack_rows(packed: np.ndarray, width: int) -> np.ndarray:
    """Returns the rows in `packed`: the inverse of `pack_rows`."""
    shifts = (np.arange(8 // width, dtype=np.uint8) * np.uint8(width))[:, None]
    codes = (packed[:, None, :] >> shifts) & np.uint8((1 << width) - 1)
    return codes.reshape(-1, packed.shape[1])


def by_group(
    group: np.ndarray, scale: np.ndarray, zero: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray | None]:
    """Returns (order, scale, zero) for rows of which row k belongs to group[k].

    Args:
        group: integers `[K]` from 0 to G - 1.
        scale, zero: `[G, N]`.

    Raises:
        ModelError: the groups differ in size so that fewer than 8 rows would share a scale.
    """
    order = np.argsort(group, kind="stable").astype(np.int32)
    if bool((order[1:] > order[:-1]).all()):
        order = None
    sizes = np.bincount(group, minlength=scale.shape[0])
    shared = math.gcd(*(int(size) for size in np.unique(sizes)))
    if bool((sizes == shared).all()):
        return order, scale, zero
    if shared < SMALLEST_GROUP:
        raise ModelError(
            f"groups of {', '.join(str(size) for size in np.unique(sizes)[:4])} rows share no size of at least "
            f"{SMALLEST_GROUP} rows"
        )
    repeats = sizes // shared
    return order, np.repeat(scale, repeats, axis=0), None if zero is None else np.repeat(zero, repeats, axis=0)


def block_scale(scale: np.ndarray, k: int, n: int, rows: int, columns: int, *, integer: bool) -> np.ndarray:
    """Returns the scale field `[G, C]` of blocks of `rows` outputs by `columns` inputs.

    Args:
        scale: `[ceil(N / rows), ceil(K / columns)]`, outputs first, as PyTorch's packages have it.
        k, n: inputs and outputs of the matrix.
        rows, columns: of a block; the last blocks may be smaller.
        integer: whether the format is one of integers, which have no ragged last block of inputs.

    What the formats cannot say is told by repeating scales over smaller groups.

    Raises:
        ModelError: these groups would be of fewer than 8 rows.
    """
    across = scale.T  # [blocks of K, blocks of N]
    if rows not in (1, 128) and rows < n:
        across = np.repeat(across, rows, axis=1)[:, :n]
    columns_here = min(columns, k)
    if columns == 128 and not integer:
        return across
    group = columns_here if k % columns_here == 0 else math.gcd(columns, k)
    if k % 128 and k // group == -(-k // 128) and not integer and group < k:
        group //= 2  # as many groups as there are blocks of 128: they would be taken for those
    if group < min(SMALLEST_GROUP, columns):
        raise ModelError(f"has blocks of {columns} inputs, which do not fit {k} inputs")
    if group < columns_here:
        across = np.repeat(across, columns // group, axis=0)[: k // group]
    return across
