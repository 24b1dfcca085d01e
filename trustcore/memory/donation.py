"""Which donated arguments a program really reuses for its results, and why it does not reuse the others.

    print(donations(train_step, params, state, batch, donate_argnums=(0, 1, 2)))

jax takes a donated buffer for a result of the same shape, dtype and sharding, if there is one left; XLA says in the
compiled program which it took. The function is compiled, not run: arguments may be `jax.ShapeDtypeStruct`s.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax

from trustcore import _jax, units
from trustcore.errors import ProgramError

# `{1}: (0, {}, may-alias)` in the head of an HLO module: result 1 lies where argument 0 was.
_ALIAS = re.compile(r"\{(\d*)[^{}]*\}:\s*\((\d+),")


@dataclasses.dataclass(frozen=True)
class Donation:
    """A donated array.

    Attributes:
        name: `args[0]['w']`.
        shape, dtype, nbytes: of it.
        result: the one that takes its place, `result[0]['w']`; None: none does.
        why: why none does; "".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    result: str | None
    why: str

    def __str__(self) -> str:
        told = f"becomes {self.result}" if self.result else f"not reused: {self.why}"
        return f"{units.size(self.nbytes):>10}  {self.name} {self.dtype}{list(self.shape)}: {told}"


@dataclasses.dataclass(frozen=True)
class Donations:
    """What `donations` found, the largest first."""

    found: tuple[Donation, ...]

    @property
    def saved(self) -> int:
        """Bytes of the arrays whose place a result takes."""
        return sum(d.nbytes for d in self.found if d.result)

    @property
    def wasted(self) -> tuple[Donation, ...]:
        """Those that nothing took."""
        return tuple(d for d in self.found if not d.result)

    def __str__(self) -> str:
        lost = sum(d.nbytes for d in self.wasted)
        head = f"{units.size(self.saved)} of {units.size(self.saved + lost)} donated are reused"
        return "\n".join([head, *(str(d) for d in self.wasted), *(str(d) for d in self.found if d.result)])


def donations(fn: Callable[..., Any], *args: Any, donate_argnums: int | Sequence[int] | None = None) -> Donations:
    """Returns what becomes of each donated array of `fn(*args)`; nothing is run.

    Args:
        fn: a function, or what `jax.jit` made of one, whose own donation counts then.
        args: its arguments, or their shapes.
        donate_argnums: numbers of the donated arguments, where `fn` is not jitted or donates nothing.

    Raises:
        ProgramError: nothing is donated; or the backend does not show its programs.
    """
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    traced = jitted.trace(*args)
    flat, _ = jax.tree_util.tree_flatten_with_path(args)
    given = (donate_argnums,) if isinstance(donate_argnums, int) else tuple(donate_argnums or ())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not reused is what is told here
        if not given:
            infos = jax.tree.leaves(jitted.lower(*args).args_info, is_leaf=lambda x: hasattr(x, "donated"))
            given = tuple({path[0].idx for (path, _), info in zip(flat, infos, strict=True) if info.donated})
        if not given:
            raise ProgramError("donations: nothing is donated; name the arguments (donate_argnums).")
        whole = jax.jit(fn, donate_argnums=given, keep_unused=True)
        text = whole.lower(*args).compile().as_text()
    if not text:
        raise ProgramError("donations: this backend does not show its programs.")
    head = text.splitlines()[0]
    at = head.find("input_output_alias=")
    pairs = _ALIAS.findall(head[at : _closing(head, at)]) if at >= 0 else []
    taken = {int(argument): int(result or 0) for result, argument in pairs}
    results = jax.tree_util.tree_flatten_with_path(traced.out_info)[0]
    names = ["result" + jax.tree_util.keystr(path) for path, _ in results]
    left = Counter(_kind(leaf) for i, (_, leaf) in enumerate(results) if i not in taken.values())
    used = _jax.used_inputs(traced.jaxpr)
    found = []
    for i, (path, leaf) in enumerate(flat):
        if path[0].idx not in given:
            continue
        kind = _kind(leaf)
        result, why = (names[taken[i]], "") if i in taken else (None, "")
        if not used[i]:  # jax drops it before XLA sees it
            result, why = None, "the function does not use it, and jax leaves it out of the program"
        elif result is None:
            why = _reason(kind, results, left)
        nbytes = leaf.size * leaf.dtype.itemsize
        found.append(Donation("args" + jax.tree_util.keystr(path), kind[0], kind[1], nbytes, result, why))
    return Donations(tuple(sorted(found, key=lambda d: -d.nbytes)))


def _reason(kind: tuple[tuple[int, ...], str], results: Sequence[Any], left: Counter[Any]) -> str:
    shape, dtype = kind
    if left[kind]:
        return "XLA did not take it: layouts or shardings differ, or the backend reuses none"
    kinds = [_kind(leaf) for _, leaf in results]
    if kind in kinds:
        return f"every {dtype}{list(shape)} among the results has taken the place of another"
    other = next((d for s, d in kinds if s == shape), None)
    if other is not None:
        return f"the result of that shape is {other}: cast it back, or donate nothing there"
    return f"no result is {dtype}{list(shape)}"


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), str(leaf.dtype)


def _closing(text: str, at: int) -> int:
    """Where the braces that open behind `at` are closed."""
    depth = 0
    for i in range(text.find("{", at), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text)
