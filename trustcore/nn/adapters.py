"""Low-rank adapters: a few trained numbers beside a weight matrix that stays as it is, float or packed.

    LoRA   W' = W + scale * down @ up                                      Hu et al., arXiv 2106.09685, eq. 3
    DoRA   W' = magnitude * V / |V|,  V = W + scale * down @ up            Liu et al., arXiv 2402.09353, eq. 5

W is `[K, N]`, down `[K, r]`, up `[r, N]`; |V| is the norm of each column, `[N]`. An `AdaptedWeight` stands where the
matrix stood, so `ops.linear` multiplies by it and no layer knows of it. W' is never made: x takes the short way through
`down` and `up`, and

    |V|^2 = |W|^2 + 2 scale * sum(up * (down^T W)) + scale^2 * sum(up * (down^T down up))

The base is frozen: no gradient reaches it. |V| counts as a constant in gradients (section 4.3 of the DoRA paper).

    model = add_adapters(model, rank=8, key=key)
    gradients = jax.grad(lambda adapters: loss(with_adapters(model, adapters)))(adapters_of(model))
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from trustcore.dtypes import accumulation_dtype
from trustcore.errors import ModelError
from trustcore.ops.linear import linear, linear_many
from trustcore.ops.weight import Weight
from trustcore.quant import QuantizedArray
from trustcore.quant.quantize import is_matrix, is_table, path_name

Where = Callable[[str, Any], bool] | Sequence[str]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is trained for one matrix.

    Attributes:
        down: `[K, r]`.
        up: `[r, N]`.
        magnitude: `[N]`, the norms of the columns (DoRA); None: they follow from the rest (LoRA).
        scale: of `down @ up`; static.
    """

    down: Any
    up: Any
    magnitude: Any = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def rank(self) -> int:
        """r."""
        return self.up.shape[-2]


Adapters = dict[str, Adapter]


