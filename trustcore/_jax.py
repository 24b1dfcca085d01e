"""Every difference between the jax releases that trustcore supports (0.10.2 to the newest), in one place."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

JAX_VERSION: tuple[int, ...] = tuple(int(part) for part in jax.__version__.split(".")[:3] if part.isdigit())

# Rows of codes that one step of the streaming product takes on the CPU. XLA's CPU compiler changed between these
# releases: on 0.12, four rows a step run at 13.9 G weights/s and one at 6 to 9; on 0.10.2, four run at 1.2 and one at 7
# (K=2048, N=8192, two cores of an AVX2 machine, 2026-11).
STREAM_UNROLL: int = 4 if JAX_VERSION >= (0, 12) else 1

# Rows of x up to which streaming integers beats decoding tiles into a dot on the CPU, in the same setting (int4 and
# int8 under scales of any granularity): on 0.12, four rows stream at 5.4 to 5.9 G weights/s and tile at 4.5 to 5.0; on
# 0.10.2, two at 5.8 to 7.5 against 4.3 to 4.4, and three no faster.
STREAM_ROWS: int = 4 if JAX_VERSION >= (0, 12) else 2


def computed_once(x: jax.Array) -> jax.Array:
    """Returns x `[..., rows, N]`, stored before it is used, so that XLA does not compute it anew in each of its users.

    A barrier says so, and jax 0.12 keeps it until after fusion. In jax 0.10 the CPU compiler drops barriers before it
    fuses; a loop of two turns that copies x it does not see through. The value, and its derivative, are those of x.
    """
    rows = x.shape[-2]
    if JAX_VERSION >= (0, 12) or jax.default_backend() != "cpu" or rows % 2:
        return jax.lax.optimization_barrier(x)
    axis, half = x.ndim - 2, rows // 2

    def copy(i: jax.Array, copied: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(x, i * half, half, axis)
        return jax.lax.dynamic_update_slice_in_dim(copied, part, i * half, axis)

    return jax.lax.fori_loop(0, 2, copy, jax.lax.full_like(x, 0))


def program_count(jitted: Any) -> int:
    """Returns how many programs a jitted function holds. JAX gives the number to nobody but its own tests."""
    return jitted._cache_size()


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Returns how many inputs of a scan equation are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax 0.12 keeps them as trees
    return len(consts.vals), len(carry.vals)


class Frame(NamedTuple):
    """A place in a source file."""

    file: str
    line: int
    column: int
    function: str


def frames(eqn: Any) -> tuple[Frame, ...]:
    """Returns where an equation was written, innermost call first, without the frames of jax itself.

    Empty where jax keeps none, as within the library functions that it traces once for all callers. An equation that
    differentiation made has the frames of the one it was made from.
    """
    from jax._src import source_info_util

    found = source_info_util.user_frames(eqn.source_info.traceback)
    return tuple(Frame(f.file_name, f.start_line, f.start_column, f.function_name) for f in found)


def scopes(eqn: Any) -> tuple[tuple[str, bool], ...]:
    """Returns the name stack of an equation, outermost first: each name, and whether it is that of a transformation.

    It is relative to the equation that the program around belongs to.
    """
    stack = eqn.source_info.name_stack.stack
    return tuple((entry.name, type(entry).__name__ == "Transform") for entry in stack)


@functools.cache
def _fresh_context() -> Any:
    return jax.make_user_context(default_value=None)


def tracing_anew(key: str) -> Any:
    """Returns a context in which nothing that was traced outside of it is found in jax's caches."""
    return _fresh_context()(key)


def shard_mapped(eqn: Any, body: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """Returns `body` under the mesh, axes and input specs of a `shard_map` equation."""
    params = eqn.params
    axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=out_specs,
        axis_names=axes,
        check_vma=params["check_vma"],
    )


def manual_axes(eqn: Any) -> tuple[Any, ...]:
    """Returns the mesh axes that a `shard_map` equation makes manual, in the order of the mesh."""
    params = eqn.params
    axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    return tuple(name for name in params["mesh"].axis_names if name in axes)


def varying(value: Any) -> frozenset:
    """Returns the manual mesh axes along which a value (or its type) may differ from device to device."""
    kind = value.aval if hasattr(value, "aval") else value
    return frozenset(
        getattr(getattr(kind, "manual_axis_type", None), "varying", None) or getattr(kind, "vma", None) or ()
    )


def varying_like(value: Any, axes: frozenset) -> Any:
    """Returns the same value, typed as one that may differ along these manual mesh axes."""
    missing = tuple(axes - varying(value))
    return jax.lax.pcast(value, missing, to="varying") if missing else value


def used_inputs(jaxpr: Any) -> list[bool]:
    """Returns for each input of a program whether its results depend on it; jax drops the others when it compiles."""
    from jax.interpreters import partial_eval

    return list(partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))[1])


def replace_bodies(eqn: Any, jaxprs: Sequence[Any]) -> dict[str, Any]:
    """Returns the parameters of a `cond` or checkpoint equation with other programs in it."""
    params = dict(eqn.params)
    if eqn.primitive.name == "cond":
        params["branches"] = tuple(jaxprs)
    else:
        (closed,) = jaxprs
        params["jaxpr"] = closed.jaxpr
    return params


def key_implementation(dtype: Any) -> str:
    """Returns the name of the generator that a dtype of random keys belongs to."""
    return dtype._impl.name


class Call(NamedTuple):
    """A call of a jitted function that had to be traced or compiled."""

    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    static_argnums: tuple[int, ...]
    static_argnames: tuple[str, ...]
    caller: Frame | None


def jit_call_in_progress() -> Call | None:
    """Returns the innermost call of a jitted function above this one on the stack; None where there is none.

    It is read off the stack: jax tells its listeners when it compiles, but not for which arguments.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        info = frame.f_locals.get("jit_info") if frame.f_code.co_name == "cache_miss" else None
        if info is not None and frame.f_code.co_filename.endswith("pjit.py"):
            names = frame.f_locals
            nums = tuple(getattr(info, "static_argnums", None) or ())
            argnames = tuple(getattr(info, "static_argnames", None) or ())
            return Call(names["fun"], names["args"], names["kwargs"], nums, argnames, _caller(frame))
        frame = frame.f_back
    return None


def _caller(frame: Any) -> Frame | None:
    own = os.path.dirname(jax.__file__)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(own):
            return Frame(file, frame.f_lineno, 0, frame.f_code.co_name)
        frame = frame.f_back
    return None


@contextlib.contextmanager
def compiled_with_lines() -> Iterator[None]:
    """In this block a program that is taken from the cache of compiled ones has the source lines that it has now.

    Elsewhere programs that differ in their lines alone share an entry, with the lines of the one that came first.
    """
    name = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def written_like(eqns: Sequence[Any]) -> Any:
    """Returns a context in which equations get the name scopes of `eqns`, outermost first, and the line of the last."""
    from jax._src import source_info_util

    stack = source_info_util.current_name_stack()
    for eqn in eqns:
        stack = stack + eqn.source_info.name_stack
    return source_info_util.user_context(eqns[-1].source_info.traceback, name_stack=stack)


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """In this block programs are compiled, and neither taken from the cache of compiled ones nor put into it."""
    from jax.experimental.compilation_cache import compilation_cache

    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    compilation_cache.reset_cache()  # whether there is one is asked once
    try:
        yield
    finally:
        jax.config.update(name, before)
        compilation_cache.reset_cache()
