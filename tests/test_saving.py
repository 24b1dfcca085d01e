"""A saved model is the model: in our own layout exactly, in other packages' as far as they hold its formats."""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trustcore
from tests.models.packed_cases import tensors  # noqa: F401 - the recorded file must open
from tests.models.packed_folder import write_packed, write_tokenizer
from tests.models.random_weights import random_weight
from tests.models.small import CONFIG, metadata, random_decoder, some_tokens, write_as_gguf
from trustcore.errors import CheckpointError, ModelError
from trustcore.models import decoder_from_checkpoint
from trustcore.models.schemes.write.integers import float_values
from trustcore.quant import QuantizedArray
from trustcore.quant.formats import FORMATS
from trustcore.weights import open_checkpoint

# K and N are multiples of every block; heads as wide as the blocks of an fp8 scale.
WIDE = dataclasses.replace(CONFIG, features=256, hidden=256, heads=2, kv_heads=2, head_dim=128, layers=1)


def load(path, **options):
    with open_checkpoint(path) as checkpoint:
        return decoder_from_checkpoint(checkpoint, **options)


def halves(config):
    """The configuration with rotary channels paired as in Hugging Face's files."""
    return dataclasses.replace(config, rope=dataclasses.replace(config.rope, interleaved=False, size=config.head_dim))


def model_of(kind, config=WIDE, *, interleaved=False):
    """A model all of whose kernels are random and packed as `kind`."""
    rope = dataclasses.replace(config.rope, size=config.head_dim)
    config = dataclasses.replace(config, rope=rope) if interleaved else halves(config)
    model = jax.tree.map(lambda leaf: leaf, _floats(config))  # a copy
    for i, (_, kernel) in enumerate(kernels(model)):
        kernel.set_value(jax.device_put(random_weight(kind, *kernel.get_value().shape, seed=i)))
    return model


@functools.cache
def _floats(config):
    return random_decoder(config)


def kernels(model):
    for b, block in enumerate(model.blocks):
        for part in ("query", "key", "value", "out"):
            yield f"blocks.{b}.attention.{part}.kernel", getattr(block.attention, part).kernel
        for part in ("gate", "up", "down"):
            yield f"blocks.{b}.mlp.{part}.kernel", getattr(block.mlp, part).kernel
    yield "output.kernel", model.output.kernel


def assert_same(found, expected):
    """Every leaf, with the format and orientation of what it belongs to."""
    one, other = (
        jax.tree_util.tree_flatten_with_path((m.embedding, m.blocks, m.norm, m.output)) for m in (found, expected)
    )
    assert one[1] == other[1]
    for (path, ours), (_, theirs) in zip(one[0], other[0], strict=True):
        assert ours.dtype == theirs.dtype, path
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint8), np.asarray(theirs).view(np.uint8), str(path))


