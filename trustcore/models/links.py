"""How the weights of a decoder hang together, for the methods that fold one weight into another.

    attention_norm -> query, key, value    value -> out    mlp_norm -> gate, up    up -> down    norm -> output

A link is there where a family has it: a norm in front of products, of which all that read it are matrices (experts are
stacks of them, and are left out); an `up` that reaches `down` by products, or through ReLU, which passes positive
factors on. `trustcore.quant.folding` says what links and streams are. `untie` gives a decoder an output layer of its
own, which methods that change the embedding or the last norm need.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from trustcore.errors import ModelError
from trustcore.models.config import DecoderConfig
from trustcore.models.decoder import Decoder
from trustcore.nn.linear import Linear
from trustcore.quant import QuantizedArray
from trustcore.quant.folding import Link, Stream


def decoder_links(model: Decoder | DecoderConfig) -> tuple[Link, ...]:
    """Returns the links of all blocks in the order in which they are computed: four a block in Llama's shape.

    The last norm and the output layer are left out: the output layer is rarely packed as low as the rest, and where it
    is the embedding nothing can be folded into it. Query and key are no link: positions turn them in between.
    """
    config = _config(model)
    return tuple(
        link for i in range(config.layers) for link in (*_norm_and_values(config, i), *_feed_forward(config, i))
    )


def decoder_stream(model: Decoder | DecoderConfig) -> Stream:
    """Returns what reads and writes the residual stream.

    Where the output layer is the embedding, it stands as that in both places; `rotate` then asks for `untie`.

    Raises:
        ModelError: the stream cannot be turned: its norms are not RMS norms in front of matrices alone.
    """
    config = _config(model)
    if config.norm != "rms" or config.norm_place != "before" or config.experts is not None or not config.last_norm:
        raise ModelError(
            f"decoder_stream: a {config.family} model has {config.norm} norms {config.norm_place} its products"
            f"{' and experts' if config.experts else ''}; only RMS norms before matrices pass a rotation on."
        )
    norms, writers, values = [], [], []
    for i in range(config.layers):
        attention, value = _norm_and_values(config, i)
        norms += [attention, *(link for link in _feed_forward(config, i) if link.sources[0].endswith("norm.weight"))]
        values.append(value)
        block = f"blocks.{i}."
        writers += [f"{block}attention.out.kernel", f"{block}mlp.down.kernel"]
        writers += [f"{block}attention.out.bias"] * config.out_bias + [f"{block}mlp.down.bias"] * config.mlp_bias
    norms.append(Link(("norm.weight",), ("embedding.table" if config.tied else "output.kernel",)))
    tables = ("embedding.table", *(["positions.table"] if config.learned_positions else []))
    return Stream(tables, tuple(norms), tuple(writers), tuple(values))


def untie(model: Decoder) -> Decoder:
    """Returns the decoder with an output layer of its own, a copy of the embedding: the same function.

    The model that was given stays as it is, and a decoder that has an output layer is returned unchanged. Costs V * D
    weights more. A packed table is shared, not copied.

    Raises:
        ModelError: the embedding is abstract.
    """
    if model.output is not None:
        return model
    table = model.embedding.table.get_value()
    if isinstance(table, jax.ShapeDtypeStruct):
        raise ModelError("untie: the embedding is abstract; load or initialize the weights first.")
    copy: Decoder = jax.tree.map(lambda leaf: leaf, model)
    copy.config = dataclasses.replace(model.config, tied=False)
    output = Linear(copy.config.features, copy.config.vocab_size)
    output.kernel.set_value(table.T if isinstance(table, QuantizedArray) else jnp.asarray(table).T)
    copy.output = nnx.data(output)  # nnx took the None that stood there for a static attribute
    return copy


def _norm_and_values(config: DecoderConfig, i: int) -> tuple[Link, ...]:
    """The norm that attention reads, where it is in front, and the values that its output product reads."""
    path = f"blocks.{i}.attention."
    if config.latent is not None:
        first = "query" if config.latent.query_rank is None else "query_down"
        read, made, heads = (first, "latent", "turned"), ("value_up.kernel",), (config.heads, config.heads)
    else:
        # A bias of the values reaches the output in the channels of the values, whatever the shares add up to.
        made = ("value.kernel", *(["value.bias"] if config.qkv_bias else []))
        read, heads = ("query", "key", "value"), (config.kv_heads, config.heads)
    consumers = [f"{path}{name}.kernel" for name in read]
    if config.shared_norm:
        consumers += _readers(config, i)
    values = Link(tuple(path + name for name in made), (f"{path}out.kernel",), heads=heads)
    if config.norm_place == "after" or (config.shared_norm and _has_experts(config, i)):
        return (values,)
    return Link(_gain(config, f"blocks.{i}.attention_norm"), tuple(consumers)), values


def _feed_forward(config: DecoderConfig, i: int) -> list[Link]:
    """The norm that the feed-forward layer reads, and what its last product reads."""
    path, links = f"blocks.{i}.mlp.", []
    if _has_experts(config, i):
        assert config.experts is not None
        return [Link((f"{path}shared.up.kernel",), (f"{path}shared.down.kernel",))] if config.experts.shared else []
    if config.norm_place != "after" and not config.shared_norm:
        links.append(Link(_gain(config, f"blocks.{i}.mlp_norm"), tuple(_readers(config, i))))
    if config.gated or config.activation == "relu":
        up = (f"{path}up.kernel", *([f"{path}up.bias"] if config.mlp_bias else []))
        links.append(Link(up, (f"{path}down.kernel",)))
    return links


def _readers(config: DecoderConfig, i: int) -> list[str]:
    return [f"blocks.{i}.mlp.{name}.kernel" for name in (("gate", "up") if config.gated else ("up",))]


def _gain(config: DecoderConfig, norm: str) -> tuple[str, ...]:
    biased = config.norm == "layer" and config.norm_bias
    return (f"{norm}.weight", *([f"{norm}.bias"] if biased else []))


def _has_experts(config: DecoderConfig, i: int) -> bool:
    return config.layer(i).experts


def _config(model: Decoder | DecoderConfig) -> DecoderConfig:
    return model.config if isinstance(model, Decoder) else model
