"""The loop that makes tokens: prompts go in by chunks, answers come out several tokens a dispatch.

    prompts -> prefill (one program a chunk length) -> first token -> decode (one program, up to DISPATCH tokens) -> ...

A model is a `Writer`: what it keeps between tokens (a cache, a state, what its encoder has read) is its own affair.
State lives on the device: what the model keeps, the last token, which rows are done, the penalties' history. The host
only reads tokens. State is donated to every program and grows in place. Random numbers come from (seed, row, step)
alone, so a text does not depend on how its tokens were dispatched. Programs are compiled for (batch, slots, plan);
slots are rounded so that few are needed, and JAX's persistent cache keeps them between processes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Generator, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trustcore._jax import program_count
from trustcore.dtypes import named_dtype
from trustcore.errors import GenerationError
from trustcore.generation.programs import keep_programs
from trustcore.generation.sampling import History, Plan, Sampling, Values, sample
from trustcore.heap import trim_heap
from trustcore.memory import Pool
from trustcore.models.writing import Writer

CHUNKS = (16, 32, 64, 128, 256, 512)  # prompt tokens a program takes; longer prompts go in several
DISPATCH = 32  # tokens a decode program can make before the host looks
SLOTS = 1024  # of all rows, at least: most requests then share their programs, which cost more memory than slots
PAUSE = 0.1  # seconds a dispatch should last: text still arrives smoothly, and Python has its share seldom


class Form:
    """The structure of a model without its arrays: static, hashed once, the same object for models of one structure.

    A call of a program flattens its arguments. For a module that is Python work on every layer, milliseconds for each
    dispatch; the programs here therefore take a model's arrays and its form.
    """

    def __init__(self, structure: Any):
        self._structure = structure

    @staticmethod
    def of(model: Any) -> tuple[list[Any], Form]:
        """Returns the arrays of a model, and its form."""
        arrays, structure = jax.tree.flatten(model)
        return arrays, _form(structure)

    def fill(self, arrays: list[Any]) -> Any:
        """Returns the model of this form that has these arrays."""
        return jax.tree.unflatten(self._structure, arrays)


_form = functools.lru_cache(maxsize=16)(Form)


class State(NamedTuple):
    """What a decode program carries from token to token.

    Attributes:
        kept: by the model of what it has seen, `token` not among it yet.
        token: int32 `[B]`, the last token of each row.
        done: bool `[B]`, rows that have ended.
        step: int32, tokens made so far.
        key: of the random numbers.
        history: of the penalties.
    """

    kept: Any
    token: jax.Array
    done: jax.Array
    step: jax.Array
    key: jax.Array
    history: History


class Step(NamedTuple):
    """What a dispatch brought: int32 `[B, n]` tokens; -1 where a row had ended. `prefill` marks the first."""

    tokens: np.ndarray
    prefill: bool = False


def generate_tokens(
    model: Any,
    prompts: Sequence[Any],
    *,
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    stop_ids: Iterable[int] = (),
    seed: int = 0,
    context: int | None = None,
    cache_dtype: Any = None,
    first: Sequence[Any] | None = None,
    only: Sequence[int] | None = None,
    pool: Pool | None = None,
) -> Generator[Step, np.ndarray | None, None]:
    """Yields the tokens that follow the prompts, a few at a time, the first one as soon as it is there.

    Args:
        model: as `trustcore.load` returns it.
        prompts: token ids, one list a row; lengths may differ. An encoder-decoder's encoder reads them, and what is
            yielded is what its decoder writes. For Whisper: sounds, mono, 16000 samples a second, or log-mel frames.
        max_tokens: for each row, at most.
        sampling: how tokens are chosen; None is greedy.
        stop_ids: tokens that end a row; they are yielded too.
        seed: of the random numbers; row b of a batch draws from (seed, b).
        context: tokens a row may have in all, prompt included (of an encoder-decoder: those that its decoder writes);
            None: what the model was made for.
        cache_dtype: float32, bfloat16 or int8; None: float32 on CPUs, bfloat16 elsewhere. Encoder-decoders and state
            spaces have no choice.
        first: tokens that an encoder-decoder's decoder begins with, the same for all rows, or a list for each; None:
            what the checkpoint says. They are not yielded.
        only: tokens of which each that is made is one; None: all.
        pool: where the cache's buffers come from, and where they go when the generator ends or is closed; None: they
            are allocated and freed. A pool may serve several requests, in threads as well.

    Tokens that the checkpoint forbids (`model.writing`) are not made.

    Send a bool array `[B]` into the generator to end rows from outside.

    Raises:
        GenerationError: the model writes no tokens; a prompt is empty, too long or has a token outside the vocabulary;
            an option is out of range.
        ModelError: a prompt is no sound.
    """
    keep_programs()
    sampling = sampling or Sampling()
    limit = _check(model, prompts, max_tokens, context)
    given = model.encoder_input(prompts)
    source, mask = given or (None, None)
    if given is not None:
        prompts = _beginnings(model, first, len(prompts), limit)
    elif first is not None:
        raise GenerationError("first is for encoder-decoders; what this model begins with is its prompt.")
    max_tokens = min(max_tokens, limit - max(len(p) for p in prompts))
    plan, values = sampling.plan, sampling.values
    stops = jnp.asarray(sorted(set(stop_ids)) or [-1], jnp.int32)
    longest = max(len(p) for p in prompts)
    slots = _slots(longest, max_tokens, len(prompts))
    always, at_first = _bans(model, only)
    dtype = _cache_dtype(model, cache_dtype)
    programs = _programs()
    weights, form = Form.of(model)
    shape = {"form": form, "batch": len(prompts), "slots": slots, "plan": plan, "dtype": dtype}
    seed_ = jnp.uint32(seed & 0xFFFFFFFF)
    if pool is None:
        state = _start(weights, source, mask, seed_, None, **shape)
    else:
        kept = _start.eval_shape(weights, source, mask, seed_, None, **shape).kept
        state = _start_in(weights, source, mask, seed_, pool.take(kept, clear=False), **shape)
    try:
        logits = jnp.zeros((len(prompts), model.config.vocab_size), jnp.float32)
        logits, state = _read_prompts(weights, form, state, logits, prompts)
        state = _first(state, logits, values, stops, at_first, plan=plan)
        programs = _after_compiling(programs)

        done = yield Step(np.asarray(state.token)[:, None], prefill=True)
        made, wanted = 1, 1
        while made < max_tokens:
            if done is not None:
                state = state._replace(done=state.done | jnp.asarray(done))
            count = min(wanted, max_tokens - made)
            began = time.perf_counter()
            tokens, state = _decode(weights, state, values, stops, always, jnp.int32(count), form=form, plan=plan)
            new = np.asarray(tokens)[:, :count]
            programs = _after_compiling(programs)
            if (new < 0).all():
                return
            # Aim at dispatches of PAUSE seconds, growing by doubling: the first of all may have compiled the program.
            each = (time.perf_counter() - began) / count
            wanted = max(1, min(2 * wanted, DISPATCH, int(PAUSE / each) if each > 0 else DISPATCH))
            made += count
            done = yield Step(new)
    finally:
        if pool is not None and not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.kept)):
            pool.give_back(state.kept)


def _programs() -> int:
    return sum(program_count(program) for program in (_start, _start_in, _prefill, _first, _decode))


def _after_compiling(before: int) -> int:
    """Gives back the heap that compiling left behind, if there was any; returns the number of programs."""
    now = _programs()
    if now != before:
        trim_heap()
    return now


def _check(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, context: int | None) -> int:
    """Returns the tokens a row may have; raises for a request that is impossible."""
    if not isinstance(model, Writer):
        raise GenerationError(f"a {type(model).__name__} writes no tokens; it has no generation.")
    (longest, most), vocabulary = model.limits, model.config.vocab_size
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise GenerationError(f"max_tokens is {max_tokens!r}; it must be a whole number, at least 1.")
    if context is not None and (isinstance(context, bool) or not isinstance(context, int) or context < 2):
        raise GenerationError(f"context is {context!r}; it must be a whole number of tokens, at least 2.")
    if not prompts:
        raise GenerationError("there are no prompts; pass at least one.")
    limit = min(context, most) if context else most
    if model.reads == "sound":
        return limit
    for i, prompt in enumerate(prompts):
        which = f"prompt {i}" if len(prompts) > 1 else "the prompt"
        if len(prompt) == 0:
            raise GenerationError(f"{which} is empty; a model needs at least one token to continue from.")
        if model.reads == "text" and len(prompt) > longest:
            raise GenerationError(f"{which} has {len(prompt)} tokens, and the model reads {longest}; shorten it.")
        if model.reads == "prompt" and len(prompt) >= limit:
            raise GenerationError(
                f"{which} has {len(prompt)} tokens and the context is {limit}; shorten it"
                + (f" or pass context up to {most}." if limit < most else ".")
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise GenerationError(f"{which} has token ids outside 0 .. {vocabulary - 1}.")
    return limit


def _beginnings(model: Writer, first: Sequence[Any] | None, batch: int, limit: int) -> list[list[int]]:
    """Returns what the decoder of an encoder-decoder begins each row with."""
    given: list[Any] = list(model.writing.first if first is None else first)
    rows = [list(row) for row in given] if given and isinstance(given[0], Sequence) else [given] * batch
    vocabulary = model.config.vocab_size
    fits = len(rows) == batch and len({len(row) for row in rows}) == 1 and 0 < len(rows[0]) < limit
    if not fits or not all(0 <= token < vocabulary for row in rows for token in row):
        raise GenerationError(
            f"first is {str(first)[:64]}; expected tokens from 0 to {vocabulary - 1}, or as many for each of {batch} "
            f"rows, and fewer than {limit}."
        )
    return rows


def _bans(model: Writer, only: Sequence[int] | None) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns which tokens are never made, and which are not the first, bool `[V]`; None: all may be."""
    writing, vocabulary = model.writing, model.config.vocab_size
    always, first = np.full(vocabulary, only is not None), np.zeros(vocabulary, bool)
    if only is not None:
        if not only or not all(0 <= token < vocabulary for token in only):
            raise GenerationError(f"only is {str(only)[:64]}; expected tokens from 0 to {vocabulary - 1}.")
        always[list(only)] = False
    else:
        always[list(writing.banned)] = True
        first[list(writing.banned_first)] = True
    first |= always
    if always.all() or first.all():
        raise GenerationError("the checkpoint forbids every token; see its generation_config.json.")
    return (jnp.asarray(always) if always.any() else None, jnp.asarray(first) if first.any() else None)


