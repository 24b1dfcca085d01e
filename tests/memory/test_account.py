"""Accounts beside what XLA reports, the owners of buffers, and what cannot be read."""

from __future__ import annotations

import inspect
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustcore.errors import ProgramError
from trustcore.graph.wire import Message
from trustcore.memory import account, account_compiled, explained, trace_events
from trustcore.memory.account import sparkline
from trustcore.memory.estimate import estimate
from trustcore.models import random_model

SIZES = {"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
X, W = jnp.ones((64, 256)), jnp.ones((256, 256))
WS = jnp.ones((6, 256, 256))
KERNEL = jnp.ones((8, 8, 3, 3))


def chain(x, ws):
    for i in range(ws.shape[0]):
        with jax.named_scope(f"layer{i}"):
            x = jnp.tanh(x @ ws[i])
    return jnp.sum(x * x)


def scanned(x, ws):
    return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0] ** 2)


def looped(x, w):
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w)), (0, x))[1]


def branched(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda x: jnp.sin(x @ w) @ w, lambda x: x * 2, x)


def attention(x):
    scores = jax.nn.softmax(jnp.einsum("th,sh->ts", x, x))
    return scores @ x


MODEL = random_model({"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 2, **SIZES})
TOKENS = jnp.zeros((4, 32), jnp.int32)


def loss(model, tokens):
    return -jnp.mean(jax.nn.log_softmax(model(tokens))[..., 0])


PROGRAMS = {
    "a product": (lambda x, w: x @ w, (X, W)),
    "a chain": (chain, (X, WS)),
    "its gradient": (jax.grad(chain, 1), (X, WS)),
    "a scan": (scanned, (X, WS)),
    "the gradient of a scan": (jax.grad(scanned, (0, 1)), (X, WS)),
    "a while loop": (looped, (X, W)),
    "branches": (branched, (X, W)),
    "attention under vmap": (jax.vmap(attention), (jnp.ones((4, 128, 32)),)),
    "a sort": (lambda x: jnp.sort(x, axis=1)[::-1], (X,)),
    "a convolution": (lambda x, k: jax.lax.conv(x, k, (1, 1), "SAME"), (jnp.ones((2, 8, 32, 32)), KERNEL)),
    "a decoder": (lambda model, tokens: model(tokens), (MODEL, TOKENS)),
    "a decoder's gradient": (jax.grad(loss, allow_int=True), (MODEL, TOKENS)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_peak_is_what_xla_reserves(name: str) -> None:
    fn, args = PROGRAMS[name]
    compiled = jax.jit(fn).lower(*args).compile()
    told = compiled.memory_analysis()
    assert told is not None
    reserved = told.argument_size_in_bytes + told.output_size_in_bytes + told.temp_size_in_bytes
    found = account_compiled(compiled)
    assert abs(found.peak - reserved) <= 0.1 * reserved
    assert found.peak == found.curve.max() == sum(b.nbytes for b in found.largest(len(found.buffers)))
    assert found.arguments == sum(leaf.nbytes for leaf in jax.tree.leaves(args))


def test_buffers_have_their_owners() -> None:
    found = account(jax.grad(chain, 1), X, WS)
    scopes = {scope.split("/")[0] for scope in found.by_scope(2)}
    assert {"(arguments)", "(results)"} <= scopes and any(scope.startswith("layer") for scope in scopes)
    source, first = inspect.getsourcelines(chain)
    lines = {b.origin.line for b in found.buffers if b.kind == "temporary" and b.origin.file == __file__}
    assert lines and lines <= set(range(first, first + len(source)))
    assert [b.nbytes for b in found.largest(3)] == sorted((b.nbytes for b in found.largest(3)), reverse=True)
    assert any(b.origin.backward for b in found.buffers)


def test_the_curve_rises_where_activations_are_kept() -> None:
    wide = jnp.ones((2048, 256))
    found = account(jax.grad(chain, 1), wide, WS)
    before, after = found.curve[: found.peak_step], found.curve[found.peak_step :]
    kept = 4 * wide.nbytes
    assert found.curve[-1] + kept < found.peak and before[0] + kept < found.peak and after.size > 3
    forward = account(chain, wide, WS)
    assert forward.peak + kept < found.peak


def test_donation_saves_the_result() -> None:
    update = lambda w, g: w - 0.1 * g  # noqa: E731
    plain, donated = account(update, WS, WS), account(update, WS, WS, donate_argnums=0)
    assert plain.peak - donated.peak == WS.nbytes


def test_shapes_are_enough_and_the_estimate_knows_no_fusion() -> None:
    shape = jax.ShapeDtypeStruct((1 << 24,), jnp.float32)
    found = account(lambda x: jnp.sum(jnp.sin(x) * jnp.cos(x)), shape)
    assert found.arguments == 1 << 26 and found.arguments < found.peak <= found.estimate
    assert found.estimate == 4 * (1 << 26)  # x, sin, cos and their product


def test_what_is_told_can_be_kept() -> None:
    found = account(jax.grad(scanned), X, WS)
    told = json.loads(json.dumps(found.as_json()))
    assert told["peak"] == found.peak and len(told["curve"]) == len(found.steps) and len(told["largest"]) <= 10
    text = str(found)
    assert "peak" in text and "argument" in text and "float32[6,256,256]" in text
    assert len(sparkline(np.arange(1000))) == 72 and sparkline(np.array([0, 8])) == "▁█"


def test_running_out_of_memory_is_explained() -> None:
    def huge(x):
        with jax.named_scope("greedy"):
            return jnp.sum(jnp.sort(jnp.broadcast_to(x, (1 << 22, 1 << 20)), axis=0))

    with pytest.raises(ProgramError, match=r"(?s)RESOURCE_EXHAUSTED.*peak .* TB.*greedy"):
        explained(huge)(jnp.ones(1 << 20))
    assert explained(lambda x: x + 1)(jnp.ones(2)).tolist() == [2, 2]
    with pytest.raises(TypeError):
        explained(lambda x: x + "a")(jnp.ones(2))


def test_backends_that_tell_nothing_are_named() -> None:
    class Compiled:
        def memory_analysis(self) -> object:
            return object()

    with pytest.raises(ProgramError, match="does not tell"):
        account_compiled(Compiled())


class Silent:
    """A compiled program of a backend that tells sizes and no buffers, as a TPU's does."""

    def __init__(self, compiled):
        self.compiled = compiled

    def memory_analysis(self):
        told = self.compiled.memory_analysis()
        names = [f"{kind}_size_in_bytes" for kind in ("argument", "output", "temp", "alias")]
        return types.SimpleNamespace(**{name: getattr(told, name) for name in names})


@pytest.mark.parametrize("name", ["chain", "gradient of a scan", "branch"])
def test_where_no_buffers_are_shown_the_jaxpr_tells(name: str) -> None:
    def scanned(ws, x):
        with jax.named_scope("layers"):
            return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0])

    def branched(ws, x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: jnp.sin(x @ ws[0]), jnp.cos, x)

    ws, x = jnp.ones((4, 64, 64)), jnp.ones((128, 64))
    fn = {"chain": lambda ws, x: chain(x, ws), "gradient of a scan": jax.grad(scanned), "branch": branched}[name]
    jitted = jax.jit(fn)
    compiled, jaxpr = jitted.lower(ws, x).compile(), jax.make_jaxpr(fn)(ws, x)
    found = account_compiled(Silent(compiled), jaxpr=jaxpr)
    assert found.by == "jaxpr" and "does not show its buffers" in str(found) and "test_account.py:" in str(found)
    assert (found.arguments, found.results) == (ws.nbytes + x.nbytes, sum(y.size * 4 for y in jaxpr.out_avals))
    assert found.peak == pytest.approx(account(jitted, ws, x).peak, rel=0.1)
    known = estimate(jaxpr)
    assert 0.75 * known <= found.curve.max() <= 1.25 * known
    assert found.curve[found.peak_step] == sum(b.nbytes for b in found.largest(10**6))
    if "scan" in name:
        assert any("layers/scan" in b.origin.path for b in found.buffers) and found.by_scope()["layers"] > 0
    trace_events(found)
    json.dumps(found.as_json())


def test_messages_are_read_as_they_are_defined() -> None:
    # field 1: 300; field 2: "ab"; field 3: packed 1, 300; field 4: 8 bytes; field 5: 4 bytes
    data = bytes([8, 172, 2, 18, 2, 97, 98, 26, 3, 1, 172, 2, 33, 1, 0, 0, 0, 0, 0, 0, 0, 45, 2, 0, 0, 0])
    message = Message(data)
    assert (message.number(1), message.text(2), message.numbers(3)) == (300, "ab", [1, 300])
    assert (message.number(4), message.number(5), message.number(9, 7), message.text(9)) == (1, 2, 7, "")


@given(st.binary(max_size=40))
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    try:
        message = Message(data)
        for number in range(1, 4):
            assert isinstance(message.numbers(number), list) and isinstance(message.texts(number), list)
    except ProgramError:
        pass
