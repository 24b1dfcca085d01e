"""Recurrent layers over sequences of different lengths, one way or both: Flax's cells and loops under our names.

forward: state[t] = cell(state[t - 1], x[t]);  backward: the same from each row's last token to its first
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from trustcore.errors import ModelError
from trustcore.nn.initializers import initializer
from trustcore.nn.module import made_module

Cell = Literal["rnn", "lstm", "gru"]

_CELLS = {"rnn": nnx.SimpleCell, "lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell}


class Recurrent(nnx.Module):
    """A recurrent layer.

    "rnn": `h' = tanh(W x + U h + b)` (Elman, 1990); "lstm": Hochreiter and Schmidhuber, 1997; "gru": Cho et al., arXiv
    1406.1078.

    Args:
        features: D of the inputs.
        hidden: channels of the state, and of the outputs of one direction.
        cell: which one.
        both: whether a second cell reads each row backwards; the outputs then have twice the channels.
        dtype: of parameters and states.
        rngs: None leaves the parameters abstract.

    Raises:
        ModelError: there is no such cell.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        cell: Cell = "lstm",
        both: bool = False,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if cell not in _CELLS:
            raise ModelError(f"Recurrent: cell is {cell!r}; choose from {', '.join(_CELLS)}.")

        def make(rngs: nnx.Rngs) -> Any:
            inner = initializer("orthogonal")
            return _CELLS[cell](
                features, hidden, dtype=dtype, param_dtype=dtype, recurrent_kernel_init=inner, rngs=rngs
            )

        self.ahead = made_module(make, rngs)
        self.back = made_module(make, rngs) if both else None
        self.hidden, self.cell, self.dtype = hidden, cell, jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "B T D"], lengths: Int[Array, " B"] | None = None) -> Float[Array, "B T _"]:
        """Returns the outputs at each token.

        Args:
            x: T tokens of B rows.
            lengths: tokens of each row that count, the rest being padding on the right; None: all T.

        Outputs at padding are zero, and padding does not reach the outputs at tokens. Differentiable in x and the
        parameters. O(T) steps, one after the other.
        """
        batch, length = x.shape[:2]
        lengths = jnp.full((batch,), length, jnp.int32) if lengths is None else lengths
        found = self._run(self.ahead, x)
        if self.back is not None:
            turned = _reversed(x, lengths)
            found = jnp.concatenate([found, _reversed(self._run(self.back, turned), lengths)], axis=-1)
        counts = jnp.arange(length, dtype=lengths.dtype)[None, :] < lengths[:, None]
        return jnp.where(counts[..., None], found, jnp.zeros((), found.dtype))

    def step(self, state: Any, x: Float[Array, "B D"]) -> tuple[Any, Float[Array, "B H"]]:
        """Returns state and output after one more token; `start` makes the first state. One direction alone.

        Raises:
            ModelError: the layer reads both ways.
        """
        if self.back is not None:
            raise ModelError("Recurrent: a layer that reads both ways has no next step; it needs the whole row.")
        return self.ahead(state, x)

    def start(self, batch: int) -> Any:
        """Returns the state before the first token: zeros."""
        zeros = jnp.zeros((batch, self.hidden), self.dtype)
        return (zeros, zeros) if self.cell == "lstm" else zeros

    def _run(self, cell: Any, x: jax.Array) -> jax.Array:
        _, found = jax.lax.scan(cell, self.start(x.shape[0]), x.swapaxes(0, 1))
        return found.swapaxes(0, 1)


def _reversed(x: jax.Array, lengths: jax.Array) -> jax.Array:
    """Each row's tokens backwards; padding stays where it is."""
    place = jnp.arange(x.shape[1], dtype=lengths.dtype)[None, :]
    turned = jnp.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)
    return jnp.take_along_axis(x, turned[..., None], axis=1)
