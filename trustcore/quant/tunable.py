"""What may be tuned of a product with a packed weight: the implementation, how far it unrolls, how wide a tile is.

The weight of a measurement is random numbers packed in the format; where nothing is encoded in it, one is to be given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import Target
from kernels_pallas.tuning import Cost, Facts, Tunable, Values, completed
from trustcore.errors import TrustcoreError
from trustcore.ops.linear import linear
from trustcore.quant.array import QuantizedArray
from trustcore.quant.encode import no_encoder
from trustcore.quant.formats import BLOCK_FORMATS, FORMATS
from trustcore.quant.formats.format import TILE
from trustcore.quant.matmul import _REFUSALS, facts

GRIDS = {
    "native": {},
    "stream": {"unroll": (1, 2, 4, 8, 16)},
    "tiles": {"tile": (TILE, 2 * TILE, 4 * TILE, 8 * TILE, 16 * TILE)},
}
LARGEST = 2**31  # bytes of the decoded matrix, which the oracle holds
_SLAB = 512  # columns that are packed in earnest; a format of blocks along K repeats them


def _complete(given: dict[str, Any]) -> dict[str, Any]:
    optional = {"format": "", "transposed": False, "order": False}
    made = completed("packed_product", given, ("R", "K", "N"), optional)
    name = str(made["format"]).split(":", maxsplit=1)[0]
    if name not in FORMATS:
        raise ValueError(
            f"packed_product: {made['format']!r} is no format; write format=q4_k or format=int4:g64, for example."
        )
    if 4 * made["K"] * made["N"] > LARGEST:
        size = 4 * made["K"] * made["N"] / 1e9
        raise ValueError(f"packed_product: the oracle decodes the matrix, here {size:.0f} GB; tune a smaller one.")
    return made


def _facts(x: Any, w: QuantizedArray) -> Facts | None:
    rows = 1
    for n in x.shape[:-1]:
        rows *= n
    return facts(rows, w)


def weight(known: Facts) -> QuantizedArray:
    """Returns a random weight of those facts.

    Raises:
        ValueError: nothing is encoded in its format, or the shape does not fit it.
    """
    why = no_encoder(known["format"])
    if why:
        raise ValueError(f"packed_product: {why}; give a weight of it.")
    k, n = (known["N"], known["K"]) if known["transposed"] else (known["K"], known["N"])  # as it is stored
    repeats = known["format"] in BLOCK_FORMATS and n > _SLAB
    matrix = jax.random.normal(jax.random.key(0), (k, _SLAB if repeats else n)) * k**-0.5
    try:
        w = QuantizedArray.quantize(matrix, known["format"], search=False)
    except TrustcoreError as error:
        raise ValueError(f"packed_product: {error}") from error
    fields = dict(w.fields)
    if repeats:
        fields = {name: jnp.concatenate([f] * -(-n // _SLAB), axis=-1)[..., :n] for name, f in fields.items()}
    if known["order"]:
        fields["order"] = jax.random.permutation(jax.random.key(1), k).astype(jnp.int32)
    return QuantizedArray(w.format, fields, transposed=known["transposed"])


def _operands(known: Facts) -> tuple[Any, ...]:
    return jax.random.normal(jax.random.key(2), (known["R"], known["K"])), weight(known)


def _run(known: Facts) -> Callable[..., Any]:
    return linear


def _oracle(known: Facts, operands: tuple[Any, ...]) -> Any:
    return linear(*operands, implementation="dequantize")


def _refusal(target: Target, implementation: str, known: Facts) -> str:
    return _refused(implementation, tuple(sorted(known.items())))


@functools.lru_cache(maxsize=256)
def _refused(implementation: str, known: tuple[tuple[str, Any], ...]) -> str:
    """The refusal of a product, asked without making the weight."""
    f = dict(known)
    found = []

    def ask(fields: Any) -> jax.Array:
        w = weight(f) if fields is None else QuantizedArray(f["format"], fields, transposed=f["transposed"])
        found.append(_REFUSALS[implementation](f["R"], w))
        return jnp.zeros(())

    fields = None
    if f["format"] in BLOCK_FORMATS:
        k, n = (f["N"], f["K"]) if f["transposed"] else (f["K"], f["N"])
        fields = BLOCK_FORMATS[f["format"]].field_shapes(k, n)
    jax.eval_shape(ask, fields)
    return found[0]


def _cost(target: Target, known: Facts, given: Values) -> Cost:
    rows, k, n = known["R"], known["K"], known["N"]
    flops, codes = 2.0 * rows * k * n, k * n
    if given["implementation"] == "native":
        return Cost(flops, codes, 1, 2)
    if given["implementation"] == "stream":
        return Cost(flops, codes + 8.0 * rows * n * k / 32, k / given.get("unroll", 1))
    tile = given.get("tile", TILE)
    return Cost(flops, codes + 8.0 * k * n, -(-n // tile), tile=4 * k * tile)


PRODUCT = Tunable(
    op="packed_product",
    sources=("trustcore.quant.matmul", "trustcore.ops.cpu", "trustcore.quant.formats.layout"),
    grids=GRIDS,
    sizes=("R", "K", "N"),
    complete=_complete,
    facts=_facts,
    operands=_operands,
    run=_run,
    oracle=_oracle,
    refusal=_refusal,
    cost=_cost,
    reduction=lambda known: known["K"],
)
TUNABLES = (PRODUCT,)
