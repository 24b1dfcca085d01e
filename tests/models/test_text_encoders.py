"""Encoders of text against transformers: states with padding on either side, names in both directions, refusals."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import families
from trustcore.errors import ModelError
from trustcore.models import registry

CASES = ("bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2", "deberta-v3")


@pytest.mark.parametrize("name", CASES)
def test_states_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    case = families.read(name)
    model = case.open(tmp_path)
    mask = case.inputs["attention_mask"]
    given = [jnp.asarray(case.inputs["input_ids"], jnp.int32), jnp.asarray(mask)]
    if "token_type_ids" in case.inputs:
        given.append(jnp.asarray(case.inputs["token_type_ids"], jnp.int32))
    hidden = families.jitted(model, *given)
    assert families.apart(hidden, case.outputs["hidden"], mask != 0) < families.TOLERANCE
    # Padding is not looked at: other tokens in its place change nothing.
    if name != "roberta":  # whose positions depend on the number of the padding token
        other = families.jitted(model, jnp.where(given[1] != 0, given[0], 7), *given[1:])
        assert families.apart(other, np.asarray(hidden), mask != 0) < 1e-6
    if "pooled" in case.outputs:
        pooled = model.pool(hidden)
        assert families.apart(pooled[:2], case.outputs["pooled"][:2]) < families.TOLERANCE


def test_every_disagreement_is_told_at_once(tmp_path: Path) -> None:
    case = families.read("bert")
    with pytest.raises(ModelError) as error:
        case.open(
            tmp_path,
            **{
                "embeddings.word_embeddings.weight": np.zeros((63, 32), np.float32),
                "encoder.layer.0.output.dense.weight": None,
                "encoder.layer.0.output.dens.weight": np.zeros((32, 48), np.float32),
            },
        )
    for part in (
        "do not fit a bert model",
        "embeddings.word_embeddings.weight has shape [63, 32], expected [64, 32]",
        "encoder.layer.0.output.dense.weight is missing (nearest: encoder.layer.0.output.dens.weight)",
        "encoder.layer.0.output.dens.weight is unexpected",
    ):
        assert part in str(error.value)


def test_a_model_with_a_head_and_old_spellings(tmp_path: Path) -> None:
    """Files of BertForMaskedLM put `bert.` before the body's names; some call norms' weights gamma and beta."""
    case = families.read("bert")

    def renamed(name: str) -> str:
        head, _, last = name.rpartition(".")
        return f"bert.{head}.{ {'weight': 'gamma', 'bias': 'beta'}[last] if head.endswith('LayerNorm') else last }"

    weights = {renamed(name): array for name, array in case.weights.items() if "pooler" not in name}
    weights["cls.predictions.bias"] = np.zeros(64, np.float32)
    weights["bert.embeddings.position_ids"] = np.zeros((1, 20), np.int64)
    model = families.Case(case.config, weights, {}, {}).open(tmp_path)
    given = [jnp.asarray(case.inputs[key], jnp.int32) for key in ("input_ids", "attention_mask", "token_type_ids")]
    hidden = families.jitted(model, *given)
    assert families.apart(hidden, case.outputs["hidden"], case.inputs["attention_mask"] != 0) < families.TOLERANCE
    with pytest.raises(ModelError, match="this model has no pooler"):
        model.pool(hidden)


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("bert", {"hidden_size": 0}, "hidden_size is 0"),
        ("bert", {"hidden_size": "32"}, "hidden_size is '32'"),
        ("bert", {"num_attention_heads": 5}, "5 heads do not divide a width of 32"),
        ("bert", {"num_hidden_layers": 1 << 40}, "num_hidden_layers is 1099511627776"),
        ("bert", {"num_hidden_layers": 10**6}, "the configuration has"),
        ("bert", {"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ("bert", {"hidden_act": "softplus3"}, "activation 'softplus3' is not known"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder is true"),
        ("bert", {"type_vocab_size": -1}, "type_vocab_size is -1"),
        ("bert", {"model_type": "burt"}, "model_type is 'burt'; supported: llama, "),
        ("bert", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types"),
        ("modernbert", {"local_attention": 0}, "local_attention is 0"),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "su"}}}, "rope_type"),
        ("deberta-v2", {"pos_att_type": ["c2q"]}, "pos_att_type"),
        ("deberta-v2", {"position_buckets": 1 << 31}, "position_buckets"),
        ("deberta-v2", {"conv_kernel_size": 4}, "conv_kernel_size is 4"),
    ],
)
def test_impossible_values_are_refused(name: str, changes: dict, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        families.read(name).open(tmp_path, config=changes)
    assert complaint in str(error.value)


def test_too_many_tokens_are_refused(tmp_path: Path) -> None:
    model = families.read("roberta").open(tmp_path)
    assert model.config.context == 18
    with pytest.raises(ModelError, match="19 tokens are more than the 18 this model reads"):
        model(jnp.ones((1, 19), jnp.int32))


def test_gradients_and_batches(tmp_path: Path) -> None:
    """grad reaches every weight, vmap over rows is the batch, eval_shape needs no weights."""
    case = families.read("distilbert")
    model = case.open(tmp_path)
    tokens = jnp.asarray(case.inputs["input_ids"], jnp.int32)
    gradient = jax.jit(jax.grad(lambda model: jnp.sum(jnp.square(model(tokens)[:, 0]))))(model)
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(gradient))
    each = jax.jit(jax.vmap(lambda row: model(row[None])[0]))(tokens)
    assert families.apart(each, np.asarray(families.jitted(model, tokens))) < 1e-5
    family = registry.family_named("distilbert")
    shape = jax.eval_shape(lambda model: model(tokens), family.module(model.config))
    assert shape.shape == (3, 12, 32)
