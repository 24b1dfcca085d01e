"""Which implementation of an op runs, and why no other does.

An op has implementations in the order in which they are preferred. Each says by a pure function of shapes, dtypes and
the target (platform and architecture) why it cannot compute a call; no reason means that it can. The first that can is
taken where no name is given; one that was asked for by name is taken or raises its reason, and nothing stands in.

The platform is known when a program is lowered, not when it is traced, and one program may be lowered for several at
once. So each direction of an op is a primitive of its own with a lowering rule for cpu, cuda, rocm, tpu and one for all
others. (`jax.lax.platform_dependent` would need none, but lowers every branch for each platform of a program: for cpu
and cuda together a Pallas branch then fails on cpu.) Under `vmap` the mapped axis becomes a part of the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching

from kernels_pallas import _compat, sharded, tuning

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
ANY_CHIP = "any chip"


class ImplementationError(ValueError):
    """An implementation that was asked for by name cannot compute this call."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is lowered for: one of `PLATFORMS` or another name, and the chip where it is known.

    `architecture` is a compute capability ("9.0") for cuda, a name ("gfx942") for rocm, a kind ("TPU v5e") for tpu.
    """

    platform: str
    architecture: str | None = None

    @property
    def capability(self) -> float | None:
        """The compute capability as a number; None where it is not known."""
        try:
            return float(self.architecture or "")
        except ValueError:
            return None

    def __str__(self) -> str:
        return self.platform + (f" {self.architecture}" if self.architecture else "")


OLDEST = 8.0  # compute capability: products of bfloat16 want Ampere


def no_triton(target: Target) -> str:
    """Returns why Pallas-Triton runs nothing there; "" where it runs."""
    if target.platform not in ("cuda", "rocm"):
        return f"it runs on cuda and rocm, not on {target.platform}."
    if target.platform == "cuda" and target.capability is not None and target.capability < OLDEST:
        return f"it needs compute capability {OLDEST} and the chip has {target.capability}."
    if target.architecture is None and _compat.TRITON_NEEDS_A_CHIP:
        return "the chip is not known; lower under kernels_pallas.abstract_device(kind, platform)."
    return ""


def no_mosaic_tpu(target: Target) -> str:
    """Returns why Pallas-Mosaic for TPUs runs nothing there; "" where it runs."""
    return "" if target.platform == "tpu" else f"it runs on tpu, not on {target.platform}."


def no_sizes(sizes: Sequence[Any]) -> str:
    """Returns why a kernel cannot have these sizes of axes; "" where it can."""
    if not all(isinstance(n, int) for n in sizes):
        return "shapes are symbolic, and it needs numbers."
    return "an axis is empty." if min(sizes) == 0 else ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one implementation: taken, able but not first, or refused for a reason."""

    implementation: str
    taken: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation}: {'taken' if self.taken else self.reason}"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The verdicts on all implementations of a call, in the order of preference."""

    op: str
    call: str
    target: Target
    verdicts: tuple[Verdict, ...]

    @property
    def taken(self) -> str:
        """The name of the implementation that runs."""
        return next(v.implementation for v in self.verdicts if v.taken)

    def __str__(self) -> str:
        return "\n".join([f"{self.op} {self.call} on {self.target}", *(f"  {v}" for v in self.verdicts)])


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Args:
        name: by which it is asked for.
        refusal: of a target and a call, "" or why it cannot compute the call there.
        directions: what it computes ("forward", "backward"), each a function of target and call.
        home: the platform it is made for; None: any.
        interpreter: whether one stands in for its home.
        reserve: of a target and a call, why it is taken only where it is asked for by name; "" where it need not be.
    """

    name: str
    refusal: Callable[[Target, Any], str]
    directions: Mapping[str, Callable[..., Any]]
    home: str | None = None
    interpreter: bool = True
    reserve: Callable[[Target, Any], str] = lambda target, call: ""


@dataclasses.dataclass(frozen=True)
class Op:
    """An op's name and its implementations, the preferred ones first; the last can compute every call.

    `asks` gives, of a direction and a call, the name and the facts under which tuned values are asked for; None: it has
    one implementation, and nothing to ask.
    """

    name: str
    implementations: tuple[Implementation, ...]
    asks: Callable[[str, Any], tuple[str, tuning.Facts | None]] | None = None

    def named(self, name: str) -> Implementation:
        """Returns the implementation of that name.

        Raises:
            ImplementationError: there is none.
        """
        for implementation in self.implementations:
            if implementation.name == name:
                return implementation
        known = ", ".join(i.name for i in self.implementations)
        raise ImplementationError(
            f"{self.name}: implementation {name!r} is not known; choose of {known}, or pass None."
        )

    def interpreted(self, name: str | None) -> Target:
        """Returns the target that the interpreter of the named implementation stands in for.

        Raises:
            ImplementationError: it has none, or none is named.
        """
        chosen = self.named(name) if name is not None else None
        if chosen is None or chosen.home is None or not chosen.interpreter:
            able = ", ".join(i.name for i in self.implementations if i.home and i.interpreter)
            raise ImplementationError(f"{self.name}: interpret=True needs one of {able}, and {name!r} was given.")
        return Target(chosen.home, ANY_CHIP)

    def choose(self, target: Target, call: Any, name: str | None = None) -> Implementation:
        """Returns the implementation of that name, or for None the first that can compute the call.

        Raises:
            ImplementationError: the named one cannot; the message says why.
        """
        if name is None:
            able = (i for i in self.implementations if not i.refusal(target, call))
            return next(i for i in able if not i.reserve(target, call))
        implementation = self.named(name)
        reason = implementation.refusal(target, call)
        if reason:
            raise ImplementationError(f"{self.name}: {name!r} cannot compute {call} on {target}: {reason}")
        return implementation

    def check(self, call: Any, name: str | None, interpret: bool) -> None:
        """Refuses at once what was asked for by name and can be computed nowhere.

        Raises:
            ImplementationError: the named implementation is not known, cannot compute the call wherever it is lowered,
                or has no interpreter.
        """
        if interpret:
            target = self.interpreted(name)
            self.choose(target, call, name)
        elif name is not None and (home := self.named(name).home) is not None:
            self.choose(Target(home, ANY_CHIP), call, name)

    def tuned(self, target: Target, call: Any, direction: str) -> str | None:
        """Returns the implementation that was found to be the fastest for a call and can compute it, or None."""
        if self.asks is None or tuning.CHOOSER.value is None:
            return None
        name, facts = self.asks(direction, call)
        found = tuning.values(name, target, lambda: facts).get("implementation")
        able = any(i.name == found and not i.refusal(target, call) for i in self.implementations)
        return found if able else None

    def explain(self, target: Target, call: Any) -> Explanation:
        """Returns what becomes of every implementation."""
        verdicts: list[Verdict] = []
        for implementation in self.implementations:
            reason = implementation.refusal(target, call)
            if not reason and (reserve := implementation.reserve(target, call)):
                reason = f"able; {reserve}"
            first = next((v.implementation for v in verdicts if v.taken), None)
            taken = not reason and first is None
            verdicts.append(Verdict(implementation.name, taken, reason or ("" if taken else f"able; {first} is first")))
        return Explanation(self.name, str(call), target, tuple(verdicts))


def primitive(
    op: Op,
    direction: str,
    call: Callable[..., Any],
    shapes: Callable[[Any], Sequence[jax.ShapeDtypeStruct]],
    fold: Callable[..., Any],
) -> core.Primitive:
    """Returns a primitive that computes one direction of an op on every platform.

    Its parameters are `implementation` (a name or None), `interpret`, and those of the op.

    Args:
        op: of which it is a direction.
        direction: a key of the implementations' `directions`.
        call: of operands or their types, and the op's parameters: what `refusal` and `directions` take.
        shapes: of such a call, the results' types.
        fold: the batching rule, of the primitive, operands, their mapped axes and the parameters.
    """
    made = core.Primitive(f"{op.name}_{direction}")
    made.multiple_results = True

    def abstract(*avals: Any, **params: Any) -> Any:
        params = {k: v for k, v in params.items() if k not in ("implementation", "interpret")}
        sharded.refuse(op.name, avals)
        return [_compat.shaped(s.shape, s.dtype, avals) for s in shapes(call(*avals, **params))]

    def run(
        platform: str | None, *arrays: Any, implementation: str | None, interpret: bool, **params: Any
    ) -> Sequence[jax.Array]:
        platform = platform or "other"
        target, made_of = Target(platform, _compat.device_kind(platform)), call(*arrays, **params)
        if interpret:
            target = op.interpreted(implementation)
        chosen = op.choose(target, made_of, implementation or op.tuned(target, made_of, direction))
        return chosen.directions[direction](target, made_of, interpret)

    @functools.lru_cache(maxsize=256)
    def compiled(params: tuple[tuple[str, Any], ...]) -> Any:
        return jax.jit(functools.partial(made.bind, **dict(params)))

    def at_once(*arrays: Any, **params: Any) -> Any:
        if op.asks is not None and tuning.CHOOSER.value is not None and not params["interpret"]:
            static = {k: v for k, v in params.items() if k not in ("implementation", "interpret")}
            name, facts = op.asks(direction, call(*arrays, **static))
            platform = _compat.default_platform()
            tuning.before(name, Target(platform, _compat.device_kind(platform)), lambda: facts)
        return compiled(tuple(sorted(params.items())))(*arrays)

    made.def_impl(at_once)
    made.def_abstract_eval(abstract)
    for platform in (*PLATFORMS, None):
        _compat.register_lowering(made, run, platform)

    def derivative(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"{made.name} has no derivative of its own: kernels are differentiated once, in reverse. For more, write "
            f"the op's oracle, plain jax: {op.name}_oracle."
        )

    ad.primitive_jvps[made] = derivative
    batching.primitive_batchers[made] = functools.partial(fold, made)
    return made
