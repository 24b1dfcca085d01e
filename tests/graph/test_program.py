"""Addresses are stable and tell the truth; observed programs compute what they did; origins are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from trustcore.graph import Probe, Program, observe, origins, trace

X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return x + jax.nn.relu(self.up(x))


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jax.checkpoint(lambda layer, x: layer(x))(layer, x)
        return self.head(x).sum()


def body(carry, x):
    with jax.named_scope("inner"):
        y = jnp.tanh(carry) + x
    return jax.lax.cond(y.sum() > 0, jnp.sin, lambda y: 2 * jnp.cos(y), y), y.sum()


def scanned(x):
    carry, sums = jax.lax.scan(jax.checkpoint(body), x, jnp.arange(3.0))
    return carry.sum() + sums.sum()


def looped(x):
    carry, _ = scanned_pair(x)
    return jax.lax.while_loop(lambda s: s[0] < 4, lambda s: (s[0] + 1, s[1] * 1.5), (0, carry))[1].sum()


def scanned_pair(x):
    return jax.lax.scan(body, x, jnp.arange(3.0))


def solved(x):
    @jax.custom_vjp
    def f(x):
        return jnp.exp(x)

    f.defvjp(lambda x: (jnp.exp(x), x), lambda x, g: (g * jnp.exp(x),))
    return f(x).sum()


def by_platform(x):
    return jax.lax.platform_dependent(x, cpu=jnp.sin, cuda=lambda x: jnp.cos(x) + jnp.arange(4.0)[None])


def kernel(x):
    from jax.experimental import pallas as pl

    def double(x_ref, o_ref):
        o_ref[...] = 2.0 * x_ref[...]

    return jnp.sin(pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x))


FUNCTIONS = {
    "while": (looped, (X,)),
    "loops": (scanned, (X,)),
    "gradient of loops": (jax.grad(scanned), (X,)),
    "jit of vmap of gradient": (jax.jit(jax.vmap(jax.grad(scanned))), (X[None],)),
    "reverse scan": (lambda x: jax.lax.scan(body, x, jnp.arange(3.0), reverse=True), (X,)),
    "custom derivative": (jax.grad(solved), (X,)),
    "branches by platform": (by_platform, (X,)),
    "pallas": (kernel, (X,)),
    "modules": (jax.value_and_grad(lambda model, x: model(x)), (Model(), X)),
    "random": (lambda key: jax.random.normal(jax.random.split(key)[0], (3,)), (jax.random.key(0),)),
}


class Sums:
    """A tap that keeps the sum of every float output."""

    def wants(self, node):
        return any(jnp.issubdtype(var.aval.dtype, jnp.floating) for var in node.eqn.outvars)

    def see(self, node, inputs, outputs):
        return {"sum": jnp.stack([jnp.sum(x, dtype=jnp.float32) for x in outputs if x.dtype == jnp.float32])}

    def sheet(self, scope, records):
        return {str(number): record["sum"] for number, record in records.items()}

    def keep(self, scope, turn):
        return None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_observed_program_computes_the_same(name):
    fn, args = FUNCTIONS[name]
    traced = trace(fn, args)
    outputs, sheets = jax.jit(lambda *v: observe(traced.program, v, Sums()))(*jax.tree.leaves(args))
    assert sheets
    for found, expected in zip(outputs, jax.tree.leaves(fn(*args)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_addresses_are_unique_and_the_same_when_traced_again(name):
    fn, args = FUNCTIONS[name]
    first, second = (trace(fn, args).program for _ in range(2))
    names = [str(node.address) for node in first.nodes]
    assert len(set(names)) == len(names)
    assert names == [str(node.address) for node in second.nodes]
    for node in first.nodes:
        assert node.address.matches(node.address.name) and node.address.matches(node.address.primitive)


def find(program, pattern):
    return [node.address for node in program.nodes if node.address.matches(pattern)]


def test_paths_name_modules_scopes_loops_and_stages():
    program = trace(*FUNCTIONS["modules"]).program
    products = find(program, "*/dot_general")
    assert {a.path for a in products if a.stage == "forward"} == {
        ("layers", "0", "up"),
        ("layers", "1", "up"),
        ("head",),
    }
    assert {a.stage for a in products} == {"forward", "recomputed", "backward"}
    loops = trace(scanned, (X,)).program
    (tanh,) = find(loops, "*tanh")
    assert tanh.path == ("scan", "inner") and tanh.at((2,)) == "scan[2]/inner/tanh"
    assert {a.path for a in find(loops, "*/cos")} == {("scan", "cond:0")}
    gradient = trace(jax.grad(scanned), (X,)).program
    assert [a.stage for a in find(gradient, "*tanh")] == ["forward", "recomputed"]
    assert find(gradient, "backward:*mul") and not find(loops, "backward:*")


def test_lines_are_those_of_the_user():
    program = trace(scanned, (X,)).program
    (tanh,) = find(program, "*tanh")
    line = body.__code__.co_firstlineno + 2
    assert tanh.place == f"test_program.py:{line}" and find(program, f"test_program.py:{line}")
    model = trace(*FUNCTIONS["modules"]).program
    product = find(model, "head/dot_general")[0]
    assert product.place.startswith("test_program.py:") and product.library.file.endswith("linear.py")


def test_functions_that_were_traced_before_get_their_paths_too():
    fn, args = jax.jit(lambda model, x: model(x)), FUNCTIONS["modules"][1]
    fn(*args)
    assert find(trace(fn, args).program, "layers/1/up/dot_general")
    assert nnx.Linear.__call__.__module__.startswith("flax")


def test_sheets_have_a_place_for_every_turn():
    traced = trace(looped, (X,))
    _, sheets = jax.jit(lambda x: observe(traced.program, [x], Sums()))(X)
    (tanh,) = [n for n in traced.program.nodes if n.address.primitive == "tanh"]
    found = sheets[tanh.scope.number][str(tanh.number)]
    carry, expected = X, []
    for i in range(3):
        expected.append(jnp.tanh(carry).sum())
        carry, _ = body(carry, jnp.float32(i))
    np.testing.assert_allclose(found[:, 0], np.stack(expected), rtol=1e-5)
    (loop,) = [n for n in traced.program.nodes if n.address.path == ("while",) and n.address.primitive == "mul"]
    sheet = sheets[loop.scope.number]
    assert int(sheet["turns"]) == 4
    np.testing.assert_allclose(sheet["last"][str(loop.number)][0], carry.sum() * 1.5**4, rtol=1e-5)
    ran = [int(sheets[scope.number]["ran"].sum()) for scope in traced.program.scopes if scope.kind == "branch"]
    assert sum(ran) == 3


@pytest.mark.parametrize("turn", [0, 2])
def test_a_probe_keeps_one_turn(turn):
    program = trace(FUNCTIONS["reverse scan"][0], (X,)).program
    (node,) = [n for n in program.nodes if n.address.primitive == "tanh"]
    probe = Probe(node, (turn,))
    sheet = jax.jit(lambda x: observe(program, [x], probe)[1])(X)[node.scope.number]
    carry = X
    for i in range(turn):
        carry, _ = body(carry, jnp.float32(2 - i))
    np.testing.assert_allclose(sheet["inputs"][0], carry, rtol=1e-5)
    np.testing.assert_allclose(sheet["outputs"][0], jnp.tanh(carry), rtol=1e-5)


def test_origins_go_through_calls_loops_and_branches():
    def fn(x, y):
        carry, _ = jax.lax.scan(lambda c, _: (jnp.sin(c), None), jax.jit(jnp.exp)(x), length=3)
        return jax.lax.cond(True, lambda c: c + y, lambda c: c, carry)

    program = trace(fn, (X, X)).program
    root = program.root
    found = origins(root, root.jaxpr.jaxpr.outvars[0], ())
    assert {(o.node.address.name, o.turns) for o in found} == {("cond:1/add", ()), ("scan/sin", (2,))}
    (sin,) = [n for n in program.nodes if n.address.primitive == "sin"]
    for turn, expected in ((0, ("exp", ())), (2, ("scan/sin", (1,)))):
        (origin,) = origins(sin.scope, sin.eqn.invars[0], (turn,))
        assert (origin.node.address.name, origin.turns) == expected
    (add,) = [n for n in program.nodes if n.address.primitive == "add"]
    assert [o.argument for o in origins(add.scope, add.eqn.invars[1], ())] == [1]


def test_a_program_names_its_arguments():
    traced = trace(lambda p, scale, flag=True: p["w"] * scale if flag else p, ({"w": X}, 2.0))
    assert traced.program.arguments == ("args[0]['w']", "args[1]") and traced.out_names == ("result",)
    assert isinstance(traced.program, Program)
