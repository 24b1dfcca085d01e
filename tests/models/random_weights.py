"""Packed matrices with random fields, of every format and granularity: what they stand for does not matter."""

import ml_dtypes
import numpy as np

from trustcore.quant import FORMATS, QuantizedArray
from trustcore.quant.formats.scaled import ScaledFormat


def random_weight(kind, k, n, *, seed=0, transposed=False):
    """`kind`: a format, then after colons g64, channel, tensor, 128x128, asym, order, double."""
    name, *options = kind.split(":")
    rng, spec = np.random.default_rng(seed), FORMATS[name]
    fields = _scaled(spec, options, k, n, rng) if isinstance(spec, ScaledFormat) else _blocks(spec, k, n, rng)
    return QuantizedArray(name, fields, transposed=transposed)


def _scaled(spec, options, k, n, rng):
    fields = {}
    for plane in spec.planes:
        codes = rng.integers(0, 256, (k * plane.bits // 8, n), dtype=np.uint8)
        if spec.name == "ternary":
            codes &= np.uint8(0b01010101)  # codes 0 and 1: three is none
        if plane.dtype.itemsize == 1 and plane.dtype.kind not in "iu":
            codes = rng.standard_normal((k, n)).astype(plane.dtype).view(np.uint8)
        fields[plane.name] = codes.view(plane.dtype)
    grain = next((o for o in options if o[0] == "g" or o in ("channel", "tensor", "128x128")), None)
    group = spec.group or k
    shape = (k // group, n)
    if grain is not None:
        shape = {"channel": (1, n), "tensor": (1, 1), "128x128": (-(-k // 128), -(-n // 128))}.get(grain, shape)
        shape = (k // int(grain[1:]), n) if grain[0] == "g" else shape
    if spec.powers:
        fields["scale"] = rng.integers(110, 130, shape, dtype=np.uint8)
    elif "double" in options:
        fields["scale"] = rng.integers(0, 256, shape, dtype=np.uint8)
        fields["levels"] = np.sort(rng.uniform(-1, 1, (256, 1))).astype(np.float32)
        fields["nested"] = rng.uniform(0.01, 0.02, (1, -(-shape[0] * n // 256))).astype(np.float32)
        fields["offset"] = np.float32([[0.05]])
    else:
        fields["scale"] = rng.uniform(0.01, 0.02, shape).astype(np.float16)
    if "asym" in options:
        low, high = (-128, 128) if spec.bits == 8 else (0, 1 << spec.bits)
        fields["zero"] = rng.integers(low, high, shape).astype(np.int8 if spec.bits == 8 else np.uint8)
    if "order" in options:
        fields["order"] = rng.permutation(k).astype(np.int32)
    return fields


def _blocks(spec, k, n, rng):
    fields = {}
    for name, field in spec.field_shapes(k, n).items():
        if np.dtype(field.dtype).kind in "iu":
            highest = {"scales": 126, "exponent": 130}.get(name, 127) if spec.name in ("mxfp4", "nvfp4") else 127
            values = rng.integers(0, highest, field.shape)
            if spec.name in ("mxfp4", "nvfp4") and name == "codes":
                values = rng.integers(0, 256, field.shape)
        elif np.dtype(field.dtype) == ml_dtypes.bfloat16 or name == "values":
            values = rng.standard_normal(field.shape)
        else:
            values = rng.uniform(0.001, 0.002, field.shape)
        fields[name] = values.astype(field.dtype)
    return fields
