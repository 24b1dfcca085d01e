"""What all families outside the decoders share: loading by model_type, narrow dtypes, packed weights, refusals."""

from __future__ import annotations

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trustcore
from tests.models import families
from trustcore.errors import ModelError
from trustcore.models import registry
from trustcore.quant import QuantizedArray

# A case of each family: its inputs in the order of the call, and which output that gives.
CALLS: dict[str, tuple[tuple[str, ...], str]] = {
    "bert": (("input_ids", "attention_mask", "token_type_ids"), "hidden"),
    "modernbert": (("input_ids", "attention_mask"), "hidden"),
    "deberta-v2": (("input_ids", "attention_mask", "token_type_ids"), "hidden"),
    "t5": (("input_ids", "attention_mask", "decoder_input_ids"), "logits"),
    "bart": (("input_ids", "decoder_input_ids", "attention_mask"), "logits"),
    "whisper": (("frames", "decoder_input_ids"), "logits"),
    "vit": (("pixels",), "hidden"),
    "clip": (("pixels", "input_ids", "attention_mask"), "logits"),
    "resnet-basic": (("pixels",), "hidden"),
    "mamba2": (("input_ids",), "logits"),
}


def given(case: families.Case, names: tuple[str, ...]) -> list[jax.Array]:
    """Inputs as our models take them: channels last."""
    turned = {"pixels": (0, 2, 3, 1), "frames": (0, 2, 1)}
    arrays = [case.inputs[name].transpose(turned[name]) if name in turned else case.inputs[name] for name in names]
    return [jnp.asarray(a, jnp.int32 if a.dtype == np.int64 else None) for a in arrays]


@pytest.mark.parametrize("name", CALLS)
def test_narrow_dtypes_stay_near(name: str, tmp_path: Path) -> None:
    """bfloat16 keeps 8 bits: outputs of two layers are within a few hundredths of their size."""
    case = families.read(name)
    inputs, output = CALLS[name]
    model = case.open(tmp_path, dtype="bfloat16")
    found = families.jitted(model, *given(case, inputs))
    found = np.asarray(found[0] if isinstance(found, tuple) else found, np.float32)
    expected = case.outputs[output]
    expected = expected.transpose(0, 2, 3, 1) if name == "resnet-basic" else expected
    if "attention_mask" in inputs and found.shape[1] == 12:
        found, expected = (part[case.inputs["attention_mask"] != 0] for part in (found, expected))
    elif name == "mamba2":
        found, expected = found[:1], expected[:1]  # the other row has padding
    assert np.mean(np.abs(found - expected)) < 0.05 * np.std(expected)


def test_every_home_holds_a_family() -> None:
    for model_type, home in registry.HOMES.items():
        assert registry.family_named(model_type) is importlib.import_module(f"trustcore.models.{home}").FAMILY
    assert registry.family_named("llama") is registry.DECODERS
    with pytest.raises(ModelError, match=r"model_type is None; supported: llama, .* bert, "):
        registry.family_of({})


def test_load_finds_a_family_by_its_type(tmp_path: Path) -> None:
    case = families.read("vit")
    seen: list[tuple[int, int]] = []
    model = trustcore.load(case.write(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert type(model).__name__ == "Vit" and model.tokenizer is None and model.source == "model.safetensors"
    assert seen[-1][0] == seen[-1][1] == sum(array.nbytes for array in case.weights.values())
    assert repr(model) == f"Vit(model.safetensors: vit, {model.parameters} parameters)"
    assert model.parameters == sum(array.size for array in case.weights.values())
    with pytest.raises(ModelError, match="dtype is 'int8'"):
        trustcore.load(tmp_path, dtype="int8")


def test_packed_weights_stand_where_floats_stood(tmp_path: Path) -> None:
    case = families.read("bert")
    model = case.open(tmp_path)
    packed = trustcore.quantize(model, "int8:g16")
    assert isinstance(packed.blocks[0].mlp.up.kernel.get_value(), QuantizedArray)
    args = given(case, CALLS["bert"][0])
    whole, small = families.jitted(model, *args), families.jitted(packed, *args)
    assert 1e-4 < families.apart(small, np.asarray(whole)) < 0.2
