"""What links and streams of a decoder name, and untied decoders. That they are true is tested in tests/quant."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.small import CONFIG, random_decoder, some_tokens
from tests.models.test_families import CASES, QUICK, load, recorded, write
from trustcore.errors import ModelError
from trustcore.models import Decoder, DecoderConfig, decoder_links, decoder_stream, untie
from trustcore.models.model import parameters_of
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


@pytest.mark.parametrize("name", CASES)
def test_links_of_every_family_leave_the_function_as_it_is(tmp_path, name):
    """Channels of the sources divided by a number of their own, those of the consumers multiplied with it."""
    case = recorded(name)
    model = load(write(tmp_path, case), dtype="float32")
    parameters = parameters_of(model)
    rng = np.random.default_rng(0)
    for link in decoder_links(model):
        channels = jnp.asarray(rng.uniform(0.5, 2, parameters[link.sources[0]].get_value().shape[-1]), jnp.float32)
        for path in link.sources:
            value = parameters[path].get_value()
            parameters[path].set_value(value / jnp.broadcast_to(channels, value.shape))
        for path in link.consumers:
            value = parameters[path].get_value()
            parameters[path].set_value(value * jnp.broadcast_to(link.spread(channels)[:, None], value.shape))
    run = jax.jit(lambda m, t: m(t), compiler_options=QUICK)
    np.testing.assert_allclose(run(model, jnp.asarray(case["tokens"], jnp.int32)), case["plain"], atol=3e-4)


def test_streams_that_do_not_pass_a_rotation_on_are_refused():
    for name, what in (
        ("gpt2", "layer norms before"),
        ("olmo2", "rms norms after"),
        ("mixtral", "rms norms before its products and experts"),
    ):
        config = DecoderConfig.from_hugging_face(json.loads(str(recorded(name)["config"])))
        with pytest.raises(ModelError, match=f"decoder_stream: a {name} model has {what}"):
            decoder_stream(config)
