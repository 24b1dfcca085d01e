"""`inspect`: the same function, and a report of what went through it.

    fn -> trace -> program -> observe(StatisticsTap) -> one jit: outputs of fn, words of every watched value
                                                     -> Report (the words come to the host when it is read)

The program that runs is the function's own with statistics as further outputs; tensors stay on the device. It is traced
and compiled once for each kind of arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from trustcore.debug.report import Report
from trustcore.debug.snapshot import Breakpoint, snapshot_at
from trustcore.debug.statistics import Statistics
from trustcore.debug.tap import StatisticsTap, is_float
from trustcore.debug.watch import Watch, watches
from trustcore.errors import DebugError
from trustcore.graph import observe, trace
from trustcore.graph.modules import Traced, split_arguments

Baseline = Mapping[str, Mapping[str, Any]]


def inspect(
    fn: Callable[..., Any],
    watch: str | Watch | Iterable[str | Watch] | None = "*",
    *,
    trace: bool | str = False,
    baseline: Baseline | Report | None = None,
    limit: int = 100,
) -> Any:
    """Returns a function with the same outputs that keeps a `Report` of each call.

        step = inspect(train_step)
        model, loss = step(model, batch)
        print(step.report)

    Args:
        fn: a function of pytrees, pure but for what it changes of nnx variables among its arguments; under any of JAX's
            transformations or none. Leaves that are arrays or floats are its inputs; a call with another int, string or
            None is traced anew.
        watch: what is measured: globs over addresses (see `trustcore.graph.Address.matches`) or `Watch`es. None or
            empty, and no `trace`: `fn` itself comes back.
        trace: whether the report lists the operations that ran and keeps the arguments, to replay them; "times": with
            the seconds each took, for which the function runs equation by equation.
        baseline: a `Report` of a usual call, or what its `baseline()` gave: values far from it are issues.
        limit: issues and operations that are kept at most.

    The result is an `Inspected`. It can be called in threads, but not inside jit or another transformation: it reads
    what comes out. Inspect the transformed function instead: `inspect(jax.grad(loss))`.

    Raises:
        DebugError: `watch` holds something that is none. When called: a pattern fits nothing, an argument was donated
            and is gone, the call is being traced.
        Breakpoint: when called, and a watch with `stop=True` was hit.
    """
    chosen = watches(watch)
    if not chosen and not trace:
        return fn
    if trace not in (False, True, "times"):
        raise DebugError(f"inspect: trace={trace!r} is none of False, True, 'times'.")
    slow = [w for w in chosen if w.condition is not None and w.condition.seconds is not None]
    if slow and trace != "times":
        raise DebugError(f'inspect: {slow[0]} needs the operations\' times; pass trace="times".')
    usual = baseline.baseline() if isinstance(baseline, Report) else baseline
    return Inspected(fn, chosen, trace=trace, baseline=usual, limit=limit)


class _Prepared(NamedTuple):
    traced: Traced
    tap: StatisticsTap
    run: Callable[..., Any]


class Inspected:
    """A function that keeps a report of its calls; see `inspect`.

    Attributes:
        report: of the last call that ended; None before.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        chosen: Sequence[Watch],
        *,
        trace: bool | str,
        baseline: Baseline | None,
        limit: int,
    ):
        self.fn, self.watches, self.trace, self.baseline, self.limit = fn, tuple(chosen), trace, baseline, limit
        self.report: Report | None = None
        self._prepared: dict[Any, _Prepared] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the function returns, and keeps the report."""
        return self.run(*args, **kwargs)[0]

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, Report]:
        """Returns what the function returns, and the report of this call."""
        leaves, names, fixed = split_arguments(args, kwargs)
        check_arguments(leaves, names)
        ready = self.prepare(leaves, args, kwargs, fixed)
        times = None
        if self.trace == "times":
            from trustcore.debug.stepping import timed

            times = timed(ready.traced.program, leaves, self.limit, self.watches)
        outputs, measured = ready.run(*leaves)
        report = Report(
            ready.traced, ready.tap, measured, baseline=self.baseline, limit=self.limit, watches=self.watches,
            times=times, leaves=leaves if self.trace else None,
        )  # fmt: skip
        self.report = report
        hit = report.first_stop()
        if hit is not None:
            watch, place = hit
            snapshot = snapshot_at(ready.traced.program, leaves, place.node, place.turns, place.shard)
            raise Breakpoint(str(watch), snapshot, report)
        return ready.traced.finish(outputs, args, kwargs), report

    def prepare(self, leaves: list[Any], args: tuple, kwargs: dict[str, Any], fixed: Any) -> _Prepared:
        """Returns the program for arguments of this kind, traced once."""
        kinds = tuple((np.shape(x), jnp.result_type(x), getattr(x, "weak_type", False), _mesh(x)) for x in leaves)
        try:
            key = (fixed, kinds)
            hash(key)
        except TypeError:
            key = (repr(fixed), kinds)
        if key not in self._prepared:
            traced = trace(self.fn, args, kwargs)
            native = _one_cpu(leaves)
            tap = StatisticsTap(traced.program, [_of_values(w) for w in self.watches], native=native)
            unused = [
                str(w) for w in self.watches
                if not any(node.address.matches(w.pattern) for node in traced.program.nodes if not node.bodies)
                and not any(_matches(name, w.pattern) for name in traced.program.arguments)
            ]  # fmt: skip
            if unused:
                close = sorted({node.address.name for node in traced.program.nodes if not node.bodies})[:5]
                raise DebugError(
                    f"watch: {unused[0]!r} fits none of the {len(traced.program.nodes)} equations; addresses look like "
                    f"{', '.join(close)}"
                )
            self._prepared[key] = _Prepared(traced, tap, jax.jit(_measuring(traced, tap)))
        return self._prepared[key]


def check_arguments(leaves: Sequence[Any], names: Sequence[str]) -> None:
    """Raises DebugError for arguments that are gone, or that are no arrays yet."""
    for leaf, name in zip(leaves, names, strict=True):
        if isinstance(leaf, Tracer):
            raise DebugError(
                f"inspect: {name} is being traced, so nothing can be read of it. Inspect the transformed function from "
                "outside: inspect(jax.jit(f)) or inspect(jax.grad(f)), not jax.jit(inspect(f))."
            )
    gone = [n for leaf, n in zip(leaves, names, strict=True) if isinstance(leaf, jax.Array) and leaf.is_deleted()]
    if gone:
        raise DebugError(
            f"{', '.join(gone[:5])}{f' and {len(gone) - 5} more' if len(gone) > 5 else ''}: deleted; it was donated to "
            "an earlier call (donate_argnums), which put its result into the same memory. Use what that call returned, "
            "or do not donate it."
        )


def _measuring(traced: Traced, tap: StatisticsTap) -> Callable[..., Any]:
    program = traced.program
    everything = any(watch.pattern == "*" for watch in tap.watches)

    def run(*leaves: Any) -> Any:
        values = [jnp.asarray(leaf) for leaf in leaves]
        outputs, sheets = observe(program, values, tap)
        arguments = [
            tap.words(x) if is_float(x) and (everything or any(_matches(n, w.pattern) for w in tap.watches)) else None
            for x, n in zip(values, program.arguments, strict=True)
        ]
        results = [tap.words(jnp.asarray(x)) if is_float(jnp.asarray(x)) else None for x in outputs]
        return outputs, (sheets, arguments, results)

    return run


def _of_values(watch: Watch) -> Watch:
    """The watch as far as it can be told from values: without a condition on time."""
    timed = watch.condition is not None and watch.condition.seconds is not None
    return Watch(watch.pattern) if timed else watch


def _matches(name: str, pattern: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(name, pattern)


def _mesh(x: Any) -> Any:
    return x.sharding if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1 else None


def _one_cpu(leaves: Sequence[Any]) -> bool:
    """Whether everything runs on one CPU device, where the handler in C++ can be called."""
    devices = {device for x in leaves if isinstance(x, jax.Array) for device in x.sharding.device_set}
    if not devices:
        return jax.default_backend() == "cpu" and jax.device_count() == 1
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def measured_statistics(words: Sequence[Any], avals: Sequence[Any]) -> list[Statistics | None]:
    """Returns the statistics that words tell of arrays of these types; None where there are no words."""
    return [
        None if w is None else Statistics.from_words(np.asarray(w), aval.shape, aval.dtype)
        for w, aval in zip(words, avals, strict=True)
    ]


__all__ = ["Inspected", "inspect"]