KINDS = (
    *(f"int{bits}" for bits in range(1, 9)),
    *("ternary", "int4:g64:asym", "int8:channel", "int8:tensor", "int8:g32:asym", "int3:g64:asym:order"),
    *("fp8_e4m3:channel", "fp8_e5m2", "fp8_e4m3:128x128", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2"),
    *("nf4", "nf4:g64:double", "fp4"),
    *(name for name in FORMATS if ":" not in name and hasattr(FORMATS[name], "block") and name not in ("f16", "bf16")),
)


@pytest.mark.parametrize("kind", KINDS)
def test_our_layout_keeps_every_field_of_every_format(tmp_path, kind):
    model = model_of(kind)
    table = random_weight(kind, 256, 96, seed=99, transposed=True)
    model.embedding.table.set_value(jax.device_put(table))
    assert trustcore.save(model, tmp_path / "m") == tmp_path / "m"
    found = load(tmp_path / "m")
    assert found.config == model.config
    assert_same(found, model)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_float_models_are_plain_tensors(tmp_path, dtype):
    model = random_decoder(halves(CONFIG))
    for _, kernel in kernels(model):
        kernel.set_value(kernel.get_value().astype(dtype))
    trustcore.save(model, tmp_path / "m", scheme="compressed-tensors")
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    found = load(tmp_path / "m", dtype=jnp.float32)
    expected = {path: kernel.get_value().astype(jnp.float32) for path, kernel in kernels(model)}
    for path, kernel in kernels(found):
        np.testing.assert_array_equal(kernel.get_value(), expected[path])


def test_shards_are_cut_between_weights(tmp_path):
    model = model_of("int4:g64:asym")
    trustcore.save(model, tmp_path / "m", shard_size="70kB")
    shards = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    place = index["weight_map"]
    assert place["lm_head.weight.codes"] == place["lm_head.weight.scale"] == place["lm_head.weight.zero"]
    assert_same(load(tmp_path / "m"), model)


def test_rotary_pairs_are_put_in_the_order_of_the_files(tmp_path):
    """A model from GGUF pairs channels interleaved; the saved one by halves, and it is the same function."""
    for i, kind in enumerate(("int4", "fp8_e4m3:128x128")):
        model = model_of(kind, interleaved=True)
        trustcore.save(model, tmp_path / str(i))
        found = load(tmp_path / str(i))
        assert model.config.rope.interleaved and not found.config.rope.interleaved
        np.testing.assert_allclose(found(some_tokens()), model(some_tokens()), rtol=1e-4, atol=1e-4)


def test_outputs_that_share_a_scale_and_would_be_parted_are_refused(tmp_path):
    config = dataclasses.replace(WIDE, heads=1, kv_heads=1, head_dim=256)
    with pytest.raises(ModelError, match=r"blocks\.0\.attention\.query\.kernel has outputs that share their scale"):
        trustcore.save(model_of("fp8_e4m3:128x128", config, interleaved=True), tmp_path / "m")


# scheme: kinds it holds, with what they are when they are read again
HELD = {
    "gptq": {
        "int4:g64": "int4:g64", "int4:g64:asym": "int4:g64:asym", "int8:channel": "int8:channel", "int2": "int2:g32",
        "int3:g128:asym": "int3:g128:asym", "int4:g32:asym:order": "int4:g32:asym", "ternary": "int2:g32",
        "q4_0": "int4:g32", "q8_0": "int8:g32", "int8:tensor": "int8:channel",
    },
    "awq": {"int4:g64:asym": "int4:g64:asym", "int4": "int4:g32", "q4_0": "int4:g32", "int4:channel": "int4:channel"},
    "compressed-tensors": {
        "int2": "int2:g32", "int3": "int3:g32", "int4:g128:asym": "int4:g128:asym", "int5:g64:asym": "int5:g64:asym",
        "int6:channel": "int6:channel", "int7": "int7:g32", "int8:g64:asym": "int8:g64:asym", "q5_0": "int5:g32",
        "fp8_e4m3:channel": "fp8_e4m3:channel", "fp8_e4m3:tensor": "fp8_e4m3:tensor", "fp8_e4m3:g64": "fp8_e4m3:g64",
        "fp8_e4m3:128x128": "fp8_e4m3:128x128", "mxfp8_e4m3": "mxfp8_e4m3", "mxfp6_e2m3": "mxfp6_e2m3",
        "nvfp4": "nvfp4", "mxfp4": "mxfp4",
    },
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "kind"), [(scheme, kind) for scheme, kinds in HELD.items() for kind in kinds])
def test_other_packages_layouts_hold_the_same_weights(tmp_path, scheme, kind):
    model = model_of(kind)
    trustcore.save(model, tmp_path / "m", scheme=scheme)
    found = load(tmp_path / "m")
    for (path, ours), (_, theirs) in zip(kernels(found), kernels(model), strict=True):
        if path != "output.kernel":  # of 96 outputs: no whole block
            assert ours.get_value().description == HELD[scheme][kind], path
        if path in ("blocks.0.attention.out.kernel", "output.kernel"):
            np.testing.assert_array_equal(decoded(ours.get_value()), decoded(theirs.get_value()), path)


def decoded(weight):
    return float_values(weight, np.float32)


