"""Random weights of every scaled format, and a NumPy oracle that decodes them weight by weight.

The oracle knows nothing of the code it tests: bits are taken out of bytes with NumPy, small floats are ml_dtypes', and
every scale is looked up by the position of its weight.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)]
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
FLOATS = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "mxfp8_e4m3": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
    "mxfp6_e2m3": ml_dtypes.float6_e2m3fn,
    "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
}
INTEGERS = ("int1", "ternary", *(f"int{bits}" for bits in range(2, 9)))
NAMES = (*INTEGERS, *FLOATS, "nf4", "fp4")


def bits_of(name: str) -> int:
    """Returns the bits of a code."""
    if name.startswith("int"):
        return int(name[3:])
    return {"ternary": 2, "nf4": 4, "fp4": 4}.get(name) or (6 if "fp6" in name else 8)


def planes_of(codes: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """Returns the fields of unsigned codes `[..., K, N]`, bit by bit."""
    fields, below = {}, 0
    for field, width in zip(("codes", "high", "top"), PLANES[bits], strict=False):
        part = codes.astype(np.uint8) >> below & ((1 << width) - 1)
        count = 8 // width
        rows = part.reshape(*codes.shape[:-2], codes.shape[-2] // count, count, codes.shape[-1])
        fields[field] = sum((rows[..., j, :] << (j * width) for j in range(count)), np.uint8(0)).astype(np.uint8)
        below += width
    return fields


def codes_of(name: str, fields: dict) -> np.ndarray:
    """Returns the codes `[..., K, N]`: unsigned for fewer than 8 bits, else int8 or a float8's bytes."""
    bits = bits_of(name)
    if bits == 8:
        return np.asarray(fields["codes"])
    joined, below = 0, 0
    for field, width in zip(("codes", "high", "top"), PLANES[bits], strict=False):
        plane = np.asarray(fields[field])
        parts = np.stack([plane >> j * width & ((1 << width) - 1) for j in range(8 // width)], axis=-2)
        joined = joined + (parts.reshape(*plane.shape[:-2], -1, plane.shape[-1]).astype(int) << below)
        below += width
    return joined


def numbers_of(name: str, codes: np.ndarray) -> np.ndarray:
    """Returns what the codes stand for ahead of the scale, float32."""
    if name in FLOATS:
        return (
            codes.astype(np.uint8).view(FLOATS[name]).astype(np.float32) if "fp6" in name else codes.astype(np.float32)
        )
    if name in ("nf4", "fp4"):
        return np.array(NF4 if name == "nf4" else FP4, np.float32)[codes]
    offset = {"int1": 0.5, "ternary": 1, "int8": 0}.get(name, 2.0 ** (bits_of(name) - 1))
    return ((codes - offset) * (2 if name == "int1" else 1)).astype(np.float32)


def decoded(name: str, fields: dict) -> np.ndarray:
    """Returns float32 `[K, N]`, in logical order, with every operation rounded to float32."""
    codes = codes_of(name, fields)
    scale = np.asarray(fields["scale"])
    if "levels" in fields:
        m, n = scale.shape
        absolute = np.asarray(fields["levels"])[:, 0][scale] * nested_of(np.asarray(fields["nested"]), m, n)
        scale = absolute + np.asarray(fields["offset"])
    elif scale.dtype == np.uint8:
        scale = 2.0 ** (scale.astype(np.float64) - 127)
    scale = spread(scale.astype(np.float32), *codes.shape, integer=name in INTEGERS)
    numbers = numbers_of(name, codes)
    if "zero" in fields:
        zero = np.asarray(fields["zero"]).astype(np.float32)
        numbers = codes.astype(np.float32) - spread(zero, *codes.shape, integer=True)
    with np.errstate(all="ignore"):
        stored = (numbers * scale).astype(np.float32)
    if "order" not in fields:
        return stored
    logical = np.empty_like(stored)
    logical[np.asarray(fields["order"])] = stored
    return logical


def nested_of(nested: np.ndarray, m: int, n: int) -> np.ndarray:
    """Returns the nested scale of each of the scales `[m, n]`, 256 to each along the flattened `[n, m]`."""
    flat = nested.T.reshape(-1)  # [n, m / 256] or [1, n * m / 256]: either way, in the order of the flattened scales
    return flat[np.arange(n * m) // 256].reshape(n, m).T


def spread(values: np.ndarray, k: int, n: int, *, integer: bool) -> np.ndarray:
    """Returns the entry of `values` `[G, C]` that belongs to each of the weights `[k, n]`."""
    g, c = values.shape
    run = 128 if g == -(-k // 128) and (k % g or not integer) else k // g
    column = np.arange(n) if c == n else np.zeros(n, int) if c == 1 else np.arange(n) // 128
    return values[(np.arange(k) // run)[:, None], column[None, :]]


def fields_of(
    name: str, k: int, n: int, scale: tuple[int, int], *, zero: str = "", order: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns random fields of a `[k, n]` weight whose scales have shape `scale`.

    `zero` is "", "codes" (whole codes) or "float". Codes take every value.
    """
    rng = np.random.default_rng(seed)
    bits = bits_of(name)
    if name in FLOATS and bits == 8:
        values = rng.standard_normal((k, n)) * 2.0 ** rng.integers(-6, 4, (k, n))
        fields = {"codes": values.astype(FLOATS[name])}
    elif bits == 8:
        fields = {"codes": rng.integers(-128, 128, (k, n)).astype(np.int8)}
    else:
        fields = planes_of(rng.integers(0, 3 if name == "ternary" else 1 << bits, (k, n)), bits)
    if name.startswith("mx"):
        fields["scale"] = rng.integers(117, 132, scale).astype(np.uint8)
    else:
        fields["scale"] = (0.02 * (0.5 + rng.random(scale))).astype(np.float32)
    low, high = (-128, 128) if bits == 8 else (0, 1 << bits)
    if zero:
        whole = rng.integers(low, high, scale)
        fields["zero"] = whole.astype(np.int8 if bits == 8 else np.uint8)
        if zero == "float":
            fields["zero"] = (whole + rng.random(scale)).astype(np.float32)
    if order:
        fields["order"] = rng.permutation(k).astype(np.int32)
    return fields
