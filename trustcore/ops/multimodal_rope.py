"""Rotary positions of text beside images and videos: a token has a time, a row and a column (M-RoPE).

    pair i turns by position[axis of i] * frequency[i]

*Sections* give the first s0 pairs of a head the time, the next s1 the row, the last s2 the column (Qwen2-VL: Wang et
al., arXiv 2409.12191, section 2.1). *Interleaved* deals them out in turn, time, row, column, while rows and columns
have pairs left, so that each gets fast and slow ones (Qwen3-VL). Tokens of text have one number for all three, and then
both are plain rotary positions. `trustcore.ops.rope.rotate` turns queries and keys by these angles.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from trustcore.errors import ModelError
from trustcore.ops.rope import RopeConfig

Grid = tuple[int, int, int]


def multimodal_angles(
    positions: Int[Array, "3 B T"],
    config: RopeConfig,
    sections: Sequence[int],
    *,
    interleaved: bool = False,
    context: int | None = None,
) -> tuple[Float[Array, "B T 1 R2"], Float[Array, "B T 1 R2"]]:
    """Returns cosine and sine for every token and pair, float32, as `trustcore.ops.rope.angles` does for text.

    Args:
        positions: times, rows and columns of the tokens.
        config: frequencies.
        sections: pairs of channels that have the time, the row, the column; they add up to R / 2.
        interleaved: whether pairs are dealt out in turn; see the header of this file.
        context: tokens the call may see in all, for scalings that depend on it.

    Raises:
        ModelError: the sections do not add up, or positions are no three.
    """
    if positions.shape[0] != 3:
        raise ModelError(f"multimodal_angles: positions are {list(positions.shape)}; expected [3, B, T].")
    axes = jnp.asarray(pair_axes(config.size // 2, sections, interleaved=interleaved))
    place = jnp.moveaxis(jnp.take(positions, axes, axis=0), 0, -1).astype(jnp.float32)  # [B, T, R / 2]
    turn = (place * jnp.broadcast_to(jnp.asarray(config.frequencies(context), jnp.float32), place.shape))[:, :, None]
    magnitude = jnp.float32(config.magnitude)
    return jnp.cos(turn) * magnitude, jnp.sin(turn) * magnitude


def pair_axes(pairs: int, sections: Sequence[int], *, interleaved: bool = False) -> np.ndarray:
    """Returns int32 `[R / 2]`: 0 where a pair turns by the time, 1 by the row, 2 by the column.

    Raises:
        ModelError: the sections do not add up to `pairs`.

    >>> pair_axes(8, (4, 2, 2)).tolist(), pair_axes(8, (4, 2, 2), interleaved=True).tolist()
    ([0, 0, 0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2, 0, 0])
    """
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != pairs:
        raise ModelError(f"rope: sections {list(sections)} are no three numbers that add up to {pairs} pairs.")
    if not interleaved:
        return np.repeat(np.arange(3, dtype=np.int32), sections)
    axes = np.zeros(pairs, np.int32)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def multimodal_positions(parts: Sequence[int | Grid], start: int = 0) -> np.ndarray:
    """Returns int32 `[3, T]`, times, rows and columns of the tokens of a row.

    Args:
        parts: in order, the tokens of a piece of text, or the (times, rows, columns) of an image or a video, as many as
            there are tokens of it: for Qwen2-VL half the patches a side. An image has one time.
        start: position of the first token.

    A part begins one behind the largest position of the part before it (arXiv 2409.12191, section 2.1).

    Raises:
        ModelError: a part has no tokens.

    >>> multimodal_positions([2, (1, 2, 2), 1]).tolist()
    [[0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]]
    """
    made = []
    for part in parts:
        sizes = (part,) * 3 if isinstance(part, int) else part
        if len(sizes) != 3 or min(sizes) < 1:
            raise ModelError(f"rope: a part is {part!r}; expected a number of tokens, or (times, rows, columns).")
        if isinstance(part, int):
            made.append(np.broadcast_to(np.arange(part), (3, part)) + start)
        else:
            made.append(np.indices(sizes).reshape(3, -1) + start)
        start += max(sizes)
    return np.concatenate([np.zeros((3, 0), np.int64), *made], axis=1).astype(np.int32)
