"""What links and streams of a decoder name, and untied decoders. That they are true is tested in tests/quant."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.models.small import CONFIG, random_decoder, some_tokens
from trustcore.errors import ModelError
from trustcore.models import Decoder, decoder_links, decoder_stream, untie
from trustcore.quant import quantize
from trustcore.quant.quantize import path_name


@pytest.mark.parametrize(
    "changes", ({}, {"tied": True}, {"qkv_bias": True, "out_bias": True, "mlp_bias": True}), ids=str
)
def test_every_weight_of_a_block_is_named_once_in_each_part(changes):
    config = dataclasses.replace(CONFIG, **changes)
    paths = {path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(random_decoder(config))[0]}
    matrices = {p for p in paths if p.startswith("blocks.") and p.endswith("kernel")}
    read = [path for link in decoder_links(config) for path in link.consumers]
    assert sorted(read) == sorted(matrices)
    stream = decoder_stream(config)
    touching = [*stream.embeddings, *stream.writers, *(p for n in stream.norms for p in (*n.sources, *n.consumers))]
    inner = {f"blocks.{i}.{n}" for i in range(2) for n in ("attention.query", "attention.key", "attention.value")}
    inner |= {f"blocks.{i}.mlp.{n}" for i in range(2) for n in ("gate", "up")}
    assert set(touching) == paths - {f"{layer}.bias" for layer in inner}  # those biases are added behind the stream
    assert len(touching) == len(set(touching)) + config.tied
    assert decoder_links(random_decoder(config)) == decoder_links(config)


def test_an_untied_decoder_is_the_same_function():
    model, t = random_decoder(dataclasses.replace(CONFIG, tied=True)), some_tokens()
    model.source = "somewhere"
    untied = untie(model)
    assert untied.output is not None and not untied.config.tied and untied.source == "somewhere"
    assert model.output is None and model.config.tied
    run = jax.jit(lambda m, t: m(t))
    np.testing.assert_allclose(run(untied, t), run(model, t), atol=1e-6)
    assert untied.parameters == model.parameters + CONFIG.vocab_size * CONFIG.features
    assert untie(untied) is untied
    packed = quantize(model, "q8_0")
    np.testing.assert_allclose(untie(packed)(t), packed(t), atol=1e-6)


def test_an_abstract_decoder_is_not_untied():
    with pytest.raises(ModelError, match="the embedding is abstract"):
        untie(Decoder(dataclasses.replace(CONFIG, tied=True)))
