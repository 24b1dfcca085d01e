"""A small decoder, as a module, as a GGUF file and as a safetensors folder that hold the same weights."""

import json
from typing import NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from trustcore.models import Decoder, DecoderConfig
from trustcore.models.families import FAMILIES, gguf_of
from trustcore.models.model import parameters_of
from trustcore.ops.rope import RopeConfig
from trustcore.weights.gguf_writer import write_gguf

CONFIG = DecoderConfig(
    vocab_size=96,
    features=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    hidden=96,
    context=128,
    rope=RopeConfig(16, theta=1e4, interleaved=True, original_context=128),
    norm_eps=1e-5,
)


class Name(NamedTuple):
    """One weight: its path in the module, in GGUF files, in Hugging Face's files."""

    path: str
    gguf: str
    hugging_face: str


def names(config):
    """Returns the names of the weights of a decoder whose files hold each as a tensor of its own."""
    theirs = FAMILIES[config.family].names_for(config)
    stored = {rule.paths[0]: rule.stored for rule in theirs.rules(config)}
    return [Name(rule.paths[0], rule.stored, stored.get(rule.paths[0])) for rule in gguf_of(config).names.rules(config)]


def random_decoder(config=CONFIG, seed=0):
    model = Decoder(config, rngs=nnx.Rngs(seed))
    # Norms that are not all one, so that a swapped pair shows.
    for i, block in enumerate(model.blocks):
        for norm in (block.attention_norm, block.mlp_norm):
            norm.weight.set_value(jax.random.uniform(jax.random.key(i), (config.features,), minval=0.5, maxval=1.5))
    return model


def arrays(model):
    """Returns {name entry: float32 array as files hold it}."""
    found, parameters = {}, parameters_of(model)
    for name in names(model.config):
        if name.path in parameters:
            array = np.asarray(parameters[name.path].get_value(), np.float32)
            found[name] = np.ascontiguousarray(array.T if name.path.endswith("kernel") else array)
    return found


def metadata(config=CONFIG):
    return {
        "general.architecture": "llama",
        "llama.block_count": config.layers,
        "llama.embedding_length": config.features,
        "llama.feed_forward_length": config.hidden,
        "llama.attention.head_count": config.heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.freq_base": config.rope.theta,
        "llama.rope.dimension_count": config.rope.size,
        "llama.context_length": config.context,
    }


def write_as_gguf(path, model, encoding=None, **changes):
    """Writes matrices packed as `encoding` (None: float32). Returns the weights that the file then holds."""
    tensors, held = {}, {}
    for name, array in arrays(model).items():
        if encoding is None or array.ndim == 1:
            tensors[name.gguf] = held[name.path] = array
        else:
            kind = getattr(gguf.GGMLQuantizationType, encoding.upper())
            raw = gguf.quants.quantize(array, kind).view(np.uint8).reshape(array.shape[0], -1)
            tensors[name.gguf] = (raw, encoding)
            held[name.path] = gguf.quants.dequantize(raw, kind).reshape(array.shape)
    tensors.update(changes)
    write_gguf(path, metadata(model.config), {k: v for k, v in tensors.items() if v is not None})
    return held


def halves(array, heads):
    """Rows of a query or key weight, from interleaved rotary pairs to the halves that Hugging Face stores."""
    rows = array.reshape(heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(np.swapaxes(rows, 1, 2)).reshape(array.shape)


def write_as_hugging_face(folder, model):
    config, tensors = model.config, {}
    for name, array in arrays(model).items():
        turned = ".attention.query." in name.path or ".attention.key." in name.path
        heads = config.heads if ".query." in name.path else config.kv_heads
        tensors[name.hugging_face] = halves(array, heads) if turned else array
    save_file(tensors, folder / "model.safetensors")
    described = {
        "model_type": "llama",
        "hidden_size": config.features,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.hidden,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "max_position_embeddings": config.context,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
    }
    (folder / "config.json").write_text(json.dumps(described))


def some_tokens(batch=2, length=12, seed=3):
    return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (batch, length)), jnp.int32)