@jax.tree_util.register_pytree_with_keys_class
class AdaptedWeight(Weight):
    """A matrix and its adapter, standing where the matrix stood.

    Args:
        base: float `[..., K, N]` or packed.
        adapter: beside it.
        squares: with a magnitude, the sums of squares of the base's columns, `[..., N]`; None computes them.
    """

    __slots__ = ("adapter", "base", "squares")

    def __init__(self, base: Any, adapter: Adapter, squares: Any = None):
        self.base, self.adapter = base, adapter
        self.squares = _squares(base) if squares is None and adapter.magnitude is not None else squares

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], None]:
        """Children under their names."""
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ("base", "adapter", "squares")], None

    @classmethod
    def tree_unflatten(cls, aux: None, children: Sequence[Any]) -> AdaptedWeight:
        """The inverse of flattening; children may be anything that a transform puts there."""
        made = object.__new__(cls)
        made.base, made.adapter, made.squares = children
        return made

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the base."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Weights of the base."""
        return self.base.size

    @property
    def dtype(self) -> Any:
        """Of the base."""
        return self.base.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of base and adapter."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def T(self) -> AdaptedWeight:
        """The transpose: a table that serves as output layer, too.

        Raises:
            ModelError: the adapter has a magnitude, which belongs to columns.
        """
        self._without_magnitude("T")
        a = self.adapter
        turned = Adapter(jnp.swapaxes(a.up, -1, -2), jnp.swapaxes(a.down, -1, -2), scale=a.scale)
        return AdaptedWeight(self.base.T, turned)

    @classmethod
    def products(
        cls, x: jax.Array, weights: Sequence[Weight], *, implementation: str | None = None
    ) -> tuple[jax.Array, ...]:
        """Returns `x @ W'` for each weight; the products with their bases in one go where that is faster."""
        adapted = [weight for weight in weights if isinstance(weight, AdaptedWeight)]
        bases = linear_many(x, [_frozen(weight.base) for weight in adapted], implementation=implementation)
        return tuple(weight._adapt(x, y) for weight, y in zip(adapted, bases, strict=True))

    def take(self, indices: jax.Array) -> jax.Array:
        """Returns rows of W', `[*indices.shape, N]`.

        Raises:
            ModelError: the adapter has a magnitude.
        """
        self._without_magnitude("take")
        base, a = _frozen(self.base), self.adapter
        rows = base.take(indices) if isinstance(base, Weight) else jnp.take(base, indices, axis=0, mode="clip")
        short = jnp.take(a.down, indices, axis=0, mode="clip")
        return rows + linear(short, a.up).astype(rows.dtype) * a.scale

    def dequantize(self) -> jax.Array:
        """Returns W' whole, in float32 (float64 for float64)."""
        a, base = self.adapter, _frozen(self.base)
        whole = base.dequantize() if isinstance(base, Weight) else base
        whole = whole.astype(accumulation_dtype(whole.dtype))
        change = jnp.matmul(a.down.astype(whole.dtype), a.up.astype(whole.dtype), precision="highest")
        whole = whole + a.scale * change
        if a.magnitude is None:
            return whole
        norm = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(whole**2, axis=-2, keepdims=True)))
        return jnp.broadcast_to((a.magnitude / norm[..., 0, :])[..., None, :], whole.shape).astype(whole.dtype) * whole

    def _adapt(self, x: jax.Array, y: jax.Array) -> jax.Array:
        a = self.adapter
        y = y + linear(linear(x, a.down), a.up) * a.scale
        if a.magnitude is None:
            return y
        norm = self._norm()
        factor = a.magnitude.astype(norm.dtype) / norm
        return y * jnp.broadcast_to(factor.astype(y.dtype), y.shape)

    def _norm(self) -> jax.Array:
        """|V| of each column, a constant."""
        assert self.squares is not None
        wide = self.squares.dtype
        down, up = (jax.lax.stop_gradient(part.astype(wide)) for part in (self.adapter.down, self.adapter.up))
        crossed = jnp.sum(up * linear(down.T, _frozen(self.base)).astype(wide), axis=0)
        own = jnp.sum(up * jnp.matmul(jnp.matmul(down.T, down, precision="highest"), up, precision="highest"), axis=0)
        scale = self.adapter.scale
        squares = jax.lax.stop_gradient(self.squares) + 2 * scale * crossed + scale**2 * own
        return jnp.sqrt(jnp.maximum(squares, jnp.finfo(wide).tiny))

    def _without_magnitude(self, caller: str) -> None:
        if self.adapter.magnitude is not None:
            raise ModelError(f"{caller}: the adapter has a magnitude for each column, and a table has rows; use LoRA.")

    def __repr__(self) -> str:
        kind = "LoRA" if self.adapter.magnitude is None else "DoRA"
        return f"AdaptedWeight({kind}, rank {self.adapter.rank}, {list(self.shape)})"


