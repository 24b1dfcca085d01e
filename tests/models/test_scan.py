"""Scanned layers: the same numbers as a list of them, in programs that do not grow with depth."""

import dataclasses
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import trustcore
from tests.models.small import CONFIG, random_decoder, some_tokens
from trustcore.errors import ModelError
from trustcore.models import Decoder, random_model, scan_layers, unscan_layers
from trustcore.models.model import parameters_of
from trustcore.nn.stack import Stack, groups_of

QUICK = {"xla_backend_optimization_level": 0}
ALTERNATING = dataclasses.replace(CONFIG, layers=7, window=5, windowed=(True, True, False) * 2 + (True,))


def loss(model, tokens):
    return jnp.mean(jnp.square(model(tokens)))


GRADIENT = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)


def test_groups_trace_the_fewest_blocks():
    assert groups_of("AAAA") == ((1, 4),)
    assert groups_of("ABBBB") == ((1, 1), (1, 4))
    assert groups_of("AABAABAABAA") == ((3, 3), (1, 2))
    assert groups_of("ABCABD") == ((1, 1),) * 6
    assert groups_of("") == ()


@pytest.mark.parametrize("remat", (False, True, jax.checkpoint_policies.checkpoint_dots), ids=str)
def test_logits_and_gradients_are_those_of_the_list(remat):
    plain, tokens = random_decoder(ALTERNATING), some_tokens()
    scanned = scan_layers(plain, remat=remat)
    assert scanned.blocks.repeats == (2, 1) and len(scanned.blocks) == 7
    assert isinstance(plain.blocks[0].attention.window, int) and scanned.parameters == plain.parameters
    value, gradients = GRADIENT(plain, tokens)
    found, stacked = GRADIENT(scanned, tokens)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    np.testing.assert_allclose(scanned(tokens), plain(tokens), atol=1e-5)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(unscan_layers(stacked)), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", ("stacked", "by layer"))
def test_a_cache_grows_as_that_of_the_list(form):
    plain, tokens = random_decoder(ALTERNATING), some_tokens()
    scanned = scan_layers(plain)
    expected = plain(tokens)
    cache = (scanned if form == "stacked" else plain).new_cache(tokens.shape[0], 16)
    assert cache.slots == 16
    step = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache), compiler_options=QUICK)
    first, cache = step(scanned, tokens[:, :4], cache)
    assert len(cache.layers) == (4 if form == "stacked" else 7) and cache.slots == 16
    np.testing.assert_allclose(first, expected[:, :4], atol=1e-5)
    for t in range(4, 6):
        row, cache = step(scanned, tokens[:, t : t + 1], cache)
        np.testing.assert_allclose(row[:, 0], expected[:, t], atol=1e-5)
    assert cache.length.tolist() == [6] * tokens.shape[0]


def test_packed_layers_stack_by_format():
    plain = random_decoder(dataclasses.replace(CONFIG, layers=4))
    packed = trustcore.quantize(plain, {"blocks.[01].*.kernel": "q8_0", "blocks.*.kernel": "q4_0", "*": None})
    scanned = scan_layers(packed)
    assert scanned.blocks.repeats == (2, 2)
    np.testing.assert_allclose(scanned(some_tokens()), packed(some_tokens()), atol=2e-5)


def size_of(layers, **changes):
    """Equations of forward and backward, inner ones included, and lines of the compiled program."""
    windowed = None if "window" not in changes else (True, False) * (layers // 2)
    model = scan_layers(Decoder(dataclasses.replace(CONFIG, layers=layers, windowed=windowed, **changes)), remat=True)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    traced = jax.jit(jax.grad(loss), compiler_options=QUICK).trace(model, tokens)

    def count(jaxpr):
        inner = [sub for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)]
        return len(jaxpr.eqns) + sum(map(count, inner))

    compiled = traced.lower().compile().as_text()
    return count(traced.jaxpr.jaxpr), len(re.findall(r"^\s+(?:ROOT )?%?\S+ = ", compiled, re.MULTILINE))


