"""A tree of weights to the same tree ready for quantization-aware training, and from there to packed weights.

    tree --prepare--> FakeQuantized --calibrate--> (train) --convert--> QuantizedArray

A tree is whatever jax flattens: nnx modules, dicts. Only `calibrate` needs to know how it is run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trustcore.errors import QuantizationError
from trustcore.ops.weight import Weight
from trustcore.quant.quantize import Formats, Predicate, format_of, is_matrix, is_table
from trustcore.quant.training.fp8_weight import Fp8Weight
from trustcore.quant.training.inputs import SEEN, Inputs
from trustcore.quant.training.scheme import Scheme
from trustcore.quant.training.trees import map_weights, weights_of
from trustcore.quant.training.weight import METHODS, FakeQuantized


def prepare(
    tree: Any,
    format: Formats,
    *,
    where: Predicate | None = None,
    transposed: Predicate | None = None,
    method: str = "lsq",
    clipped: bool = True,
    activations: str | None = None,
    activation_method: str = "lsq",
) -> Any:
    """Returns `tree` with its matrices as trainable weights that are seen through their codes.

    Args:
        tree: a pytree of weights.
        format: a name such as "int4:g64" (see `Scheme.parse`), or names by pattern or function, as `quantize` takes
            them.
        where: which leaves, by (path, array). None: `is_matrix`.
        transposed: which arrays are `[N, K]`. None: those called "table" or "embedding".
        method: "lsq" trains the scales; "ste" keeps those that the range of the weights gives; "minmax" takes them
            from the weights at each step.
        clipped: whether weights beyond the codes get no gradient.
        activations: how the products' inputs are quantized, such as "int8:token" or "int8"; None leaves them. One
            scale for all needs `calibrate` before training: until then results are NaN.
        activation_method: "lsq" or "pact"; see `trustcore.quant.training.inputs`.

    Raises:
        QuantizationError: a method or format is not known, a selected leaf is no float matrix that the format fits, or
            none is selected. All faults in one message, with their paths.
    """
    if method not in METHODS:
        raise QuantizationError(f"prepare: method is {method!r}; choose from {', '.join(METHODS)}.")
    inputs = None if activations is None else Inputs.parse(activations, activation_method)
    faults: list[str] = []
    paths: list[str] = []

    def one(path: str, leaf: Any) -> Any:
        paths.append(path)
        if isinstance(leaf, Weight) or not (where or is_matrix)(path, leaf):
            return leaf
        name = format_of(format, path, leaf)
        if name is None:
            return leaf
        scheme, is_transposed = Scheme.parse(name), (transposed or is_table)(path, leaf)
        shape, dtype = getattr(leaf, "shape", ()), getattr(leaf, "dtype", None)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            faults.append(f"{path}: it is abstract; load or initialize the weights first")
        elif len(shape) < 2 or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            faults.append(f"{path}: it is no float matrix; leave it out by `where`")
        elif fault := scheme.storage.refusal(shape[-1] if is_transposed else shape[-2]):
            faults.append(f"{path}: {fault}")
        else:
            return FakeQuantized.of(
                leaf, scheme, transposed=is_transposed, method=method, clipped=clipped, inputs=inputs
            )
        return leaf

    made = map_weights(one, tree)
    if not faults and not weights_of(made, FakeQuantized):
        faults.append(f"of {len(paths)} leaves, `where` and `format` select none (paths: {', '.join(paths[:3])})")
    if faults:
        raise QuantizationError(f"prepare: {'; '.join(faults[:20])}")
    return made


def calibrate(tree: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Returns `tree` with the scales of its inputs set from what flows through it.

    Args:
        tree: what `prepare` made.
        function: called as `function(tree, *args)`, once; may be jitted. Inputs are not quantized meanwhile.
        args: a batch.

    Raises:
        QuantizationError: no input has a scale to set, or nothing was multiplied by some weight.

    A table `[N, K]` that was looked up and not multiplied has no inputs: it is left without a scale.
    """
    watched = map_weights(lambda _, leaf: _watch(leaf), tree)

    def total(tree: Any) -> jax.Array:
        leaves = jax.tree.leaves(function(tree, *args))
        return sum((jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves if _is_float(leaf)), jnp.zeros(()))

    seen = weights_of(jax.grad(total, allow_int=True)(watched), FakeQuantized)
    starts: dict[str, jax.Array | None] = {}
    for path, w in weights_of(tree, FakeQuantized).items():
        if w.inputs is not None and w.inputs.trained:
            found = seen[path].leaves["seen"]
            starts[path] = None if w.transposed and found[-1] == 0 else w.inputs.start(found)
    if not starts:
        raise QuantizationError('calibrate: no weight has an input scale; call prepare(..., activations="int8").')
    missed = [path for path, start in starts.items() if start is not None and not jnp.isfinite(start)]
    if missed:
        raise QuantizationError(f"calibrate: no finite input reached {', '.join(missed[:20])}.")
    return map_weights(lambda path, leaf: leaf.with_input_scale(starts[path]) if path in starts else leaf, tree)


def convert(tree: Any) -> Any:
    """Returns `tree` with its trained weights packed: `QuantizedArray`s that decode to what was trained, bit for bit.

    Weights with quantized inputs become `ActivationQuantized` or `QuantizedInputs`, a packed weight together with its
    inputs' scale. Those of `fp8_join` become E4M3 codes under the scale that their products use.

    Raises:
        QuantizationError: there is nothing to pack, or a scale was never set.
    """
    trained = weights_of(tree, FakeQuantized)
    unset = [p for p, w in trained.items() if "input_scale" in w.leaves and not jnp.isfinite(w.leaves["input_scale"])]
    if unset:
        raise QuantizationError(f"convert: no scale for the inputs of {', '.join(unset[:20])}; call calibrate first.")
    if not trained and not weights_of(tree, Fp8Weight):
        raise QuantizationError("convert: no weight of this tree was prepared for training; call prepare first.")
    return map_weights(lambda _, leaf: leaf.packed() if isinstance(leaf, FakeQuantized | Fp8Weight) else leaf, tree)


def kinds(tree: Any) -> Any:
    """Returns the tree with a word for each array: "weight", "scale" (trained), or "fixed".

    For `optax.multi_transform`: scales want no weight decay, and often a smaller step; whatever is fixed wants neither.
    """

    def of(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, FakeQuantized):
            return jax.tree.map(lambda x: "weight" if _is_float(x) else "fixed", leaf)
        step = "fixed" if leaf.method == "ste" else "scale"
        words = {"values": "weight", "scale": step, "offset": step, "input_scale": "scale", "seen": "fixed"}
        return leaf.replace(**{name: words[name] for name in leaf.leaves})

    return map_weights(of, tree)


def _watch(leaf: Any) -> Any:
    if isinstance(leaf, FakeQuantized) and leaf.inputs is not None and leaf.inputs.trained:
        return leaf.replace(input_scale=None, seen=jnp.zeros((SEEN,)))
    return leaf


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
