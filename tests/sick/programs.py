"""The zoo: programs with one fault each, whose line is marked `# here`, and healthy ones that come close to a fault.

A sick program says what is found: kind, primitive, part of the path, turns, and, where it is not the first thing that
went wrong, what it goes back to. The line is that of the function's comment `# here`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
W = jnp.sin(jnp.arange(16.0)).reshape(4, 4)


@dataclasses.dataclass(frozen=True)
class Sick:
    """A program with a fault, and what is to be found."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kind: str
    primitive: str
    marked: Callable[..., Any]
    path: str = ""
    turns: tuple[int, ...] = ()
    stage: str = "forward"
    says: str = ""
    shard: tuple[int, ...] = ()


def line_of(fn: Callable[..., Any]) -> int:
    """Returns the line of a function that ends in `# here`."""
    lines, start = inspect.getsourcelines(fn)
    (found,) = [start + i for i, text in enumerate(lines) if text.rstrip().endswith("# here")]
    return found


SICK: dict[str, Sick] = {}
HEALTHY: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}


def sick(
    *args: Any, kind: str, primitive: str, transform: Callable[..., Any] = lambda fn: fn, **more: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def keep(fn: Callable[..., Any]) -> Callable[..., Any]:
        SICK[fn.__name__] = Sick(transform(fn), args, kind, primitive, fn, **more)
        return fn

    return keep


def healthy(*args: Any, transform: Callable[..., Any] = lambda fn: fn) -> Callable[..., Any]:
    def keep(fn: Callable[..., Any]) -> Callable[..., Any]:
        HEALTHY[fn.__name__] = (transform(fn), args)
        return fn

    return keep


# ---- gradients -------------------------------------------------------------------------------------------------------


@sick(jnp.array([0.0, 1.0, 4.0]), kind="nan", primitive="mul", stage="backward", transform=jax.grad, says="sqrt")
def gradient_of_sqrt_at_zero_under_where(x):
    root = jnp.sqrt(x)  # here
    return jnp.sum(jnp.where(x > 0, root, 0.0))


@sick(jnp.zeros(3), kind="nan", primitive="mul", stage="backward", transform=jax.grad, says="0 * Inf")
def gradient_of_a_norm_at_zero(x):
    return jnp.sqrt(jnp.sum(x * x))  # here


@sick(jnp.array([0.5, 0.0]), kind="nan", primitive="div", stage="backward", transform=jax.grad, says="log")
def gradient_of_log_at_zero(x):
    logs = jnp.log(x)  # here
    return jnp.sum(jnp.where(x > 0, logs, -1.0) * 2.0 + x)


@sick(jnp.full((2,), 1e-5), kind="vanishing", primitive="mul", stage="backward", transform=jax.grad)
def vanishing_gradient(x):
    return jnp.sum(x * x * x + 1.0)  # here


@sick(
    jnp.ones(4),
    jnp.ones(4),
    kind="zeros",
    primitive="broadcast_in_dim",
    transform=functools.partial(jax.grad, argnums=1),
)
def gradient_that_is_cut_off(x, w):
    return jnp.sum(x * jax.lax.stop_gradient(w))


@sick(jnp.full((3,), 60.0), kind="inf", primitive="exp", transform=jax.value_and_grad, says="exp of")
def overflow_under_checkpoint(x):
    block = jax.checkpoint(lambda x: jnp.exp(x * 2.0))  # here
    return jnp.sum(block(x))


@sick(jnp.array([1.0, 0.0]), kind="inf", primitive="div", transform=jax.vmap, says="denominator is 0")
def division_under_vmap(x):
    return 1.0 / x  # here


# ---- overflow and domains --------------------------------------------------------------------------------------------


@sick(jnp.array([[1.0, 30.0, 12.0]], jnp.float16), kind="inf", primitive="exp", says="exp of 30 is beyond what float16")
def log_softmax_overflow_in_fp16(logits):
    powers = jnp.exp(logits)  # here
    return jnp.log(powers / jnp.sum(powers, -1, keepdims=True))


@sick(jnp.array([300.0, 2.0], jnp.float16), kind="inf", primitive="mul", says="beyond what float16 holds")
def square_in_fp16(x):
    return x * x  # here


@sick(jnp.array([1e5, 2.0]), kind="inf", primitive="convert_element_type", says="cannot hold 1e+05")
def cast_to_fp16(x):
    return x.astype(jnp.float16)  # here


@sick(jnp.full((4, 4), 1e20), kind="inf", primitive="dot_general", says="beyond what float32 holds")
def overflow_of_a_product(w):
    return (w @ w).sum()  # here


@sick(jnp.array([0.5, -0.1]), kind="nan", primitive="log", says="negative number")
def logarithm_of_a_negative_probability(p):
    return -jnp.sum(p * jnp.log(p))  # here


@sick(jnp.array([0.0, 1.0]), kind="nan", primitive="mul", says="0 * Inf")
def entropy_with_a_zero_probability(p):
    return -jnp.sum(p * jnp.log(p))  # here


@sick(jnp.array([0.2, -3.0]), kind="nan", primitive="pow", says="fractional power")
def fractional_power(x):
    return jnp.power(x, 0.3)  # here


@sick(jnp.array([1.0000001, 0.5]), kind="nan", primitive="acos", says="outside [-1, 1]")
def angle_of_a_rounded_cosine(c):
    return jnp.arccos(c)  # here


@sick(jnp.array([[3.0, 3.0, 3.0], [1.0, 2.0, 3.0]]), kind="nan", primitive="div", says="denominator is 0")
def normalization_without_epsilon(x):
    centered = x - x.mean(-1, keepdims=True)
    return centered / jnp.sqrt((centered**2).mean(-1, keepdims=True))  # here


@sick(jnp.array([1e-30, 1e-25]), kind="zeros", primitive="mul", says="underflow")
def underflow_of_a_product(x):
    return x * x  # here


@sick(jnp.array([3e-6, 5e-6], jnp.float16), kind="vanishing", primitive="mul", says="subnormal")
def subnormals_in_fp16(x):
    return jnp.tanh(x * jnp.float16(0.01) + 1) + x * jnp.float16(0.25)  # here


@sick(jnp.full((8,), 200.0), kind="exploding", primitive="integer_pow")
def explosion(x):
    return jnp.sum(x**3)  # here


# ---- attention and models --------------------------------------------------------------------------------------------


@sick(X, jnp.array([[True, True, True], [True, False, True], [False, False, False]]), kind="nan", primitive="sub",
      says="all masked")  # fmt: skip
def attention_row_fully_masked(x, mask):
    scores = jnp.where(mask, x @ x.T, -jnp.inf)
    weights = jax.nn.softmax(scores)  # here
    return weights @ x


@sick(jnp.array([[0, 3, 5, 3]]), W.repeat(2, 0).at[3].set(0.0), kind="zeros", primitive="gather", says="rows of zeros")
def an_all_zero_embedding_row(tokens, table):
    return table[tokens] * 2.0  # here


@sick(jnp.ones((16, 4)) + X[:1], jnp.where(jnp.arange(8)[None] < 5, -1.0, 1.0) * jnp.ones((4, 8)),
      kind="dead", primitive="max",
      says="5 of 8 units")  # fmt: skip
def dead_relu_units(x, w):
    hidden = jax.nn.relu(x @ w - 0.5)  # here
    return hidden.sum()


@sick(X, W.at[2, 1].set(jnp.nan), kind="nan", primitive="", says="args[1]")
def a_nan_in_an_argument(x, w):
    return jnp.tanh(x @ w).sum()  # here


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, scale: float):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.linear(x) / self.scale  # here


