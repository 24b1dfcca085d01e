"""What an encoder is, and how codes are folded into bytes.

An encoder is a pure function from blocks of weights to the fields of a format, the counterpart of `Format.decode`:

    decode(encode(x, weight)) ~ x        x [..., block, N], fields [..., rows, N] and [..., N]

It may be traced, vectorizes over every axis but the rows of a block, and sees finite numbers within `limit` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Encoded = dict[str, jax.Array]


class Encoder(NamedTuple):
    """One entry of the table of encoders.

    Args:
        blocks: float32 blocks `[..., block, N]`, and the weight of each row in the squared error, `[..., block, 1]` or
            None for all ones, to the fields of the format.
        limit: the largest magnitude that the format's scales can hold.
    """

    blocks: Callable[[jax.Array, jax.Array | None], Encoded]
    limit: float


def fold(codes: jax.Array, bits: int, chunk: int = 1) -> jax.Array:
    """Returns uint8 `[..., rows * bits / 8, N]` of codes `[..., rows, N]` below `2**bits`.

    The inverse of `formats.bits.unfold` for bytes: row `(c * parts + p) * chunk + j` of the codes, `parts = 8 / bits`,
    goes to bits `p * bits` and up of byte `c * chunk + j`.
    """
    parts = 8 // bits
    *lead, rows, n = codes.shape
    parted = codes.astype(jnp.uint8).reshape(*lead, rows // (parts * chunk), parts, chunk, n)
    folded = parted[..., 0, :, :]
    for p in range(1, parts):
        folded = folded | parted[..., p, :, :] << jnp.uint8(p * bits)
    return folded.reshape(*lead, rows // parts, n)
