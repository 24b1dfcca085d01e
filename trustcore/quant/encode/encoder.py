"""What an encoder is, and how codes are folded into bytes.

An encoder is a pure function from blocks of weights to the fields of a format, the counterpart of `Format.decode`:

    decode(encode(x, weight, search)) ~ x        x [block, M], fields [rows, M] and [M]

It takes M blocks side by side, is traced, and sees finite numbers within `limit` only.
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
        blocks: float32 `[block, M]`, the weight of each row in the squared error (`[block, M]`, `[block, 1]`, or None
            for all ones), and whether to search, to the fields of the format.
        limit: the largest magnitude that the format's scales can hold.
        tried: for formats of `ops.cpu.encode_blocks`, whether there are weights and whether to search, to the
            candidates and the rounds of re-fitting that `blocks` tries as well.
        tile: weights that a GPU or TPU takes at a time: enough work for a whole device, and temporaries that fit.
    """

    blocks: Callable[[jax.Array, jax.Array | None, bool], Encoded]
    limit: float
    tried: Callable[[bool, bool], tuple[tuple[float, ...], int]] | None = None
    tile: int = 1 << 24


def fold(codes: jax.Array, bits: int, chunk: int = 1) -> jax.Array:
    """Returns uint8 `[rows * bits / 8, M]` of codes `[rows, M]` below `2**bits`.

    The inverse of `formats.bits.unfold` for bytes: row `(c * parts + p) * chunk + j` of the codes, `parts = 8 / bits`,
    goes to bits `p * bits` and up of byte `c * chunk + j`.
    """
    parts = 8 // bits
    rows, m = codes.shape
    parted = codes.astype(jnp.uint8).reshape(rows // (parts * chunk), parts, chunk, m)
    folded = parted[:, 0]
    for p in range(1, parts):
        folded = folded | parted[:, p] << jnp.uint8(p * bits)
    return folded.reshape(rows // parts, m)
