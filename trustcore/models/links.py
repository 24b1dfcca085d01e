"""How the weights of a decoder hang together, for the methods that fold one weight into another.

    attention_norm -> query, key, value    value -> out    mlp_norm -> gate, up    up -> down    norm -> output

`trustcore.quant.folding` says what links and streams are. `untie` gives a decoder an output layer of its own, which
methods that change the embedding or the last norm need.
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
    """Returns the links of all blocks, four a block, in the order in which they are computed.

    The last norm and the output layer are left out: the output layer is rarely packed as low as the rest, and where it
    is the embedding nothing can be folded into it. Query and key are no link: positions turn them in between.
    """
    return tuple(link for i in range(_config(model).layers) for link in _block_links(_config(model), i))


def decoder_stream(model: Decoder | DecoderConfig) -> Stream:
    """Returns what reads and writes the residual stream.

    Where the output layer is the embedding, it stands as that in both places; `rotate` then asks for `untie`.
    """
    config = _config(model)
    norms, writers, values = [], [], []
    for i in range(config.layers):
        attention, value, mlp, _ = _block_links(config, i)
        norms += [attention, mlp]
        values.append(value)
        block = f"blocks.{i}."
        writers += [f"{block}attention.out.kernel", f"{block}mlp.down.kernel"]
        writers += [f"{block}attention.out.bias"] * config.out_bias + [f"{block}mlp.down.bias"] * config.mlp_bias
    norms.append(Link(("norm.weight",), ("embedding.table" if config.tied else "output.kernel",)))
    return Stream(("embedding.table",), tuple(norms), tuple(writers), tuple(values))


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


def _block_links(config: DecoderConfig, i: int) -> tuple[Link, Link, Link, Link]:
    block = f"blocks.{i}."
    attention, mlp = f"{block}attention.", f"{block}mlp."
    read = tuple(f"{attention}{name}.kernel" for name in ("query", "key", "value"))
    # Weights of a softmax add up to one, so a bias of the values reaches the output as it is.
    values = (f"{attention}value.kernel", *([f"{attention}value.bias"] if config.qkv_bias else []))
    up = (f"{mlp}up.kernel", *([f"{mlp}up.bias"] if config.mlp_bias else []))
    return (
        Link((f"{block}attention_norm.weight",), read),
        Link(values, (f"{attention}out.kernel",), heads=(config.kv_heads, config.heads)),
        Link((f"{block}mlp_norm.weight",), (f"{mlp}gate.kernel", f"{mlp}up.kernel")),
        Link(up, (f"{mlp}down.kernel",)),
    )


def _config(model: Decoder | DecoderConfig) -> DecoderConfig:
    return model.config if isinstance(model, Decoder) else model
