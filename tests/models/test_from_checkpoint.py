"""Checkpoints become models: exactly, whatever the format; and what does not fit is told all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.small import arrays, metadata, random_decoder, some_tokens, write_as_gguf, write_as_hugging_face
from trustcore.errors import ModelError
from trustcore.models import decoder_from_checkpoint
from trustcore.quant import QuantizedArray
from trustcore.weights import open_checkpoint
from trustcore.weights.gguf_writer import write_gguf


def load(path, **options):
    with open_checkpoint(path) as checkpoint:
        return decoder_from_checkpoint(checkpoint, **options)


def test_gguf_and_hugging_face_files_give_the_same_logits(tmp_path):
    """Their rotary pairings and row orders differ; the function does not."""
    model, tokens = random_decoder(), some_tokens()
    write_as_gguf(tmp_path / "m.gguf", model)
    write_as_hugging_face(tmp_path, model)
    expected = model(tokens)
    np.testing.assert_allclose(load(tmp_path / "m.gguf")(tokens), expected, atol=1e-6)
    theirs = load(tmp_path / "model.safetensors")
    assert not theirs.config.rope.interleaved
    np.testing.assert_allclose(theirs(tokens), expected, atol=1e-5)


# Formats that the `gguf` package encodes in blocks that the small model's 64 and 96 are multiples of.
ENCODED = ("f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4")


@pytest.mark.parametrize("encoding", ENCODED)
def test_packed_weights_stay_packed_and_exact(tmp_path, encoding):
    model, tokens = random_decoder(), some_tokens()
    held = write_as_gguf(tmp_path / "m.gguf", model, encoding)
    packed = load(tmp_path / "m.gguf")
    kernel = packed.blocks[0].mlp.down.kernel.get_value()
    assert isinstance(kernel, QuantizedArray) and kernel.format == encoding and kernel.shape == (96, 64)
    assert packed.embedding.table.get_value().shape == (96, 64)
    np.testing.assert_array_equal(kernel.dequantize(), held["blocks.0.mlp.down.kernel"].T)

    dense = load(tmp_path / "m.gguf", dtype=jnp.float32)
    assert isinstance(dense.blocks[0].mlp.down.kernel.get_value(), jax.Array)
    np.testing.assert_allclose(packed(tokens), dense(tokens), atol=2e-5)
    for name, array in arrays(dense).items():
        np.testing.assert_array_equal(array, held[name.path])


def scale_gradient(model, tokens):
    """Gradient of a log-probability in the scales of one packed weight, and those scales."""
    kernel = model.blocks[0].attention.query.kernel.get_value()

    def score(scale):
        changed = jax.tree.map(lambda leaf: leaf, model)
        packed = QuantizedArray(kernel.format, {**kernel.fields, "scale": scale})
        changed.blocks[0].attention.query.kernel.set_value(packed)
        return jax.nn.log_softmax(changed(tokens)[0, -1])[5]

    scale = kernel.fields["scale"]
    return jax.jit(jax.value_and_grad(score))(scale), score, scale


def test_gradients_reach_the_scales_of_packed_weights(tmp_path):
    write_as_gguf(tmp_path / "m.gguf", random_decoder(), "q4_1")
    (value, gradient), score, scale = scale_gradient(load(tmp_path / "m.gguf"), some_tokens())
    assert gradient.dtype == scale.dtype and gradient.shape == scale.shape
    # Against a difference along the gradient; half-precision scales allow steps of a few percent only.
    direction = jnp.sign(gradient.astype(jnp.float32)) * 0.05 * jnp.abs(scale.astype(jnp.float32))
    moved = (scale.astype(jnp.float32) + direction).astype(scale.dtype)
    expected = jnp.sum((moved.astype(jnp.float32) - scale.astype(jnp.float32)) * gradient.astype(jnp.float32))
    assert score(moved) - value == pytest.approx(float(expected), rel=0.2)


@pytest.mark.slow
def test_gradients_reach_the_scales_of_the_demo_model(smollm2):
    (_, gradient), _, _ = scale_gradient(smollm2, jnp.asarray([[504, 3575, 282, 4649, 314]], jnp.int32))
    assert jnp.isfinite(gradient.astype(jnp.float32)).all() and jnp.any(gradient != 0)


def test_a_dtype_decodes_and_computes_in_it(tmp_path):
    model, tokens = random_decoder(), some_tokens()
    write_as_gguf(tmp_path / "m.gguf", model, "q8_0")
    narrow = load(tmp_path / "m.gguf", dtype=jnp.bfloat16)
    assert narrow.blocks[0].mlp.up.kernel.get_value().dtype == jnp.bfloat16
    assert narrow.norm.weight.get_value().dtype == jnp.float32
    logits = narrow(tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, model(tokens), atol=0.3)


def test_progress_counts_every_byte(tmp_path):
    write_as_gguf(tmp_path / "m.gguf", random_decoder(), "q4_1")
    seen = []
    load(tmp_path / "m.gguf", progress=lambda done, total: seen.append((done, total)))
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert seen[-1] == (sum(t.nbytes for t in checkpoint.values()),) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_all_disagreements_come_in_one_message(tmp_path):
    model = random_decoder()
    wrong = {
        "blk.0.attn_q.weight": None,
        "blk.1.ffn_up.weight": np.zeros((96, 32), np.float32),
        "blk.0.ffn_gate.weight": np.zeros((96, 64), np.int32),
        "blk.7.surprise.weight": np.zeros(4, np.float32),
    }
    write_as_gguf(tmp_path / "m.gguf", model, **wrong)
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "m.gguf")
    text = str(caught.value)
    for part in (
        "blk.0.attn_q.weight is missing (nearest: blk.",
        "blk.1.ffn_up.weight has shape [96, 32], expected [96, 64]",
        "blk.0.ffn_gate.weight is stored as i32; readable encodings: f32",
        "blk.7.surprise.weight is unexpected",
    ):
        assert part in text
    assert "\n" not in text


def test_more_layers_than_tensors_is_refused_before_any_work(tmp_path):
    values = {**metadata(), "llama.block_count": 2**30}
    write_gguf(tmp_path / "m.gguf", values, {"token_embd.weight": np.zeros((96, 64), np.float32)})
    with pytest.raises(ModelError, match="1073741824 layers, the checkpoint only 1 tensors"):
        load(tmp_path / "m.gguf")


def test_files_that_are_no_decoder(tmp_path):
    write_gguf(tmp_path / "v.gguf", {"general.architecture": "llama"}, {"x": np.zeros(4, np.float32)})
    with pytest.raises(ModelError, match=r"token_embd.weight \[V, D\] is missing"):
        load(tmp_path / "v.gguf")
    write_as_hugging_face(tmp_path, random_decoder())
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config.json beside the weights"):
        load(tmp_path / "model.safetensors")