def add_adapters(
    tree: Any,
    *,
    rank: int,
    alpha: float | None = None,
    where: Where | None = None,
    magnitude: bool = False,
    rank_stabilized: bool = False,
    dtype: Any = None,
    key: jax.Array,
) -> Any:
    """Returns the tree with an adapter beside each of its matrices; it computes what it computed before.

    Args:
        tree: a model, or any pytree of weights.
        rank: r.
        alpha: the scale of what is added is `alpha / r`; None: alpha is r.
        where: which leaves, by (path, array), or patterns of paths such as "*.query.kernel". None: all matrices that
            `quantize` packs, but tables and the output layer.
        magnitude: whether to train the norms of columns, too (DoRA).
        rank_stabilized: whether the scale is `alpha / sqrt(r)`: Kalajdzievski, arXiv 2312.03732.
        dtype: of the adapters; None: float32 (float64 beside float64).
        key: of the random numbers.

    Raises:
        ModelError: rank is not positive, nothing is selected, or a leaf is no matrix or has an adapter already: all of
            them in one message.

    `down` is drawn uniformly from +-1 / sqrt(K), `up` is zero, a magnitude the norm that is there. Pack matrices
    before: `quantize` does not look beneath adapters.
    """
    if rank < 1:
        raise ModelError(f"add_adapters: rank is {rank}; it must be positive.")
    scale = (rank if alpha is None else alpha) / (rank**0.5 if rank_stabilized else rank)
    chosen = _predicate(where)
    faults: list[str] = []
    count = 0

    def one(path: str, leaf: Any) -> Any:
        nonlocal count
        if not chosen(path, leaf):
            return leaf
        if isinstance(leaf, AdaptedWeight):
            faults.append(f"{path} has an adapter")
            return leaf
        if len(leaf.shape) < 2 or isinstance(leaf, jax.ShapeDtypeStruct):
            faults.append(f"{path} is no matrix that is there: {leaf!r}"[:200])
            return leaf
        *lead, k, n = leaf.shape
        kind = accumulation_dtype(leaf.dtype) if dtype is None else dtype
        drawn = jax.random.uniform(jax.random.fold_in(key, count), (*lead, k, rank), kind, -(k**-0.5), k**-0.5)
        count += 1
        squares = _squares(leaf) if magnitude else None
        norm = None if squares is None else jnp.sqrt(squares).astype(kind)
        return AdaptedWeight(leaf, Adapter(drawn, jnp.zeros((*lead, rank, n), kind), norm, scale), squares)

    changed = _map(one, tree)
    if not count and not faults:
        faults.append("no leaf is selected; the paths are such as " + ", ".join(list(_leaves(tree))[:5]))
    _raise("add_adapters", faults)
    return changed


def adapters_of(tree: Any) -> Adapters:
    """Returns the adapters of a tree by the paths of their matrices: what is trained, saved and switched."""
    return {path: leaf.adapter for path, leaf in _leaves(tree).items() if isinstance(leaf, AdaptedWeight)}


def with_adapters(tree: Any, adapters: Mapping[str, Adapter]) -> Any:
    """Returns the tree with these adapters, in place of those that stood at their paths; others stay.

    Raises:
        ModelError: a path is no matrix of the tree, or an adapter does not fit it: all of them in one message.

    Cheap where an adapter of the same kind stood, so that it may be called in a training step.
    """
    there = _leaves(tree)
    faults = []
    for path, adapter in adapters.items():
        leaf = there.get(path)
        if leaf is None:
            near = difflib.get_close_matches(path, list(there), n=1)
            faults.append(f"{path} is not there" + (f" (nearest: {near[0]})" if near else ""))
        elif misfit := _misfit(leaf, adapter):
            faults.append(f"{path} {misfit}")
    _raise("with_adapters", faults)

    def one(path: str, leaf: Any) -> Any:
        if path not in adapters:
            return leaf
        if isinstance(leaf, AdaptedWeight):
            return AdaptedWeight(leaf.base, adapters[path], leaf.squares)
        return AdaptedWeight(leaf, adapters[path])

    return _map(one, tree)


def without_adapters(tree: Any) -> Any:
    """Returns the tree as it was before it had adapters."""
    return _map(lambda path, leaf: leaf.base if isinstance(leaf, AdaptedWeight) else leaf, tree)


def merge_adapters(tree: Any, *, requantize: bool = False) -> Any:
    """Returns the tree with W' in place of each matrix and its adapter.

    Args:
        tree: that has adapters.
        requantize: whether packed matrices are decoded and packed anew in their format, which rounds what was trained
            as it rounds the rest. Refused otherwise.

    Raises:
        ModelError: a matrix is packed and `requantize` is not given: all of them in one message.
    """
    faults: list[str] = []

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, AdaptedWeight):
            return leaf
        if not isinstance(leaf.base, Weight):
            return leaf.dequantize().astype(leaf.dtype)
        if isinstance(leaf.base, QuantizedArray) and requantize:
            base = leaf.base
            return QuantizedArray.quantize(leaf.dequantize(), base.description, transposed=base.transposed)
        faults.append(f"{path} is packed: {leaf.base!r}")
        return leaf

    merged = _map(one, tree)
    if faults:
        faults.append("pass requantize=True to round them anew, or keep the adapters beside them")
    _raise("merge_adapters", faults)
    return merged


