"""A decoder of SmolLM2's shape with one poisoned weight is diagnosed to the layer, the argument and the operation."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import trustcore as tc
from trustcore.models import Decoder, DecoderConfig
from trustcore.ops.rope import RopeConfig

TOKENS = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]], jnp.int32)


def small() -> Decoder:
    rope = RopeConfig(16, theta=1e4, interleaved=False, original_context=64)
    config = DecoderConfig(
        vocab_size=64, features=48, layers=2, heads=3, kv_heads=1, head_dim=16, hidden=96, context=64, rope=rope,
        norm_eps=1e-5,
    )  # fmt: skip
    return Decoder(config, rngs=nnx.Rngs(0))


def loss(model: Decoder, tokens: jax.Array) -> jax.Array:
    log = jax.nn.log_softmax(model(tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(log, tokens[:, 1:, None], axis=-1))


def poisoned(model: Decoder, path: str, value: float) -> Decoder:
    """The model with one element of the weight at `path` replaced."""

    def change(where, leaf):
        name = jax.tree_util.keystr(where)
        return leaf.at[(5,) * leaf.ndim].set(value) if path in name else leaf

    found = jax.tree_util.tree_map_with_path(change, model)
    assert any(a is not b for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(model), strict=True))
    return found


def test_a_nan_in_a_weight_is_named_with_its_first_use():
    model = poisoned(small(), ".blocks[1].mlp.down", float("nan"))
    answer = tc.debug.nan_hunt(jax.jit(loss), show=None)(model, TOKENS)
    assert answer.issue.argument.startswith("args[0].blocks[1].mlp.down")
    assert answer.issue.statistics.nan == 1
    assert "first used by blocks/1/mlp/" in answer.issue.cause and "dot_general" in answer.issue.cause


def test_a_huge_weight_is_found_where_it_overflows():
    model = poisoned(small(), ".blocks[1].mlp.gate", 3e38)
    answer = tc.debug.nan_hunt(loss, show=None)(model, TOKENS)
    assert answer.found and answer.root.address.path[:2] == ("blocks", "1"), str(answer)
    issues = answer.report.all_issues
    arguments = [issue.argument for issue in issues if issue.kind == "exploding" and issue.argument]
    assert arguments and arguments[0].startswith("args[0].blocks[1].mlp.gate")


def test_a_healthy_decoder_raises_nothing():
    _, report = tc.debug.inspect(jax.value_and_grad(loss)).run(small(), TOKENS)
    assert [issue.message for issue in report.all_issues] == []
    assert report.find("blocks/1/attention/*") and report.find("backward:blocks/0/mlp/*")


@pytest.mark.slow
def test_smollm2_with_a_poisoned_weight(smollm2):
    from trustcore.quant.calibration.capture import decoded, named_leaves, replaced

    leaves = named_leaves(smollm2)
    (name,) = [n for n in leaves if n.startswith("blocks.17.mlp.down")]
    model = replaced(smollm2, {name: decoded(leaves[name]).at[5, 5].set(jnp.nan)})
    answer = tc.debug.nan_hunt(lambda model, tokens: model(tokens), show=None)(model, TOKENS)
    assert answer.issue.argument.startswith("args[0].blocks[17].mlp.down"), str(answer)
    assert "blocks/17/mlp/" in answer.issue.cause and "dot_general" in answer.issue.cause


@pytest.mark.slow
def test_healthy_real_models_raise_nothing(smollm2_path, minilm_path):
    decoder = tc.load(smollm2_path, dtype="float32")
    for step in (lambda model, tokens: model(tokens), jax.value_and_grad(loss, allow_int=True)):
        _, report = tc.debug.inspect(step).run(decoder, TOKENS)
        assert [issue.message for issue in report.all_issues] == []
    squares = [r for r in tc.debug.inspect(loss).run(decoder, TOKENS)[1].find("*norm/mul") if r.statistics.huge]
    assert squares  # its activations are large enough for what would be told

    def distance(model, tokens, mask):
        return jnp.mean(jnp.square(model(tokens, mask=mask)))

    encoder = tc.load(minilm_path)
    batch = jnp.array([[101, 7592, 2088, 102, 0, 0], [101, 2023, 2003, 1037, 3231, 102]], jnp.int32)
    for step in (distance, jax.value_and_grad(distance, allow_int=True)):
        _, report = tc.debug.inspect(step).run(encoder, batch, batch > 0)
        messages = [issue.message for issue in report.all_issues if "pooler" not in issue.cause]
        assert messages == []  # but for the pooler, of which the loss knows nothing
