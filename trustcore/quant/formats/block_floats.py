"""GGUF's 4-bit floats with a shared scale: E2M1 codes under a power of two (MXFP4) or an 8-bit float (NVFP4).

    mxfp4   w = 2**(exponent - 127) * e2m1                blocks of 32 (OCP Microscaling formats, v1.0)
    nvfp4   w = scale * e2m1, scale unsigned E4M3         sub-blocks of 16, four to a block
            times `tensor_scale`, float32 [1, 1], where there is one

Codes are kept doubled, as integers (0, 1, 2, 3, 4, 6, 8, 12 and their negatives), and the scale halved, as ggml does.
No field of a block is a float, so only `tensor_scale` has a gradient. Bit-exact with the `gguf` package, but for one
thing: exponents 0 and 1 of mxfp4 make a halved scale below 2**-126, which XLA takes for zero on the CPU. ggml's
readings of the scale bytes are kept: 255 is no NaN in mxfp4; in nvfp4 127 is zero and the uppermost bit is ignored, but
for 255.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.quant.formats.bits import lookup, unfold
from trustcore.quant.formats.layout import Affine, BlockFormat, Fields, in_order

E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _mxfp4_scale(fields: Fields) -> jax.Array:
    """2**(exponent - 128), built from its bits: the exponent field is exponent - 1, or the number is subnormal."""
    exponent = fields["exponent"].astype(jnp.uint32)[..., None, :]
    normal = (exponent - jnp.uint32(1)) << jnp.uint32(23)
    bits = jnp.where(exponent < jnp.uint32(2), jnp.uint32(1 << 21) << exponent, normal)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _nvfp4_scale(fields: Fields) -> jax.Array:
    """Half of an unsigned E4M3: exponent bias 7 and one less for the half; subnormals are 2**-10 apart."""
    scales = fields["scales"]  # [..., 4, N]
    exponent, mantissa = (scales >> jnp.uint8(3)) & jnp.uint8(15), scales & jnp.uint8(7)
    bits = (exponent.astype(jnp.uint32) + jnp.uint32(127 - 7 - 1)) << jnp.uint32(23)
    normal = jax.lax.bitcast_convert_type(bits | mantissa.astype(jnp.uint32) << jnp.uint32(20), jnp.float32)
    value = jnp.where(exponent == 0, mantissa.astype(jnp.float32) * 2.0**-10, normal)
    value = jnp.where(scales == jnp.uint8(127), 0.0, value)
    tensor_scale = fields.get("tensor_scale")
    return value if tensor_scale is None else value * tensor_scale.astype(jnp.float32)[..., None]


_MXFP4 = Affine(lambda fields: lookup(unfold(fields["codes"], 4, chunk=16), E2M1_DOUBLED), _mxfp4_scale)
_NVFP4 = Affine(lambda fields: lookup(unfold(fields["codes"], 4, chunk=8), E2M1_DOUBLED), _nvfp4_scale)

BLOCK_FLOATS: tuple[BlockFormat, ...] = (
    BlockFormat.of_affine("mxfp4", 32, in_order(("exponent", np.uint8, None), ("codes", np.uint8, 16)), _MXFP4),
    BlockFormat.of_affine(
        "nvfp4", 64, in_order(("scales", np.uint8, 4), ("codes", np.uint8, 32)), _NVFP4, ("tensor_scale",)
    ),
)
