"""`Fp8Weight`: a trainable weight whose products are computed in 8-bit floats, anywhere a weight array stands.

    parameters, states = fp8_prepare(model, recipe)
    loss, gradients, states = fp8_value_and_grad(loss_of)(parameters, states, batch)      # loss_of(model, batch)
    parameters = ... optimizer ...                                                         # knows nothing of states
    model = fp8_join(parameters, states)

Parameters hold float arrays alone. States are a dict from path to `Fp8State`, a pytree for the train state: saved,
sharded and donated with it, empty where the recipe keeps none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trustcore.errors import ImplementationError, QuantizationError
from trustcore.ops.weight import Weight
from trustcore.quant.array import QuantizedArray
from trustcore.quant.quantize import Predicate, is_matrix, is_table
from trustcore.quant.training.fp8 import (
    E4M3,
    BlockScaling,
    CurrentScaling,
    DelayedScaling,
    Fp8State,
    Recipe,
    amax_scale,
    started,
    to_float8,
    updated,
)
from trustcore.quant.training.fp8_dot import fp8_dot, square_scales
from trustcore.quant.training.trees import map_weights, weights_of


@jax.tree_util.register_pytree_with_keys_class
class Fp8Weight(Weight):
    """A trainable matrix `[K, N]` with the state of its products.

    Args:
        values: float `[K, N]`, the full-precision weights.
        state: of delayed scaling, else None.
        recipe: how scales are found; static.
    """

    __slots__ = ("recipe", "state", "values")

    def __init__(self, values: jax.Array, state: Fp8State | None, recipe: Recipe):
        self.values, self.state, self.recipe = values, state, recipe

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """Leaves are the values and the state's."""
        key = jax.tree_util.GetAttrKey
        return [(key("values"), self.values), (key("state"), self.state)], self.recipe

    @classmethod
    def tree_unflatten(cls, aux: Recipe, leaves: Sequence[Any]) -> Fp8Weight:
        """The inverse of flattening; leaves may be anything that a transform puts there."""
        return cls(leaves[0], leaves[1], aux)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """`[K, N]`."""
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the values."""
        return self.values.dtype

    def dequantize(self) -> jax.Array:
        """Returns the full-precision values, float32."""
        return self.values.astype(jnp.float32)

    def take(self, indices: jax.Array) -> jax.Array:
        """Returns rows of the full-precision values, float32."""
        return jnp.take(self.dequantize(), indices, axis=0, mode="clip")

    @classmethod
    def products(
        cls, x: jax.Array, weights: Sequence[Weight], *, implementation: str | None = None
    ) -> tuple[jax.Array, ...]:
        """Returns `x @ w` for each weight; see `fp8_dot`.

        Raises:
            ImplementationError: another implementation than "dot" is named.
        """
        if implementation not in (None, "dot"):
            raise ImplementationError(
                f"linear: implementation {implementation!r} was asked for, but the product is one of float8 operands; "
                'pass implementation="dot" or None.'
            )
        return tuple(fp8_dot(x, w.values, w.state, recipe=w.recipe) for w in weights if isinstance(w, Fp8Weight))

    def packed(self) -> QuantizedArray:
        """Returns the weight as the E4M3 codes that its products see next, one scale for all or one a block."""
        recipe, values = self.recipe, self.values.astype(jnp.float32)
        if self.state is not None:
            scale = self.state.scale[1].reshape(1, 1)
        elif isinstance(recipe, BlockScaling):
            scale = square_scales(values, recipe)
        elif isinstance(recipe, CurrentScaling):
            scale = amax_scale(jnp.max(jnp.abs(values)), E4M3, recipe.margin).reshape(1, 1)
        else:
            raise QuantizationError("a weight under delayed scaling is packed with its state; call fp8_join first.")
        size, (k, n) = recipe.block if isinstance(recipe, BlockScaling) else max(self.shape), self.shape
        each = jnp.repeat(jnp.repeat(scale, size, axis=0)[:k], size, axis=1)[:, :n]
        return QuantizedArray("fp8_e4m3", {"codes": to_float8(values, each, E4M3), "scale": 1.0 / scale})

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return self.products(jnp.asarray(x), [self])[0]

    def __repr__(self) -> str:
        return f"Fp8Weight({list(self.shape)}, {self.recipe})"


def fp8_prepare(tree: Any, recipe: Recipe, *, where: Predicate | None = None) -> tuple[Any, dict[str, Fp8State]]:
    """Returns `tree` with its matrices as `Fp8Weight`s, and the states of their products by path.

    Args:
        tree: a pytree of weights.
        recipe: `DelayedScaling`, `CurrentScaling` or `BlockScaling`.
        where: which leaves, by (path, array). None: `is_matrix`, without tables whose rows are looked up.

    Raises:
        QuantizationError: a selected leaf is no float matrix, or none is selected.
    """
    faults: list[str] = []

    def one(path: str, leaf: Any) -> Any:
        wanted = where(path, leaf) if where else is_matrix(path, leaf) and not is_table(path, leaf)
        if isinstance(leaf, Weight) or not wanted:
            return leaf
        if getattr(leaf, "ndim", 0) != 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            faults.append(f"{path}: it is no float matrix; leave it out by `where`")
            return leaf
        return Fp8Weight(jnp.asarray(leaf), None, recipe)

    made = map_weights(one, tree)
    weights = weights_of(made, Fp8Weight)
    if not faults and not weights:
        faults.append("`where` selects no leaf")
    if faults:
        raise QuantizationError(f"fp8_prepare: {'; '.join(faults[:20])}")
    if not isinstance(recipe, DelayedScaling):
        return made, {}
    return made, {path: started(w.values, recipe) for path, w in weights.items()}


def fp8_join(parameters: Any, states: dict[str, Fp8State]) -> Any:
    """Returns `parameters` with each weight's state in it: the model, ready to be called."""
    return map_weights(
        lambda path, leaf: Fp8Weight(leaf.values, states[path], leaf.recipe) if path in states else leaf, parameters
    )


def fp8_value_and_grad(function: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    """Returns a function of (parameters, states, *args) that gives (value, gradients, next states).

    Args:
        function: of (model, *args) to a scalar, or to (scalar, anything) with `has_aux`.
        has_aux: as in `jax.value_and_grad`.
    """

    def run(parameters: Any, states: dict[str, Fp8State], *args: Any) -> tuple[Any, Any, dict[str, Fp8State]]:
        def loss(parameters: Any, meters: dict[str, jax.Array]) -> Any:
            measuring = {path: state._replace(measured=meters[path]) for path, state in states.items()}
            return function(fp8_join(parameters, measuring), *args)

        meters = {path: state.measured for path, state in states.items()}
        value, (gradients, measured) = jax.value_and_grad(loss, (0, 1), has_aux)(parameters, meters)
        following = {
            path: updated(states[path], measured[path], w.recipe)
            for path, w in weights_of(parameters, Fp8Weight).items()
            if isinstance(w.recipe, DelayedScaling)
        }
        return value, gradients, following

    return run
