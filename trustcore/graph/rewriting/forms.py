"""What is the same though it is written differently: constants, views, operations with several names.

    uniform(value)    the number that all elements of a value are, where no input has a say in it
    constant(value)   the array of a value that depends on no input
    skip(value)       the value beneath operations that change nothing: x * 1, x - 0, max(x, -inf), a known where
    form(value)       (operation, parameters, operands) such that equal forms compute the same

A form takes a chain of reshapes that only add or drop axes of size one as one "unit" operation, x * x and x ** 2 as
"square", and knows which operations may swap their operands.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from trustcore.graph.rewriting.terms import Value, evaluate, is_traced
from trustcore.graph.walk import bind

LIMIT = 1 << 26  # elements of a constant that are computed to be looked at
COMMUTATIVE = frozenset({"add", "mul", "max", "min", "and", "or", "xor", "eq", "ne"})
_SPREAD = frozenset({"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "copy", "rev", "slice"})
ELEMENTWISE = frozenset(
    {
        "convert_element_type", "add", "sub", "mul", "div", "neg", "max", "min", "exp", "log", "sqrt", "rsqrt",
        "square", "integer_pow", "pow", "abs", "sign", "floor", "ceil", "and", "or", "not", "eq", "ne", "lt", "le",
        "gt", "ge", "select_n", "tanh", "logistic", "stop_gradient", "exp2", "log1p", "expm1", "rem",
    }
)  # fmt: skip
# Those that NumPy rounds as XLA does; compiling each for one number would take longer.
_NUMPY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "max": np.maximum,
    "min": np.minimum, "sqrt": np.sqrt, "square": np.square, "abs": np.abs, "eq": np.equal, "ne": np.not_equal,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "stop_gradient": np.asarray,
}  # fmt: skip
UNIT = frozenset({"broadcast_in_dim", "reshape", "squeeze", "expand_dims"})
# Parameters that say where and how exactly, not what.
_IGNORED = frozenset(
    {"sharding", "out_sharding", "name", "accuracy", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "symbolic_zeros",
     "num_consts", "debug_info", "inline", "keep_unused", "ctx_mesh"}
)  # fmt: skip


class Form(NamedTuple):
    """What a value is computed by."""

    name: str
    params: tuple[Any, ...]
    inputs: tuple[Value, ...]


def uniform(value: Value) -> np.ndarray | None:
    """Returns the number that every element of a value is, as an array without axes; None where there is none."""
    if "uniform" not in value.memo:
        value.memo["uniform"] = _uniform(value)
    return value.memo["uniform"]


def _uniform(value: Value) -> np.ndarray | None:
    if value.const is not None:
        if is_traced(value) or not _is_number(value) or math.prod(value.shape) > LIMIT:
            return None
        array = np.asarray(value.const).astype(value.dtype)
        if array.size == 0 or (array.size > 1 and not (array == array.flat[0]).all()):
            return None
        return array.reshape(-1)[0].reshape(())
    if value.maker is None or not _is_number(value):
        return None
    if value.name in _SPREAD:
        return uniform(value.inputs[0])
    if value.name not in ELEMENTWISE:
        return None
    found = [number for each in value.inputs if (number := uniform(each)) is not None]
    if not found or len(found) < len(value.inputs):
        return None
    if value.name == "convert_element_type":
        return found[0].astype(value.dtype)
    if value.name == "select_n":
        return found[1 + int(found[0])]
    if value.name == "div" and value.dtype.kind == "f":
        with np.errstate(all="ignore"):
            return np.asarray(found[0] / found[1], value.dtype)
    if value.name in _NUMPY:
        with np.errstate(all="ignore"):
            return np.asarray(_NUMPY[value.name](*found), value.dtype)
    with jax.ensure_compile_time_eval():
        return np.asarray(bind(value.maker.eqn, [jax.numpy.asarray(each) for each in found])[0])


def _is_number(value: Value) -> bool:
    return isinstance(getattr(value.aval, "dtype", None), np.dtype)


def is_constant(value: Value) -> bool:
    """Returns whether no input has a say in a value, and its numbers can be known."""
    if "constant" not in value.memo:
        if value.maker is None:
            value.memo["constant"] = value.const is not None and not is_traced(value)
        else:
            maker = value.maker
            pure = not maker.eqn.effects and _is_number(value) and not maker.eqn.primitive.name.startswith("random_")
            value.memo["constant"] = pure and all(is_constant(each) for each in maker.inputs)
    return value.memo["constant"]


def constant(value: Value, limit: int = LIMIT) -> np.ndarray | None:
    """Returns the numbers of a value that no input has a say in; None for others, and beyond `limit` elements."""
    if not is_constant(value) or math.prod(value.shape) > limit or _largest(value) > limit:
        return None
    if "numbers" not in value.memo:
        with jax.ensure_compile_time_eval():
            value.memo["numbers"] = np.asarray(jax.jit(lambda: evaluate([value], {})[0])())
    return value.memo["numbers"]


def _largest(value: Value) -> int:
    """Elements of the largest value that it is computed from."""
    if "largest" not in value.memo:
        value.memo["largest"] = max([math.prod(value.shape), *(_largest(each) for each in value.inputs)])
    return value.memo["largest"]


def skip(value: Value) -> Value:
    """Returns the value beneath operations that change no bit of it."""
    while (beneath := _beneath(value)) is not None:
        value = beneath
    return value


def _beneath(value: Value) -> Value | None:
    name, inputs = value.name, value.inputs
    if name in ("copy", "copy_p", "convert_element_type", "reshape", "transpose", "broadcast_in_dim"):
        found = inputs[0]
        if name == "transpose" and tuple(value.maker.params["permutation"]) != tuple(range(len(value.shape))):  # type: ignore[union-attr]
            return None
    elif name == "max":
        found = next((b for a, b in (inputs, inputs[::-1]) if _is(uniform(a), -np.inf)), None)
    elif name in ("mul", "div"):
        pairs = ((inputs[1], inputs[0]), (inputs[0], inputs[1])) if name == "mul" else ((inputs[1], inputs[0]),)
        found = next((b for a, b in pairs if _is(uniform(a), 1)), None)
    elif name == "sub":
        zero = uniform(inputs[1])
        found = inputs[0] if _is(zero, 0) and not np.signbit(np.asarray(zero, np.float64)) else None
    elif name == "select_n":
        which = uniform(inputs[0])
        found = None if which is None else inputs[1 + int(which)]
    else:
        return None
    same = found is not None and found.shape == value.shape and found.dtype == value.dtype
    return found if same else None


def through(value: Value, names: tuple[str, ...]) -> Value:
    """Returns the value beneath operations of these names, and beneath those that change no bit."""
    value = skip(value)
    while value.name in names:
        value = skip(value.inputs[0])
    return value


def maximum_of(value: Value) -> Value | None:
    """Returns what a value is the largest of, along some axes, as a softmax subtracts it; None where it is none."""
    top = through(value, ("broadcast_in_dim", "reshape", "squeeze", "stop_gradient"))
    if top.name == "select_n":  # where(isfinite(max), max, 0)
        kept = (through(each, ("broadcast_in_dim", "stop_gradient")) for each in top.inputs[1:])
        top = next((each for each in kept if uniform(each) is None), top)
    return skip(top.inputs[0]) if top.name == "reduce_max" else None


def _is(number: np.ndarray | None, wanted: float) -> bool:
    return number is not None and number.dtype.kind != "b" and bool(number == wanted)


def unit_base(value: Value) -> Value:
    """Returns the value beneath reshapes that only add or drop axes of size one."""
    value = skip(value)
    while value.name in UNIT:
        beneath = skip(value.inputs[0])
        if [n for n in value.shape if n != 1] != [n for n in beneath.shape if n != 1]:
            break
        if value.name == "broadcast_in_dim":
            dims = value.maker.params["broadcast_dimensions"]  # type: ignore[union-attr]
            moved = [d for d, n in zip(dims, beneath.shape, strict=True) if n != 1]
            if moved != [i for i, n in enumerate(value.shape) if n != 1]:
                break
        value = beneath
    return value


def levels(value: Value, out: tuple[int, ...]) -> list[tuple[Value, tuple[int, ...]]]:
    """Returns a value that is broadcast to a shape, and those beneath its broadcasts and reshapes, outermost first.

    With each goes the axis of the shape at which each of its own axes that is larger than one ends.
    """
    value = skip(value)
    axes = tuple(range(len(out) - len(value.shape), len(out)))
    found = [(value, tuple(a for a, n in zip(axes, value.shape, strict=True) if n != 1))]
    while value.name in UNIT:
        beneath = skip(value.inputs[0])
        if value.name == "broadcast_in_dim":
            dims = value.maker.params["broadcast_dimensions"]  # type: ignore[union-attr]
            axes = tuple(axes[d] for d in dims)
        elif [n for n in value.shape if n != 1] == [n for n in beneath.shape if n != 1]:
            kept = iter(a for a, n in zip(axes, value.shape, strict=True) if n != 1)
            axes = tuple(next(kept) if n != 1 else -1 for n in beneath.shape)
        else:
            break
        value = beneath
        found.append((value, tuple(a for a, n in zip(axes, value.shape, strict=True) if n != 1)))
    return found


def form(value: Value) -> Form | None:
    """Returns what a value is computed by; None for inputs and constants."""
    value = skip(value)
    if value.maker is None:
        return None
    if "form" in value.memo:
        return value.memo["form"]
    base = unit_base(value)
    name, params, inputs = value.name, value.maker.params, tuple(value.inputs)
    output = next(i for i, each in enumerate(value.maker.outputs) if each is value)
    if base is not value:
        found = Form("unit", (value.shape,), (base,))
    elif (name == "integer_pow" and params["y"] == 2) or name == "square":
        found = Form("square", (), inputs)
    elif name == "mul" and skip(inputs[0]) is skip(inputs[1]):
        found = Form("square", (), inputs[:1])
    else:
        key = tuple(sorted((k, plain(v)) for k, v in params.items() if k not in _IGNORED))
        found = Form(name, (output, *key), inputs)
    value.memo["form"] = found
    return found


def plain(value: Any) -> Any:
    """Returns a parameter of an equation in a form that can be compared and hashed."""
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return tuple(plain(each) for each in value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, ClosedJaxpr) or hasattr(value, "eqns"):
        return str(value)
    if isinstance(value, (np.ndarray, jax.Array)):
        return (value.shape, str(value.dtype), np.asarray(value).tobytes())
    return repr(value) if isinstance(value, np.dtype) or not _hashable(value) else value


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def same_value(a: Value, b: Value, depth: int = 8) -> bool:
    """Returns whether two values are one, equal numbers, or computed alike in up to `depth` steps."""
    a, b = skip(a), skip(b)
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    left, right = uniform(a), uniform(b)
    if left is not None and right is not None:
        return bool(left == right)
    x, y = form(a), form(b)
    if x is None or y is None or x.name != y.name or x.params != y.params or len(x.inputs) != len(y.inputs):
        return False
    return depth > 0 and all(same_value(p, q, depth - 1) for p, q in zip(x.inputs, y.inputs, strict=True))
