"""Whether a model's layers are better run one after the other or by a scan: measured, as what an op takes is.

    tc.tune.search("model_layers", model, step="token", length=512, calls=1000)     measures now, and keeps the best
    print(tc.tune.best("model_layers", model, step="token", length=512, calls=1000))   what would be taken, and why
    model = tuned_layers(model, step="token", length=512, calls=1000)                  takes it

The list of layers compiles in time proportional to their number and reads packed weights where they lie; a scan
(`scan_layers`) compiles one layer, and copies each layer's weights out of the stack. Which is less depends on how often
a program runs: what counts is

    seconds of a call + seconds of tracing and compiling / calls

Both forms must give the same: the logits of the list, or its loss and the norm of its gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels_pallas import Target
from kernels_pallas.tuning import Cost, Facts, Tunable, Values, completed
from trustcore import tune
from trustcore.errors import ModelError
from trustcore.models.decoder import Decoder
from trustcore.models.random import random_model
from trustcore.models.scan import scan_layers, unscan_layers
from trustcore.nn.stack import Stack
from trustcore.quant import QuantizedArray

M = TypeVar("M", bound=nnx.Module)
Step = Literal["token", "forward", "gradient"]
OP = "model_layers"
STEPS = ("token", "forward", "gradient")
CALLS = 1000  # of a program, where nothing is said
GRIDS = {"list": {}, "scan": {"unroll": (1, 2, 4)}}


def tuned_layers(model: M, *, step: Step = "token", batch: int = 1, length: int = 512, calls: int = CALLS) -> M:
    """Returns the model in the form that was measured to be the fastest: a list of layers, or a scan over them.

    Args:
        model: a decoder.
        step: "token", one of each row over a cache of `length` slots; "forward", of `length` tokens; "gradient", of the
            loss of next tokens.
        batch, length: of the step.
        calls: how often a compiled program will run.

    Raises:
        ModelError: the model is no decoder.

    Tables are read in every mode. Nothing is measured: where nothing was, the model is the one given. `tune.best` says
    why. The form of a scan is a copy of the weights.
    """
    if _facts(model, step=step, batch=batch, length=length, calls=calls) is None:
        return model
    values = tune.best(OP, model, step=step, batch=batch, length=length, calls=calls).values
    if not values:
        return model
    scanned = isinstance(model.blocks, Stack)  # type: ignore[attr-defined]
    if values["implementation"] == "list":
        return unscan_layers(model) if scanned else model
    return scan_layers(unscan_layers(model) if scanned else model, unroll=values.get("unroll", 1))


def _facts(
    model: Any, *, step: str = "token", batch: int = 1, length: int = 512, calls: int = CALLS
) -> Facts | None:  # fmt: skip
    if not isinstance(model, Decoder):
        raise ModelError(f"{OP}: forms of layers are measured of decoders, and this is a {type(model).__name__}.")
    config = model.config
    if config.layers < 2:
        return None
    weights = jax.tree.leaves(next(iter(model.blocks)), is_leaf=lambda x: isinstance(x, QuantizedArray))
    largest = max(weights, key=lambda w: w.size)
    name = largest.description if isinstance(largest, QuantizedArray) else largest.dtype.name
    return {
        "B": batch, "T": length, "L": config.layers, "D": config.features, "calls": calls, "family": config.family,
        "format": name, "step": step,
    }  # fmt: skip


def _complete(given: dict[str, Any]) -> dict[str, Any]:
    words = {"calls": CALLS, "family": "llama", "format": "float32", "step": "token"}
    made = completed(OP, given, ("B", "T", "L", "D"), words)
    if made["step"] not in STEPS:
        raise ValueError(f"{OP}: step is {made['step']!r}; choose of {', '.join(STEPS)}.")
    return made


def _operands(known: Facts) -> tuple[Any, ...]:
    """A random model; those of other families and formats are to be given."""
    if (known["family"], known["format"]) != ("llama", "float32"):
        raise ValueError(f"{OP}: a {known['family']} of {known['format']} is to be given: search({OP!r}, model, ...).")
    size = known["D"]
    config = {
        "model_type": "llama", "num_hidden_layers": known["L"], "hidden_size": size, "intermediate_size": 4 * size,
        "num_attention_heads": max(1, size // 64), "vocab_size": 256, "max_position_embeddings": max(64, known["T"]),
    }  # fmt: skip
    return (random_model(config),)


def _prepare(known: Facts, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """The model in both forms, tokens, and the cache of each form where there is one."""
    (model,) = operands
    listed = unscan_layers(model) if isinstance(model.blocks, Stack) else model
    stacked = scan_layers(listed)
    rows, length = known["B"], known["T"]
    drawn = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length))
    if known["step"] != "token":
        return listed, stacked, jnp.asarray(drawn, jnp.int32), None, None
    caches = tuple(m.new_cache(rows, length) for m in (listed, stacked))
    return listed, stacked, jnp.asarray(drawn[:, :1], jnp.int32), *caches


def _arrange(known: Facts, prepared: tuple[Any, ...], given: Values) -> tuple[Any, ...]:
    listed, stacked, tokens, plain, of_stack = prepared
    if given.get("implementation", "list") == "list":
        return listed, tokens, plain
    model = jax.tree.map(lambda leaf: leaf, stacked)  # of the same arrays
    model.blocks.unroll = given.get("unroll", 1)
    return model, tokens, of_stack


def _run(known: Facts) -> Callable[..., Any]:
    if known["step"] == "gradient":
        return lambda model, tokens, cache: jax.value_and_grad(_loss, allow_int=True)(model, tokens)
    if known["step"] == "forward":
        return lambda model, tokens, cache: model(tokens)
    return lambda model, tokens, cache: model(tokens, cache=cache)


def _loss(model: Any, tokens: jax.Array) -> jax.Array:
    chances = jax.nn.log_softmax(model(tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(chances, tokens[:, 1:, None], -1))


def _checked(known: Facts, result: Any) -> Any:
    if known["step"] == "gradient":
        loss, gradients = result
        floats = (g for g in jax.tree.leaves(gradients) if jnp.issubdtype(g.dtype, jnp.floating))
        return loss, jnp.sqrt(functools.reduce(jnp.add, (jnp.sum(jnp.square(g.astype(jnp.float32))) for g in floats)))
    return result if known["step"] == "forward" else result[0]


def _oracle(known: Facts, operands: tuple[Any, ...]) -> Any:
    prepared = _prepare(known, operands)
    return _checked(known, _run(known)(*_arrange(known, prepared, {})))


def _resolved(target: Target, known: Facts, given: Values) -> Any:
    name = given.get("implementation", "list")
    return (name,) if name == "list" else (name, min(given.get("unroll", 1), known["L"]))


def _cost(target: Target, known: Facts, given: Values) -> Cost:
    return Cost(0.0, 0.0, known["L"] / given.get("unroll", 1))


LAYERS = Tunable(
    op=OP,
    sources=("trustcore.models.layer_form", "trustcore.models.decoder", "trustcore.nn.stack"),
    grids=GRIDS,
    sizes=("B", "T", "L", "D", "calls"),
    complete=_complete,
    facts=_facts,
    operands=_operands,
    prepare=_prepare,
    arrange=_arrange,
    run=_run,
    oracle=_oracle,
    checked=_checked,
    resolved=_resolved,
    cost=_cost,
    reduction=lambda known: known["L"] * known["D"],
    calls=lambda known: known["calls"],
)
tune.register(LAYERS)