def _cache_dtype(model: Writer, dtype: Any) -> Any:
    if dtype is not None and not model.chooses_cache:
        raise GenerationError(f"cache_dtype is {dtype!r}; a {type(model).__name__} has no choice of it: pass None.")
    if dtype is None:
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    names = ("float32", "bfloat16", "int8", "fp8", "int4")
    given = named_dtype("float8_e4m3fn" if dtype == "fp8" else dtype, (*names, "float8_e4m3fn"))
    if given is None:
        raise GenerationError(f"cache_dtype is {dtype!r}; choose from {', '.join(names)}.")
    return given


def _slots(longest: int, max_tokens: int, batch: int) -> int:
    """Slots for a row: 1 or 1.5 times a power of two, at least `SLOTS` in all, and enough for the prompt's padding."""
    needed = max(longest + max_tokens, _padded(longest))
    size = max(256, 1 << (SLOTS // batch).bit_length() - 1)
    while size < needed:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _padded(length: int) -> int:
    return sum(_chunks(length))


def _chunks(length: int) -> list[int]:
    """Lengths of the programs that take in a prompt of that many tokens."""
    whole, rest = divmod(length, CHUNKS[-1])
    return [CHUNKS[-1]] * whole + ([next(c for c in CHUNKS if c >= rest)] if rest else [])


def _begin(
    weights: list[Any],
    source: Any,
    mask: Any,
    seed: jax.Array,
    old: Any,
    *,
    form: Form,
    batch: int,
    slots: int,
    plan: Plan,
    dtype: Any,
) -> State:
    """Returns the state before the first prompt; `old` is what an earlier request kept, to be overwritten."""
    del old
    model = form.fill(weights)
    return State(
        kept=model.begin(source, mask, batch=batch, slots=slots, dtype=dtype),
        token=jnp.zeros((batch,), jnp.int32),
        done=jnp.zeros((batch,), bool),
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(seed),
        history=History.start(plan, batch, model.config.vocab_size),
    )


_STATIC = ("form", "batch", "slots", "plan", "dtype")
_start = jax.jit(_begin, static_argnames=_STATIC)
_start_in = jax.jit(_begin, static_argnames=_STATIC, donate_argnames="old", keep_unused=True)


def _read_prompts(
    weights: list[Any], form: Form, state: State, logits: jax.Array, prompts: Sequence[Sequence[int]]
) -> tuple[jax.Array, State]:
    """Returns the logits after each prompt's last token, and the state whose cache holds the prompts."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    chunks = _chunks(int(lengths.max()))
    padded = np.zeros((len(prompts), sum(chunks)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    first = 0
    for chunk in chunks:
        here = np.clip(lengths - first, 0, chunk)
        tokens = jnp.asarray(padded[:, first : first + chunk])
        logits, state = _prefill(weights, state, logits, tokens, jnp.asarray(here), form=form)
        first += chunk
    return logits, state


@functools.partial(jax.jit, static_argnames="form", donate_argnames=("state", "logits"))
def _prefill(
    weights: list[Any],
    state: State,
    logits: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    form: Form,
) -> tuple[jax.Array, State]:
    """Takes in T tokens of each row, `lengths` of which count; keeps the logits after each row's last token."""
    model = form.fill(weights)
    ends, kept = model.step(tokens, lengths, state.kept)
    logits = jnp.where(lengths[:, None] > 0, ends, logits)
    valid = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1) < lengths[:, None]
    return logits, state._replace(kept=kept, history=state.history.prompt(tokens, valid))


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def _first(
    state: State, logits: jax.Array, values: Values, stops: jax.Array, banned: jax.Array | None, *, plan: Plan
) -> State:
    return _choose(state, logits, values, stops, banned, plan)


@functools.partial(jax.jit, static_argnames=("form", "plan"), donate_argnames="state")
def _decode(
    weights: list[Any],
    state: State,
    values: Values,
    stops: jax.Array,
    banned: jax.Array | None,
    count: jax.Array,
    *,
    form: Form,
    plan: Plan,
) -> tuple[jax.Array, State]:
    """Makes up to `count` tokens of each row; int32 `[B, DISPATCH]`, -1 where a row had ended or beyond `count`."""
    model = form.fill(weights)
    made = jnp.full((state.token.shape[0], DISPATCH), -1, jnp.int32)

    def more(carry: Any) -> jax.Array:
        i, _, state = carry
        return (i < count) & ~jnp.all(state.done)

    def step(carry: Any) -> Any:
        i, made, state = carry
        # A row that has ended adds nothing to its cache: the slot it writes is not counted.
        grows = jnp.where(state.done, 0, 1)
        logits, kept = model.step(state.token[:, None], grows, state.kept)
        state = _choose(state._replace(kept=kept), logits, values, stops, banned, plan)
        return i + 1, jax.lax.dynamic_update_slice(made, state.token[:, None], (0, i)), state

    _, made, state = jax.lax.while_loop(more, step, (jnp.int32(0), made, state))
    return made, state


def _choose(
    state: State, logits: jax.Array, values: Values, stops: jax.Array, banned: jax.Array | None, plan: Plan
) -> State:
    batch = logits.shape[0]
    if banned is not None:
        logits = jnp.where(banned[None], -jnp.inf, logits)
    if plan.greedy:
        uniform = jnp.zeros((batch,), jnp.float32)
    else:
        rows = jax.lax.broadcasted_iota(jnp.uint32, (batch,), 0)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(state.key, row), state.step))(rows)
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
    token = jnp.where(state.done, -1, sample(logits, plan, values, state.history, uniform))
    ended = jnp.any(token[:, None] == stops[None, :], axis=-1)
    return state._replace(
        token=token, done=state.done | ended, step=state.step + 1, history=state.history.answer(token)
    )