class Model(nnx.Module):
    def __init__(self, scales: tuple[float, ...]):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([Layer(rngs, scale) for scale in scales])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


def run_model(model: Model, x: jax.Array) -> jax.Array:
    return model(x).sum()


SICK["a_layer_that_divides_by_zero"] = Sick(
    run_model, (Model((1.0, 2.0, 0.0, 1.0)), X), "inf", "div", Layer.__call__, path="layers/2", says="denominator is 0"
)
SICK["a_layer_that_divides_by_zero_under_jit_and_grad"] = Sick(
    jax.jit(jax.value_and_grad(run_model)), (Model((1.0, 0.0)), X), "inf", "div", Layer.__call__, path="layers/1"
)  # fmt: skip


# ---- loops and branches ----------------------------------------------------------------------------------------------


@sick(jnp.ones(3), kind="nan", primitive="sqrt", path="scan", turns=(37,), says="negative number")
def a_nan_at_iteration_37_of_a_scan(x):
    def body(carry, i):
        root = jnp.sqrt(36.5 - i)  # here
        return carry + 0.1 * root, carry.sum()

    return jax.lax.scan(body, x, jnp.arange(50.0))


@sick(jnp.ones(3), kind="nan", primitive="mul", path="scan", turns=(2,), stage="backward", transform=jax.grad)
def a_nan_in_the_gradient_of_one_turn(x):
    def body(carry, i):
        root = jnp.sqrt(jnp.abs(i - 2.0) * carry)  # here
        return jnp.where(i == 2.0, carry, root + 1.0), None

    return jax.lax.scan(body, x, jnp.arange(5.0))[0].sum()


