"""Kernels of a compiled program, times of its pieces, the longest chain."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import pytest

from trustcore.graph.cost import Peaks, cost
from trustcore.graph.fusion import fusions
from trustcore.graph.timing import critical_path, histogram, pieces
from trustcore.models import random_model

X, W = jnp.ones((256, 512)), jnp.ones((512, 512))
LIMITS = Peaks(1e11, 1e10)


def block(x, w):
    with jax.named_scope("norm"):
        h = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    with jax.named_scope("mlp"):
        return jnp.tanh(h @ w) * 2 + 1


def test_kernels_and_what_lies_between_them() -> None:
    found = fusions(block, X, W)
    (product,) = found.of("dot_general")
    assert product.kind == "dot" and product.scope == "mlp"
    assert product.read == X.nbytes + W.nbytes and product.written == X.nbytes
    (tanh,) = found.of("tanh")
    assert {"tanh", "mul", "add"} <= {name for name, _ in tanh.operations}  # one kernel of three operations
    assert any(place.startswith("test_fusion.py:") for place in tanh.places)
    before, after = (each for each in found.apart if product in (each.writer, *each.readers))
    assert {before.reason, after.reason} == {"dot reads its operands from memory", "dot stores its result"}
    assert before.nbytes == after.nbytes == 2 * X.nbytes
    told = jax.jit(block).lower(X, W).compile().cost_analysis()
    assert told is not None and found.nbytes == pytest.approx(told["bytes accessed"], rel=0.2)
    page = str(found)
    assert "kept apart:" in page and "dot: dot_general in mlp" in page


def test_what_is_read_twice_and_loops() -> None:
    shared = fusions(lambda x: (jnp.sum(jnp.tanh(x), 0), jnp.sum(jnp.tanh(x), 1) * 2), X)
    assert shared.avoidable <= shared.nbytes
    looped = fusions(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c) * 2, None), x, length=3)[0], X)
    (kernel,) = looped.of("sin")
    assert kernel.in_loop and "in a loop" in str(looped)


def test_pieces_are_the_modules_and_have_their_work() -> None:
    timed = pieces(block, X, W, limits=LIMITS, repeats=2)
    assert [piece.label for piece in timed.pieces] == ["norm", "mlp"]
    assert sum(piece.flops for piece in timed.pieces) == pytest.approx(cost(block, X, W).flops)
    norm, mlp = timed.pieces
    assert (
        mlp.predicted == pytest.approx(max(mlp.flops / 1e11, mlp.nbytes / 1e10))
        and mlp.nbytes == 2 * X.nbytes + W.nbytes
    )
    assert mlp.start == norm.seconds > 0 and timed.whole > 0 and "as one program" in str(timed)
    events = json.loads(timed.to_trace())["traceEvents"]
    assert [event["name"] for event in events] == ["norm", "mlp"] and events[1]["ts"] == pytest.approx(1e6 * mlp.start)
    picture = ElementTree.fromstring(timed.to_svg())
    assert len(picture.findall(".//{http://www.w3.org/2000/svg}title")) == 4


def test_pieces_of_a_gradient_of_a_model() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    model = random_model({"model_type": "llama", "num_hidden_layers": 1, **sizes})
    loss = lambda model, tokens: jnp.mean(model(tokens) ** 2)  # noqa: E731
    step = jax.grad(loss, allow_int=True)
    timed = pieces(step, model, jnp.zeros((2, 8), jnp.int32), limits=LIMITS, repeats=1)
    names = set(timed.by_module())
    assert {"blocks/0", "backward: blocks/0"} <= names, names


def test_the_critical_path() -> None:
    def wide(x, w):
        parts = [jnp.tanh(x @ (w * i)) for i in range(4)]
        return sum(parts[1:], parts[0])

    path = critical_path(wide, X, W, limits=LIMITS)
    products = [address for address, _ in path.steps if address.primitive == "dot_general"]
    assert len(products) == 1 and 2 < path.parallelism < 4 and "test_fusion.py:" in str(path)
    chain = critical_path(lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w), X, W, limits=LIMITS)
    assert chain.parallelism == pytest.approx(1.0)
    assert chain.seconds == pytest.approx(sum(seconds for _, seconds in chain.steps))
    looped = critical_path(lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, length=5)[0], X, W, limits=LIMITS)
    assert looped.seconds == pytest.approx(5 * 2 * 256 * 512 * 512 / 1e11, rel=0.01)


def test_histograms() -> None:
    page = histogram([0, 1, 10, 100, 1000, 1000], bins=3, width=4)
    assert [line.count("#") for line in page.splitlines()] == [0, 1, 1, 4]
    assert page.splitlines()[0].split() == ["0", "B", "1"] and page.splitlines()[-1].split()[-2:] == ["3", "####"]
    assert histogram([]) == "" and len(histogram([5.0], bins=3).splitlines()) == 3