@pytest.mark.parametrize("changes", ({}, {"window": 4}), ids=str)
def test_programs_do_not_grow_with_depth(changes):
    few, many = size_of(4, **changes), size_of(16, **changes)
    assert few[0] == many[0] > 50
    assert few[1] == pytest.approx(many[1], rel=0.02) and few[1] > 50


def test_abstract_models_and_names():
    model = scan_layers(Decoder(ALTERNATING))
    assert isinstance(model.blocks, Stack)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))
    assert parameters_of(model).keys() == parameters_of(Decoder(ALTERNATING)).keys()


def test_a_scanned_model_is_saved_as_its_list_is(tmp_path):
    plain = random_decoder(dataclasses.replace(CONFIG, layers=3))
    trustcore.save(plain, tmp_path / "plain")
    trustcore.save(scan_layers(plain), tmp_path / "scanned")
    name = "model.safetensors"
    assert (tmp_path / "scanned" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


SHAPE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
IMAGES = {**SHAPE, "image_size": 16, "patch_size": 8}
BART = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
}  # fmt: skip
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2}
# config.json, and the repeats of the groups of each of its lists of blocks.
OTHERS = {
    "bert": (SHAPE, [(3,)]),
    "modernbert": ({**SHAPE, "num_hidden_layers": 7}, [(1, 2)]),
    "deberta-v2": ({**SHAPE, "relative_attention": True, "conv_kernel_size": 3}, [(1, 2)]),
    "vit": (IMAGES, [(3,)]),
    "mamba": ({**SHAPE, "state_size": 4}, [(3,)]),
    "t5": (T5, [(1, 2), (1, 2)]),
    "umt5": (T5, [(3,), (3,)]),
    "bart": (BART, [(3,), (3,)]),
    "whisper": ({**BART, "num_mel_bins": 8, "max_source_positions": 8}, [(3,), (3,)]),
    "clip": ({"text_config": SHAPE, "vision_config": IMAGES}, [(3,), (3,)]),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_models_that_run_their_blocks_in_turn(family):
    config, repeats = OTHERS[family]
    model = random_model({"model_type": family, **config})
    given, scanned = model.example(), scan_layers(model)
    assert [operator.attrgetter(place)(scanned).repeats for place in model.stacks] == repeats
    call = jax.jit(lambda model, given: model(*given), compiler_options=QUICK)
    found, expected = call(scanned, given), call(model, given)
    if family == "mamba":
        (found, states), (expected, theirs) = found, expected
        again, more = (m(given[0][:, :1], s)[0] for m, s in ((scanned, states), (model, theirs)))
        np.testing.assert_allclose(again, more, atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(unscan_layers(scanned)), strict=True):
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("family", ("t5", "bart"))
def test_a_scanned_decoder_writes_token_by_token(family):
    config, (_, repeats) = OTHERS[family]
    model = random_model({"model_type": family, **config})
    scanned, source = scan_layers(model), some_tokens() % 32
    memory = model.encode(source)
    written = source[:, :4]
    expected = model.decode(written, model.start(memory, slots=6))[0]
    state = scanned.start(memory, slots=6)
    assert state.slots == 6 and len(state.layers) == len(repeats)
    first, state = scanned.decode(written[:, :2], state)
    np.testing.assert_allclose(first, expected[:, :2], atol=1e-5)
    for t in (2, 3):
        row, state = scanned.decode(written[:, t : t + 1], state)
        np.testing.assert_allclose(row[:, 0], expected[:, t], atol=1e-5)


def test_what_cannot_be_scanned():
    with pytest.raises(ModelError, match="a dict has no list of blocks that follow each other; pass a decoder"):
        scan_layers({})
    with pytest.raises(ModelError, match="a step of 0 repeats"):
        scan_layers(random_decoder(), unroll=0)
