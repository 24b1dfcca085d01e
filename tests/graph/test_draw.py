"""Pictures of a program: their parts and edges, and that other programs read them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import pytest

from trustcore.errors import ProgramError
from trustcore.graph.cost import cost
from trustcore.graph.draw import as_dot, as_graphml, as_json, as_svg, as_text, collapse

X, W = jnp.ones((8, 16)), jnp.ones((16, 16))


def model(x, w):
    with jax.named_scope("encoder"):
        with jax.named_scope("first"):
            x = jnp.tanh(x @ w)
        with jax.named_scope('second "layer"'):
            x = jnp.tanh(x @ w)
    with jax.named_scope("head"):
        return jnp.sum(x)


PICTURE = collapse(model, X, W)


def test_parts_and_edges() -> None:
    assert list(PICTURE.parts) == ["encoder/first", 'encoder/second "layer"', "head"]
    assert PICTURE.edges[("encoder/first", 'encoder/second "layer"')] == 8 * 16 * 4
    assert PICTURE.edges[("inputs", "encoder/first")] == X.nbytes + W.nbytes
    assert ("encoder/first", "head") not in PICTURE.edges
    assert sum(part.flops for part in PICTURE.parts.values()) == cost(model, X, W).flops
    assert list(collapse(model, X, W, depth=1).parts) == ["encoder", "head"]


def test_the_backward_pass_stands_apart() -> None:
    found = collapse(jax.grad(model, 1), X, W, depth=1)
    assert "backward: encoder" in found.parts and ("encoder", "backward: encoder") in found.edges


def test_values_pass_through_loops_and_calls() -> None:
    def looped(x, w):
        x = jax.lax.scan(lambda x, _: (model_body(x, w), None), x, length=3)[0]
        with jax.named_scope("head"):
            return jnp.sum(x)

    @jax.jit
    def model_body(x, w):
        with jax.named_scope("body"):
            return jnp.tanh(x @ w)

    found = collapse(looped, X, W, depth=2)
    assert ("scan/body", "head") in found.edges and ("inputs", "scan/body") in found.edges


def test_text() -> None:
    lines = as_text(PICTURE).splitlines()
    assert len(lines) == 3 and "<- encoder/first" in lines[1]
    assert lines[0].count("#") == 30 and lines[2].count("#") <= 2


def test_json_and_graphml() -> None:
    told = json.loads(as_json(PICTURE))
    assert len(told["parts"]) == 3 and {"from", "to", "bytes"} == set(told["edges"][0])
    root = ElementTree.fromstring(as_graphml(PICTURE))
    space = {"g": "http://graphml.graphdrawing.org/xmlns"}
    nodes = {node.attrib["id"] for node in root.findall(".//g:node", space)}
    assert nodes == {*PICTURE.parts, "inputs"}
    assert all(edge.attrib["source"] in nodes for edge in root.findall(".//g:edge", space))


def test_dot() -> None:
    text = as_dot(PICTURE)
    assert text.startswith("digraph program {") and text.count("->") == len(PICTURE.edges)
    assert r'"encoder/second \"layer\""' in text


def test_svg_is_drawn_where_graphviz_is(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("dot"):
        assert "<svg" in as_svg(PICTURE)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ProgramError, match="Graphviz is not installed"):
        as_svg(PICTURE)


def test_svg_passes_on_what_graphviz_complains_of(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "syntax error in line 1")
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(ProgramError, match="syntax error in line 1"):
        as_svg(PICTURE)