@sick(jnp.ones(3), kind="inf", primitive="exp", path="scan/scan", turns=(2, 1), says="exp of")
def overflow_in_a_nested_scan(x):
    def inner(carry, j):
        return carry, jnp.exp(carry * j)  # here

    def outer(carry, i):
        return carry, jax.lax.scan(inner, carry, jnp.where(i == 2.0, 100.0, 1.0) * jnp.arange(3.0))[1]

    return jax.lax.scan(outer, x, jnp.arange(4.0))[1]


@sick(jnp.float32(3.0), kind="nan", primitive="log", path="while", turns=(4,), says="negative number")
def a_nan_in_a_while_loop(x):
    def body(state):
        i, y = state
        return i + 1, y + 0.0 * jnp.log(x + 0.5 - i.astype(jnp.float32))  # here

    return jax.lax.while_loop(lambda state: state[0] < 9, body, (jnp.int32(0), x))


@sick(jnp.float32(0.0), jnp.int32(7), kind="inf", primitive="div", path="while", turns=(4,), says="denominator is 0")
def a_division_in_a_fori_loop(x, n):
    def body(i, y):
        return y + 1.0 / (4 - i).astype(jnp.float32)  # here

    return jax.lax.fori_loop(0, n, body, x)


@sick(jnp.float32(-2.0), kind="nan", primitive="log", path="cond:1", says="negative number")
def a_nan_in_one_branch(x):
    return jax.lax.cond(x < 0, jnp.log, lambda x: x, x)  # here


@sick(X[0], kind="inf", primitive="div", path="scan/cond:3", turns=(3,), says="denominator is 0")
def a_fault_in_a_branch_within_a_scan(x):
    def body(carry, i):
        return jax.lax.switch(i % 4, [lambda c: c, jnp.sin, jnp.cos, lambda c: c / (c - c)], carry), None  # here

    return jax.lax.scan(body, x, jnp.arange(4))[0]


# ---- training --------------------------------------------------------------------------------------------------------


@sick(W, X, kind="exploding", primitive="mul")
def a_loss_that_explodes_after_a_step(w, x):
    loss = lambda w: jnp.mean((x @ w - 1.0) ** 2)  # noqa: E731
    w = w - 1e8 * jax.grad(loss)(w)  # here
    return loss(w)


@sick(W, X, jnp.array([1, 0, 3]), kind="nan", primitive="div", says="denominator is 0")
def mean_over_an_empty_selection(w, x, labels):
    chosen = (labels > 7).astype(jnp.float32)
    losses = -jax.nn.log_softmax(x @ w)[jnp.arange(3), labels]
    return jnp.sum(losses * chosen) / jnp.sum(chosen)  # here


def _shards() -> Any:
    return jax.make_mesh((len(jax.devices()),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def a_nan_on_one_shard(x):
    """x: [shards, n]; the values of one shard are negative."""

    def local(x):
        return jnp.sqrt(x) * jax.lax.psum(jnp.ones(()), "d")  # here

    spec = jax.sharding.PartitionSpec("d")
    return jax.shard_map(local, mesh=_shards(), in_specs=spec, out_specs=spec)(x)


# ---- healthy ---------------------------------------------------------------------------------------------------------


@healthy(jnp.array([0.0, 1.0, 4.0]), transform=jax.grad)
def square_root_with_a_safe_where(x):
    return jnp.sum(jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0))


@healthy(X, jnp.tril(jnp.ones((3, 3), bool)), transform=jax.value_and_grad)
def masked_attention(x, mask):
    return jnp.sum(jax.nn.softmax(jnp.where(mask, x @ x.T, -jnp.inf)) @ x)


@healthy(X, jnp.tril(jnp.ones((3, 3), bool)))
def mask_of_large_numbers(x, mask):
    return jax.nn.softmax(x @ x.T + (1.0 - mask.astype(jnp.float32)) * -1e9) @ x


@healthy(X, jnp.tril(jnp.ones((3, 3), bool)))
def mask_of_the_smallest_float(x, mask):
    return jax.nn.softmax(jnp.where(mask, x @ x.T, jnp.finfo(jnp.float32).min)) @ x


@healthy(X, jnp.tril(jnp.ones((3, 3), bool)), transform=jax.value_and_grad)
def one_mask_for_three_layers(x, mask):
    bias = (1.0 - mask.astype(jnp.float32)) * jnp.finfo(jnp.float32).min / 2
    for i in range(3):
        with jax.named_scope(f"layers/{i}/attention"):
            x = x + jax.nn.softmax(x @ x.T + bias) @ x
    return jnp.sum(x)


@healthy(jnp.zeros(4), W, jnp.sin(jnp.arange(128.0) ** 2).reshape(32, 4), transform=jax.grad)
def a_bias_of_keys_that_changes_nothing(bias, w, x):
    keys = x @ w + jnp.broadcast_to(bias, x.shape)
    return 1e-3 * jnp.mean(jnp.square(jax.nn.softmax(x @ keys.T) @ x))


@healthy(2e4 * X, transform=jax.value_and_grad)
def norms_of_large_values(x):
    for i in range(2):
        with jax.named_scope(f"norms/{i}"):
            x = x + 2e4 * x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    with jax.named_scope("norm"):
        return jnp.sum(jnp.sin(x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)))


