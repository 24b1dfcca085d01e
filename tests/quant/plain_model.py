"""A residual gated network as a plain dict of arrays and one function, with biases; and its links and stream."""

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.quant.folding import Link, Stream

V, D, F = 40, 64, 96

NORM = Link(("layer.gain",), ("layer.gate", "layer.up"))
UP = Link(("layer.up", "layer.up_bias"), ("layer.down",))
LAST = Link(("last",), ("head",))
STREAM = Stream(("embed",), (NORM, LAST), ("layer.down", "layer.down_bias"))


def plain_model(seed=0, outliers=0.0):
    """Weights; `outliers` is the deviation of the logarithm of the norm's gain: some inputs then dwarf the others."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=0.1):
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    gain = np.exp(outliers * rng.standard_normal(D)) if outliers else rng.uniform(0.5, 1.5, D)
    return {
        "embed": normal(V, D, scale=1.0),
        "layer": {
            "gain": jnp.asarray(gain, jnp.float32),
            "gate": normal(D, F),
            "up": normal(D, F),
            "up_bias": normal(F),
            "down": normal(F, D),
            "down_bias": normal(D),
        },
        "last": jnp.asarray(rng.uniform(0.5, 1.5, D), jnp.float32),
        "head": normal(D, V),
    }


def apply(tree, tokens, *, inputs=False):
    """Logits; with `inputs` also what the matrices of the layer read, by path."""
    layer = tree["layer"]
    h = jnp.take(tree["embed"], tokens, axis=0)
    x = norm(h, layer["gain"])
    y = jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"] + layer["up_bias"][None])
    h = h + y @ layer["down"] + layer["down_bias"][None]
    logits = norm(h, tree["last"]) @ tree["head"]
    return (logits, {"layer.gate": x, "layer.down": y}) if inputs else logits


def norm(x, gain):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain[None]


def tokens(count=200, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, V, count), jnp.int32)
