"""`trustcore tune`: measures block sizes, implementations and program forms for a model's calls, or an op's.

What was found before is not measured again, so the same command goes on where it was stopped, by Ctrl-C, by the end of
`--minutes` or from outside: a result is written when its call is done, and of the call at hand what was measured.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Annotated, Any

import typer

from trustcore.cli import console, interrupts, options
from trustcore.cli.model import load_model
from trustcore.cli.step import next_token_step
from trustcore.errors import ModelError, TuningError

_STEPS = 100  # of a call, for the bar


class _OutOfTime(Exception):
    """The minutes are over."""


def tune(
    what: Annotated[str, typer.Argument(metavar="MODEL|OP", help="A model, an op, or a family of ops (attention).")],
    *,
    shapes: Annotated[
        list[str] | None,
        typer.Option(metavar="B=1,T=2048,N=8,H=64", help="A call of the op; may be given again."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows at a time, of a model.")] = 1,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row, of a model.")] = 512,
    train: Annotated[bool, typer.Option("--train", help="The calls of a gradient, too.")] = False,
    minutes: Annotated[float | None, typer.Option(min=0, help="Stop after so many; run again to go on.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Of timing each call; compiling comes to it.")] = 4.0,
    most: Annotated[int, typer.Option(min=1, help="Candidates of a call that are compiled.")] = 12,
    again: Annotated[bool, typer.Option("--again", help="Measure what is known, too.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Only say what would be taken and why.")] = False,
    dtype: options.Dtype = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure what is fastest on this machine, and keep it for the modes that read it (see docs/tuning.md)."""
    state = _State()
    try:
        _tune(what, shapes, batch, length, train, minutes, seconds, most, again, show, dtype, as_json, state)
    except KeyboardInterrupt:
        console.err().print(f"trustcore: {state.stopped()}", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None


def _tune(
    what: str, shapes: list[str] | None, batch: int, length: int, train: bool, minutes: float | None, seconds: float,
    most: int, again: bool, show: bool, dtype: options.FloatType | None, as_json: bool, state: _State,
) -> None:  # fmt: skip
    from trustcore.tune import best

    began = time.monotonic()
    work = _work(what, shapes or [], batch, length, train, dtype)
    if show:
        choices = [best(op, facts) for op, facts, _ in work]
        told = [{"op": c.op, "facts": dict(c.facts), "values": dict(c.values), "why": c.why} for c in choices]
        _print(json.dumps(told, indent=2) if as_json else "\n".join(map(str, choices)))
        return
    deadline = None if minutes is None else began + 60 * minutes
    in_time = _tuned(work, deadline, seconds, most, again, state, quiet=as_json)
    found, known, failed = state.found, state.known, state.failed
    left = len(work) - len(found) - known - len(failed)
    if failed and not found and not known:
        raise TuningError(failed[0][1])
    if as_json:
        results = [vars(result.entry) for result in found]
        print(json.dumps({"tuned": results, "known": known, "failed": dict(failed), "left": left}, indent=2))
        return
    end = f"{len(found)} tuned, {known} known before, {len(failed)} failed, {left} left"
    _print(end if in_time else f"{end}; out of time: the same command goes on from there")


@dataclasses.dataclass
class _State:
    """What came of a command so far: results, calls that were known or failed (and why), the call at hand."""

    found: list[Any] = dataclasses.field(default_factory=list)
    known: int = 0
    failed: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    current: tuple[str, Any] | None = None

    def stopped(self) -> str:
        """One line that says what is kept."""
        kept = [f"{len(self.found)} call{'s' * (len(self.found) > 1)} tuned and kept"] if self.found else []
        kept += [f"{self.known} known before"] if self.known else []
        if self.current is not None:
            from trustcore.tune import declared, this_device
            from trustcore.tune.choosing import text_of
            from trustcore.tune.unfinished import measured

            op, facts = self.current
            count = measured(this_device(), declared(op), facts)
            kept += (
                [f"of {op} {text_of(facts)} {count} candidate{'s' * (count > 1)} measured and kept"] if count else []
            )
        if not kept:
            return "stopped before anything was measured; nothing is lost"
        return f"stopped: {', '.join(kept)}; the same command goes on from there"


def _work(
    what: str, shapes: list[str], batch: int, length: int, train: bool, dtype: options.FloatType | None
) -> list[tuple[str, Any, Any]]:
    """Op, facts, and operands (None: random ones) of each call."""
    from trustcore.tune.choosing import facts_of
    from trustcore.tune.registry import members

    declared = members(what)
    if declared and not shapes:
        raise typer.BadParameter(f"{what} is an op: say of which calls, as B=1,T=64,N=8,H=64", param_hint="'--shapes'")
    if declared:
        return [(t.op, facts_of(t, (text,), {}), None) for text in shapes for t in declared]
    if shapes:
        raise typer.BadParameter(f"{what} is no op that can be tuned; a model's calls are its own: leave --shapes out")
    return _calls(what, load_model(what, dtype), batch, length, train)


def _calls(name: str, model: Any, batch: int, length: int, train: bool) -> list[tuple[str, Any, Any]]:
    """The calls of a language model: reading `length` tokens, writing one, and with `train` a gradient."""
    import jax
    import jax.numpy as jnp

    from trustcore.models.layer_form import OP
    from trustcore.quant import QuantizedArray
    from trustcore.tune import calls_of

    step, tokens = next_token_step(name, model, batch, length, train=train)  # refuses what is no language model
    one = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    cache = model.new_cache(batch, length)
    calls = calls_of(lambda m, t: m.hidden_states(t)[0], model, tokens)
    calls += calls_of(lambda m, t, c: m(t, cache=c), model, one, cache)
    calls += calls_of(step, model, tokens) if train else []
    weights = {}
    steps = ("token", "forward", *(("gradient",) if train else ()))
    layers = [(OP, known, (model,)) for s in steps if (known := _layers(model, s, batch, length)) is not None]
    for leaf in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, QuantizedArray)):
        if isinstance(leaf, QuantizedArray) and leaf.ndim == 2:
            for w in (leaf, leaf.T):
                weights.setdefault((w.description, *w.shape, w.transposed, "order" in w.fields), w)
    work: list[tuple[str, Any, Any]] = []
    for op, facts in calls:
        if (op, facts) in [(other, known) for other, known, _ in work]:
            continue
        operands = None
        if op == "packed_product":  # the model's own weight: nothing need be encoded
            w = weights.get((facts["format"], facts["K"], facts["N"], facts["transposed"], facts["order"]))
            operands = None if w is None else (jax.random.normal(jax.random.key(0), (facts["R"], facts["K"])), w)
        work.append((op, facts, operands))
    work += layers
    if not work:
        raise ModelError(f"{name}: none of its calls can be tuned here: its products are of floats, as XLA does them.")
    return work