REFUSED = {
    "gptq": ("q4_1", "q4_k", "int5", "fp8_e4m3", "nf4", "int1"),
    "awq": ("int8", "int4:g32:order", "q8_0", "mxfp4"),
    "compressed-tensors": ("q4_1", "int4:g32:order", "fp8_e5m2", "nf4", "mxfp6_e3m2", "int1"),
}


@pytest.mark.parametrize(("scheme", "kind"), [(scheme, kind) for scheme, kinds in REFUSED.items() for kind in kinds])
def test_formats_that_a_scheme_cannot_hold_are_refused(tmp_path, scheme, kind):
    with pytest.raises(ModelError) as caught:
        trustcore.save(model_of(kind), tmp_path / "m", scheme=scheme)
    text = str(caught.value)
    assert text.startswith(f"{scheme} holds int") and "blocks.0.attention.query.kernel" in text
    assert "scheme='trustcore'" in text and not (tmp_path / "m").exists()


def test_zero_points_of_zero_make_version_2(tmp_path):
    model = model_of("int4:g64:asym")
    for asked, version in ((1, "gptq"), (0, "gptq_v2")):
        for _, kernel in kernels(model):
            weight = kernel.get_value()
            zero = jnp.maximum(weight.fields["zero"], jnp.uint8(1)) if asked else weight.fields["zero"].at[0, 0].set(0)
            kernel.set_value(QuantizedArray("int4", {**weight.fields, "zero": zero}))
        trustcore.save(model, tmp_path / version, scheme="gptq")
        config = json.loads((tmp_path / version / "config.json").read_text())["quantization_config"]
        assert config["checkpoint_format"] == version and config["sym"] is False and config["group_size"] == 64
        for (path, ours), (_, theirs) in zip(kernels(load(tmp_path / version)), kernels(model), strict=True):
            np.testing.assert_array_equal(ours.get_value().fields["zero"], theirs.get_value().fields["zero"], path)


def test_one_width_for_all_where_the_layout_has_one(tmp_path):
    model = model_of("int4:g64")
    model.output.kernel.set_value(random_weight("int8:g64", 256, 96))
    with pytest.raises(
        ModelError, match=r"output\.kernel has 8 bits in groups of 64, matrices before it 4 bits in groups of 64; the"
    ):
        trustcore.save(model, tmp_path / "m", scheme="gptq")
    trustcore.save(model, tmp_path / "m", scheme="compressed-tensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_1"]["targets"] == ["lm_head"]
    assert load(tmp_path / "m").output.kernel.get_value().description == "int8:g64"


def test_matrices_left_as_floats_are_named(tmp_path):
    model = model_of("int4:g64")
    model.output.kernel.set_value(jnp.ones((256, 96), jnp.bfloat16))
    for scheme, key in (("gptq", "dynamic"), ("awq", "modules_to_not_convert"), ("compressed-tensors", "ignore")):
        trustcore.save(model, tmp_path / scheme, scheme=scheme)
        config = json.loads((tmp_path / scheme / "config.json").read_text())["quantization_config"]
        assert "lm_head" in str(config[key])
        load(tmp_path / scheme)


def test_packed_tables_become_floats_where_the_layout_does_not_pack_them(tmp_path):
    model = model_of("int4:g64")
    table = random_weight("q8_0", 256, 96, transposed=True)
    model.embedding.table.set_value(table)
    trustcore.save(model, tmp_path / "m", scheme="gptq")
    with open_checkpoint(tmp_path / "m") as checkpoint:
        stored = checkpoint["model.embed_tokens.weight"]
        np.testing.assert_array_equal(stored.numpy(), float_values(table, np.float16))


def test_scales_that_float16_cannot_hold_are_refused(tmp_path):
    model = model_of("int4:g64")
    weight = model.output.kernel.get_value()
    scale = weight.fields["scale"].astype(jnp.float32) * 1e8
    model.output.kernel.set_value(QuantizedArray("int4", {**weight.fields, "scale": scale}))
    with pytest.raises(ModelError, match=r"output\.kernel has scales that float16 cannot hold"):
        trustcore.save(model, tmp_path / "m", scheme="awq")


