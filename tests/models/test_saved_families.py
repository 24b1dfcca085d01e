"""Every family outside the decoders, written and read again: names, layouts, packed weights, what lies beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import trustcore
from tests.models import families
from tests.models import test_packed_checkpoints as packed_checkpoints
from trustcore.errors import ModelError, QuantizationError
from trustcore.models import random_model, registry
from trustcore.models.model import parameters_of
from trustcore.quant import QuantizedArray

CASES = sorted(path.stem for path in families.FOLDER.glob("*.npz"))
NOT_READ = ("mask_token", "num_batches_tracked", "position_ids")  # buffers, and tokens of training


def assert_same(found: Any, expected: Any) -> None:
    """Every leaf, with the format of what it belongs to."""
    (ours, one), (theirs, other) = (
        jax.tree_util.tree_flatten_with_path({p: v.get_value() for p, v in parameters_of(m).items()})
        for m in (found, expected)
    )
    assert one == other
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), str(path))


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_what_was_read(name: str, tmp_path: Path) -> None:
    """Tensors have the names, the layouts and the numbers with which the other library wrote them."""
    case = families.read(name)
    (tmp_path / "a").mkdir()
    model = case.open(tmp_path / "a")
    trustcore.save(model, tmp_path / "b")
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert set(written) == {key for key in case.weights if not key.endswith(NOT_READ)}
    for key, array in written.items():
        np.testing.assert_array_equal(array, case.weights[key], key)
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == case.config
    assert_same(trustcore.load(tmp_path / "b", dtype="float32"), model)


@pytest.mark.parametrize("name", CASES)
def test_packed_weights_stay_packed(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    model = families.read(name).open(tmp_path / "a")
    matrices = {path for path, p in parameters_of(model).items() if path.endswith("kernel") and p.get_value().ndim == 2}
    if not matrices:
        with pytest.raises(QuantizationError, match="nothing to pack"):
            trustcore.quantize(model, "int8:channel")
        return
    packed = trustcore.quantize(model, "int8:channel")
    held = {path for path, p in parameters_of(packed).items() if isinstance(p.get_value(), QuantizedArray)}
    assert {path for path in matrices if "position" not in path} <= held
    assert all(path.endswith(("kernel", "words.table")) for path in held), held
    trustcore.save(packed, tmp_path / "b")
    assert_same(trustcore.load(tmp_path / "b"), packed)


# Their own layouts, as these packages write them; what a family cannot hold in them is refused by name elsewhere.
@pytest.mark.parametrize("scheme", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "t5-gated", "vit-classifier", "siglip", "mamba2"])
def test_other_packages_layouts(name: str, scheme: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    model = families.read(name).open(tmp_path / "a")

    def fits(path: str, leaf: Any) -> bool:
        return (
            "blocks." in path
            and path.endswith("kernel")
            and leaf.ndim == 2
            and not any(size % 32 for size in leaf.shape)
        )

    packed = trustcore.quantize(model, "int4:g32:asym", where=fits)
    trustcore.save(packed, tmp_path / "b", scheme=scheme)
    found = trustcore.load(tmp_path / "b")
    count = 0
    for (path, one), two in zip(parameters_of(found).items(), parameters_of(packed).values(), strict=True):
        ours, theirs = one.get_value(), two.get_value()
        assert isinstance(ours, QuantizedArray) == isinstance(theirs, QuantizedArray), path
        if isinstance(ours, QuantizedArray):
            assert ours.format == theirs.format
            np.testing.assert_allclose(ours.dequantize(), theirs.dequantize(), atol=2e-3)
            count += 1
    assert count >= 2


# The inputs of these matrices are 32, which the packers' groups divide.
PACKED = r"(query|key|value|attention\.output\.dense|intermediate\.dense)\.weight$"


@pytest.mark.parametrize("case", ["gptq", "awq", "llm-int8", "pack-3-asym", "float", "fp8-tensor"])
def test_an_encoder_that_another_package_packed(case: str, tmp_path: Path) -> None:
    packer, quantization, _ = packed_checkpoints.CASES[case]
    bert, tensors, plain = families.read("bert"), {}, {}
    for name, array in bert.weights.items():
        if re.search(PACKED, name) is None:
            tensors[f"bert.{name}"] = plain[name] = array  # of a model with a head
            continue
        parts, plain[name] = packer(array)
        tensors |= {f"bert.{name.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
    for folder in ("packed", "plain"):
        (tmp_path / folder).mkdir()
    config = {**bert.config, "quantization_config": quantization}
    packed = trustcore.load(families.Case(config, tensors, {}, {}).write(tmp_path / "packed"))
    floats = trustcore.load(families.Case(bert.config, plain, {}, {}).write(tmp_path / "plain"), dtype="float32")
    kernels = {p: v.get_value() for p, v in parameters_of(packed).items() if isinstance(v.get_value(), QuantizedArray)}
    assert len(kernels) == 5 * packed.config.layers
    for path, kernel in kernels.items():
        np.testing.assert_allclose(
            kernel.dequantize(), parameters_of(floats)[path].get_value(), rtol=2e-7, atol=1e-9, err_msg=path
        )


@pytest.mark.parametrize("name", ["bert", "t5", "vit", "mamba", "resnet"])
def test_16_bit_files_stay_as_they_are(name: str, tmp_path: Path) -> None:
    case = families.read(name)
    narrow = {k: v.astype(jnp.bfloat16) if v.dtype == np.float32 else v for k, v in case.weights.items()}
    (tmp_path / "a").mkdir()
    model = trustcore.load(case.write(tmp_path / "a", **narrow))
    values = {path: p.get_value() for path, p in parameters_of(model).items()}
    for path, value in values.items():
        packs = value.ndim == 2 and path.endswith(("kernel", "table"))
        assert isinstance(value, QuantizedArray) == packs and (packs or value.dtype == jnp.float32), path
    trustcore.save(model, tmp_path / "b")
    written = load_file(tmp_path / "b" / "model.safetensors")
    for key, array in written.items():
        np.testing.assert_array_equal(array.astype(np.float32), narrow[key].astype(np.float32))


def test_what_lies_beside_the_weights_goes_along(tmp_path: Path) -> None:
    (tmp_path / "a" / "1_Pooling").mkdir(parents=True)
    families.read("bert").write(tmp_path / "a")
    kept = {
        "preprocessor_config.json": "{}",
        "modules.json": json.dumps([{"type": "x.Pooling", "path": "1_Pooling"}]),
        "1_Pooling/config.json": '{"pooling_mode_cls_token": true}',
    }
    for name, text in kept.items():
        (tmp_path / "a" / name).write_text(text)
    (tmp_path / "a" / "training_args.bin").write_text("x")
    model = trustcore.load(tmp_path / "a")
    trustcore.save(model, tmp_path / "b")
    for name, text in kept.items():
        assert (tmp_path / "b" / name).read_text() == text
    assert not (tmp_path / "b" / "training_args.bin").exists()
    assert trustcore.load(tmp_path / "b").pooling == model.pooling


def test_a_model_of_random_weights_is_saved_with_what_it_was_made_of(tmp_path: Path) -> None:
    case = families.read("bert")
    trustcore.save(random_model(case.config), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == case.config
    assert "embeddings.word_embeddings.weight" in load_file(tmp_path / "m" / "model.safetensors")
    model = random_model(case.config)
    model.described = ""
    with pytest.raises(ModelError, match="a bert model is saved with the one that it was made of"):
        trustcore.save(model, tmp_path / "n")


def test_an_abstract_model_has_no_tensors_to_write(tmp_path: Path) -> None:
    case, family = families.read("vit"), registry.family_named("vit")
    model = family.module(family.config(case.config, case.weights.keys()))
    model.described = json.dumps(case.config)
    with pytest.raises(ModelError, match=r"patches\.kernel is abstract"):
        trustcore.save(model, tmp_path / "m")