@healthy(jnp.array([[1.0, 30.0, 12.0]], jnp.float16), transform=lambda fn: jax.jit(jax.grad(fn)))
def log_softmax_in_fp16(x):
    return jax.nn.log_softmax(x)[0, 1].astype(jnp.float32)


@healthy(jnp.array([-jnp.inf, 0.0, 1.0]))
def logsumexp_of_a_masked_entry(x):
    return jax.nn.logsumexp(x)


@healthy(X, W, transform=jax.grad)
def relu_layer(x, w):
    return jax.nn.relu(x @ w).sum()


@healthy(X, W)
def gelu_and_silu(x, w):
    return jax.nn.gelu(x @ w), jax.nn.silu(x @ w)


@healthy(jnp.array([0, 3, 5]), W.repeat(2, 0), transform=functools.partial(jax.grad, argnums=1))
def embedding(tokens, table):
    return jnp.sum(table[tokens] ** 2)


@healthy(X, W)
def zero_initialized_output(x, w):
    return x + (x @ w) @ jnp.zeros((4, 4))


@healthy(X, jnp.zeros((1, 4)), transform=functools.partial(jax.grad, argnums=1))
def zero_bias(x, b):
    return jnp.sum((x + b) ** 2)


@healthy(jnp.ones(3))
def scan_of_fifty(x):
    return jax.lax.scan(lambda c, i: (0.9 * c + 0.1 * i, c.sum()), x, jnp.arange(50.0))


@healthy(jnp.ones(3), transform=jax.grad)
def scan_under_grad_and_checkpoint(x):
    return jax.lax.scan(jax.checkpoint(lambda c, i: (jnp.tanh(c) + i, None)), x, jnp.arange(5.0))[0].sum()


@healthy(jnp.float32(2.0))
def newton_in_a_while_loop(x):
    return jax.lax.while_loop(lambda y: jnp.abs(y * y - x) > 1e-5, lambda y: 0.5 * (y + x / y), jnp.float32(1.0))


@healthy(jnp.float32(2.0))
def branch_that_would_fail(x):
    return jax.lax.cond(x < 0, jnp.log, lambda x: x, x)


@healthy(KEY, X, transform=functools.partial(jax.grad, argnums=1))
def dropout(key, x):
    return jnp.sum(jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x / 0.5, 0.0) ** 2)


@healthy(KEY)
def random_numbers(key):
    return jax.random.normal(key, (4, 8)) + jax.random.uniform(key, (4, 8))


@healthy(W, X, transform=jax.grad)
def small_batch_of_regression(w, x):
    return jnp.mean((x @ w - 1.0) ** 2)


@healthy(W, X)
def adam_step(w, x):
    gradient = jax.grad(lambda w: jnp.mean((x @ w - 1.0) ** 2))(w)
    m, v = 0.1 * gradient, 0.001 * gradient**2
    return w - 0.001 * (m / 0.1) / (jnp.sqrt(v / 0.001) + 1e-8), m, v


@healthy(Model((1.0, 2.0)), X, transform=lambda fn: jax.jit(jax.grad(fn)))
def a_model(model, x):
    return model(x).sum()


@healthy(X)
def layer_norm(x):
    centered = x - x.mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5)


@healthy(jnp.arange(24.0).reshape(2, 3, 4))
def moves_only(x):
    return jnp.swapaxes(x, 0, 1).reshape(6, 4)[::2], jnp.broadcast_to(x[:1], (5, 3, 4))


@healthy(X.astype(jnp.bfloat16), W.astype(jnp.bfloat16))
def bfloat16(x, w):
    return jax.nn.softmax((x @ w).astype(jnp.float32))


@healthy(jnp.array([0.0, 0.3, 1.0]), transform=jax.grad)
def entropy_with_xlogy(p):
    return -jnp.sum(jax.scipy.special.xlogy(jnp.where(p > 0, p, 1.0), jnp.where(p > 0, p, 1.0)))


@healthy(jnp.array([3, 1, 2]))
def integers(x):
    return jnp.sort(x) * 2, jnp.cumsum(x)


@healthy(X)
def straight_through(x):
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


@healthy(X, transform=lambda fn: jax.vmap(jax.grad(fn)))
def gradient_by_sample(x):
    return jnp.sum(jnp.sin(x) ** 2)


@healthy(np.ones(3, np.float32), 0.5)
def numpy_and_python_arguments(x, scale):
    return x * scale