def _layers(model: Any, step: str, batch: int, length: int) -> Any:
    """The facts of the forms of its layers; None where there is nothing to choose."""
    from trustcore.models.layer_form import LAYERS

    return LAYERS.facts(model, step=step, batch=batch, length=length)


def _tuned(
    work: list[tuple[str, Any, Any]], deadline: float | None, seconds: float, most: int, again: bool, state: _State,
    *, quiet: bool,
) -> bool:  # fmt: skip
    """Whether all was done in time; what came of it is in the state."""
    from trustcore.tune import best, search
    from trustcore.tune.choosing import text_of

    def check() -> None:
        interrupts.check()
        if deadline is not None and time.monotonic() >= deadline:
            raise _OutOfTime

    with console.progress_bar("steps") as report:
        for place, (op, facts, operands) in enumerate(work):
            if not again and best(op, facts).source == "cache":
                state.known += 1
                continue
            state.current = op, facts

            def step(what: str, done: int, total: int, place: int = place) -> None:
                report("tuning", place * _STEPS + _STEPS * done // total, len(work) * _STEPS)

            try:
                check()
                result = search(
                    op, dict(facts), seconds=seconds, most=most, operands=operands, progress=step, check=check
                )
            except _OutOfTime:
                return False
            except TuningError as error:
                state.failed.append((f"{op} {text_of(facts)}", str(error)))
                console.err().print(f"not tuned: {error}", markup=False, soft_wrap=True)
                continue
            state.found.append(result)
            state.current = None
            if not quiet:
                _print(str(result))
    return True


def _print(text: str) -> None:
    console.out().print(text, soft_wrap=True, markup=False)