def combine_adapters(*sets: Mapping[str, Adapter], weights: Sequence[float] | None = None) -> Adapters:
    """Returns adapters that add what several sets of them add, each times its weight (None: one).

    The rank of a matrix is the sum of its ranks in the sets.

    Raises:
        ModelError: there is another number of weights, or an adapter has a magnitude, which cannot be added.
    """
    weights = [1.0] * len(sets) if weights is None else list(weights)
    if len(weights) != len(sets):
        raise ModelError(f"combine_adapters: {len(weights)} weights for {len(sets)} sets of adapters.")
    found: Adapters = {}
    for path in dict.fromkeys(path for adapters in sets for path in adapters):
        parts = [(w, adapters[path]) for w, adapters in zip(weights, sets, strict=True) if path in adapters]
        if any(part.magnitude is not None for _, part in parts):
            raise ModelError(f"combine_adapters: {path} has a magnitude; such adapters do not add. Merge them instead.")
        down = jnp.concatenate([part.down for _, part in parts], axis=-1)
        up = jnp.concatenate([part.up * (w * part.scale) for w, part in parts], axis=-2)
        found[path] = Adapter(down, up)
    return found


def adapter_filter(path: tuple[Any, ...], leaf: Any) -> bool:
    """Returns whether a leaf is a trained number of an adapter, for masks of optimizers over whole models:
    `optax.masked(optimizer, jax.tree_util.tree_map_with_path(adapter_filter, model))`.
    """
    names = [getattr(key, "name", None) for key in path]
    return any(a == "adapter" and b in ("down", "up", "magnitude") for a, b in itertools.pairwise(names))


def _predicate(where: Where | None) -> Callable[[str, Any], bool]:
    if where is None:
        return lambda path, leaf: (
            (is_matrix(path, leaf) or isinstance(leaf, AdaptedWeight))
            and not is_table(path, leaf)
            and not path.startswith("output.")
        )
    if callable(where):
        return where
    patterns = [where] if isinstance(where, str) else list(where)
    return lambda path, leaf: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _misfit(leaf: Any, adapter: Adapter) -> str:
    *lead, k, n = leaf.shape if len(leaf.shape) > 1 else (0, 0)
    expected = ((*lead, k, adapter.rank), (*lead, adapter.rank, n), (*lead, n))
    given = [None if part is None else tuple(part.shape) for part in (adapter.down, adapter.up, adapter.magnitude)]
    for name, shape, wanted in zip(("down", "up", "magnitude"), given, expected, strict=True):
        if shape is not None and shape != wanted:
            return f"is {list(leaf.shape)}, and {name} of its adapter {list(shape)}; expected {list(wanted)}"
    return ""


def _squares(base: Any) -> Float[Array, "*lead N"]:
    whole = base.dequantize() if isinstance(base, Weight) else base
    whole = whole.astype(accumulation_dtype(whole.dtype))
    return jnp.sum(whole * whole, axis=-2)


def _frozen(base: Any) -> Any:
    return jax.tree.map(jax.lax.stop_gradient, base)


def _is_weight(node: Any) -> bool:
    return isinstance(node, Weight)


def _leaves(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_weight)[0]}


def _map(one: Callable[[str, Any], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: one(path_name(path), leaf), tree, is_leaf=_is_weight)


def _raise(caller: str, faults: Sequence[str]) -> None:
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ModelError(f"{caller}: {'; '.join(faults[:20])}{more}.")