def test_a_loaded_folder_is_saved_with_its_files(tmp_path):
    from tests.models import packers
    from tests.models.test_packed_checkpoints import gptq_config

    write_packed(tmp_path / "m", packers.gptq, gptq_config())
    write_tokenizer(tmp_path / "m")
    described = json.loads((tmp_path / "m" / "config.json").read_text()) | {"eos_token_id": 3}
    (tmp_path / "m" / "config.json").write_text(json.dumps(described))
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": 3}')
    model = trustcore.load(tmp_path / "m")
    trustcore.save(model, tmp_path / "n", scheme="awq")
    again = trustcore.load(tmp_path / "n")
    assert again.tokenizer == model.tokenizer and again.tokenizer.stop_ids == {3}
    saved = json.loads((tmp_path / "n" / "config.json").read_text())
    assert saved["eos_token_id"] == 3 and saved["quantization_config"]["quant_method"] == "awq"
    np.testing.assert_allclose(again(some_tokens()), model(some_tokens()), atol=1e-6)


def test_a_gguf_model_keeps_its_tokenizer(tmp_path):
    words = ["<unk>", "<s>", "</s>", *(f"▁w{i}" for i in range(93))]
    extra = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": words, "tokenizer.ggml.scores": [0.0] * 96}
    from trustcore.weights.gguf_writer import write_gguf

    model = random_decoder()
    write_as_gguf(tmp_path / "a.gguf", model, "q8_0")
    with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
        parts = {name: (t.raw(), t.encoding) if t.dtype is None else t.numpy() for name, t in checkpoint.items()}
    write_gguf(tmp_path / "b.gguf", metadata() | extra | {"general.name": "Small"}, parts)
    loaded = trustcore.load(tmp_path / "b.gguf")
    trustcore.save(loaded, tmp_path / "m")
    again = trustcore.load(tmp_path / "m")
    assert again.tokenizer == loaded.tokenizer
    np.testing.assert_allclose(again(some_tokens()), loaded(some_tokens()), atol=1e-4)


def test_input_scales_come_back(tmp_path):
    model = model_of("fp8_e4m3:tensor")
    model.input_scales = (("output.kernel", 0.5),)
    trustcore.save(model, tmp_path / "m")
    assert load(tmp_path / "m").input_scales == (("output.kernel", 0.5),)


def test_all_or_nothing(tmp_path, monkeypatch):
    from trustcore.weights import safetensors_writer

    model = model_of("int4:g64")
    calls = []

    def fails(*args):
        calls.append(args)
        if len(calls) > 3:
            raise OSError("no space left")
        return original(*args)

    original = safetensors_writer._bytes
    monkeypatch.setattr(safetensors_writer, "_bytes", fails)
    with pytest.raises(OSError, match="no space left"):
        trustcore.save(model, tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_what_stands_there_stays(tmp_path):
    model = random_decoder(halves(CONFIG))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="the folder is not empty"):
        trustcore.save(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match="this is a file"):
        trustcore.save(model, tmp_path / "m" / "precious")
    with pytest.raises(ModelError, match="scheme is 'zip'; choose from trustcore, gptq, awq, compressed-tensors"):
        trustcore.save(model, tmp_path / "n", scheme="zip")
    (tmp_path / "empty").mkdir()
    trustcore.save(model, tmp_path / "empty")
    load(tmp_path / "empty")


def test_a_lost_tokenizer_is_told(tmp_path):
    model = random_decoder(halves(CONFIG))
    model.tokenizer, model.origin = object(), str(tmp_path / "gone" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"pass tokenizer=, a folder with tokenizer\.json or a GGUF file"):
        trustcore.save(model, tmp_path / "m")
    write_tokenizer(tmp_path)
    trustcore.save(model, tmp_path / "m", tokenizer=tmp_path)
    assert (tmp_path / "m" / "tokenizer.json").is_file()
