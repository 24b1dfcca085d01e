"""Shapes as formulas of names, and sentences where they do not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from trustcore.errors import ProgramError
from trustcore.graph import shapes
from trustcore.models import random_model


def attention(q, k, v):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1), v)


def test_results_and_steps_are_formulas() -> None:
    found = shapes(attention, "b t n h", "b s n h", "b s n h")
    assert found.results == "float32[b, t, n, h]"
    assert found.of("exp") == ("float32[b, n, t, s]",)
    assert "test_symbolic.py:" in str(found) and "returns float32[b, t, n, h]" in str(found)
    merged = shapes(lambda x: {"y": x.reshape(x.shape[0], -1)}, "bf16[b, t, 4*h]")
    assert merged.results == {"y": "bfloat16[b, 4*h*t]"}
    assert shapes(lambda x, y: jnp.concatenate([x, y]), "n d", "m d").results == "float32[n + m, d]"
    assert shapes(lambda x: x[1:] * 2.0, "t", constraints=["t >= 2"]).results == "float32[t - 1]"
    assert shapes(lambda tree: tree["a"] + tree["b"], {"a": "b 3", "b": jnp.ones((1, 3))}).results == "float32[b, 3]"
    scanned = lambda x: jax.lax.scan(lambda c, row: (c + row, c), jnp.zeros(x.shape[1:]), x)  # noqa: E731
    assert shapes(scanned, "t d").results == ("float32[d]", "float32[t, d]")


def test_a_model_for_all_batches_and_lengths() -> None:
    model = random_model(
        {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 64, "intermediate_size": 48,
         "num_attention_heads": 4}
    )  # fmt: skip
    assert shapes(model, "int32[b t]").results == "float32[b, t, 64]"


def product(x, w):
    return x @ w


def addition(x, w):
    return x + w


def pairs(x, w):
    return jnp.einsum("btd,df->btf", x, w)


def joined(x, w):
    return jnp.concatenate([x, w], axis=0)


SICK = [
    (product, ("b t d", "f d"), r"last axis of x \[b, t, d\], d, and the second to last one of w \[f, d\], f, .* w\.T"),
    (product, ("d b", "d f"), r"transpose the former: x\.T"),
    (product, ("b n h", "n*h f"), r"merge the last two axes of the former: x\.reshape\(b, .*\)"),
    (product, ("b d", "h f"), r"they agree only where d == h"),
    (product, ("b t d", "c d f"), r"batch axes b of x \[b, t, d\] and c of w \[c, d, f\] disagree"),
    (addition, ("b t d", "b t"), r"x \[b, t, d\] and w \[b, t\] do not go together in add: .* w\[:, :, None\]"),
    (addition, ("b t d", "b d t"), r"reorder w: w\.transpose\(0, 2, 1\)"),
    (addition, ("b t", "b s"), r"their axes 1 are t and s; they agree only where t == s"),
    (addition, ("b t d", "d"), r"rank promotion is off; give w the axes it lacks: w\[None, None, :\]"),
    (pairs, ("b t d", "f d"), r"einsum 'btd,df->btf': 'd' is d in x \[b, t, d\] and f in w .* 'fd' instead of 'df'"),
    (pairs, ("b d", "d f"), r"'btd' names 3 axes and x \[b, d\] has 2; put an axis in or leave a letter out"),
    (joined, ("b d", "b h"), r"joined along axis 0, and their axes 1 are d and h; join them along axis 1"),
    (joined, ("b t d", "t d"), r"have 3 and 2 axes; give w the axes it lacks: w\[None, :, :\]"),
    (lambda x, w: x.reshape(-1, 7), ("b t", "d"), r"x \[b, t\] has .*t.* elements, which 7 does not divide for all sizes"),  # noqa: E501
    (lambda x, w: x.reshape(w.shape), ("b t", "d"), r"a value of \[b, t\] is brought to \[d\]: b\*t elements to d; they agree only where b\*t == d"),  # noqa: E501
    (lambda x, w: jnp.where(x > 0, x, w), ("b t", "t b"), r"do not go together in where.*transpose\(1, 0\)"),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "specs", "sentence"), SICK, ids=range(len(SICK)))
def test_disagreements_are_sentences(fn, specs, sentence: str) -> None:
    with pytest.raises(ProgramError, match=sentence) as caught:
        shapes(fn, *specs)
    assert str(caught.value).startswith(
        f"test_symbolic.py:{fn.__code__.co_firstlineno + (fn.__name__ != '<lambda>')}: "
    )


def test_what_is_no_shape() -> None:
    with pytest.raises(ProgramError, match=r"'b \[t' is no shape; write \"b t d\""):
        shapes(jnp.sin, "b [t")
    with pytest.raises(ProgramError, match="'b t!' cannot be read"):
        shapes(jnp.sin, "b t!")
    with pytest.raises(ProgramError, match="'float33"):
        shapes(jnp.sin, "float33[b]")
    assert jax.config.jax_traceback_filtering != "off"  # type: ignore[attr-defined]
