"""From nested containers with arrays in them to flat names: `{"encoder": {"w": a}}` is `{"encoder.w": a}`.

Containers come from files, and a file of a few bytes can describe one that has more branches than there are atoms:
the same list twice in a list, thirty times over. So what is visited is counted, and the depth is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trustcore.errors import CheckpointError

MAX_DEPTH = 64
MAX_VISITS = 2**21  # values looked at, of which a state dict has as many as tensors

# Under one of these names a training program keeps the weights, beside its counters and its optimizer.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params", "net", "weights")


def flatten(root: Any, is_leaf: Callable[[Any], bool], path: Path) -> dict[str, Any]:
    """Returns the leaves of a tree of dicts, lists and tuples, by their path with dots between its parts.

    Args:
        root: the tree; what is neither container nor leaf is left out.
        is_leaf: whether a value is one of those that are wanted.
        path: of the file, for errors.

    Raises:
        CheckpointError: the tree is too deep or too large, or two leaves have one name.
    """
    found: dict[str, Any] = {}
    visits = 0

    def error(message: str) -> CheckpointError:
        return CheckpointError(message, path=path, field="tree of tensors")

    def walk(value: Any, parts: tuple[str, ...]) -> None:
        nonlocal visits
        visits += 1
        if visits > MAX_VISITS:
            raise error(f"the containers hold more than {MAX_VISITS} values; expected a state dict")
        if len(parts) > MAX_DEPTH:
            raise error(f"containers are nested more than {MAX_DEPTH} deep; expected a state dict")
        if is_leaf(value):
            name = ".".join(parts)
            if name in found:
                raise error(f"two tensors have the name {name[:200]!r}")
            found[name] = value
            return
        for key, item in _items(value):
            if len(key) > 1000:
                raise error(f"a key has {len(key)} characters; expected at most 1000")
            walk(item, (*parts, key))

    walk(root, ())
    return found


def unwrapped(root: Any, is_leaf: Callable[[Any], bool], wrappers: Sequence[str] = WRAPPERS) -> Any:
    """Returns the state dict within what a training program saved: the container that has leaves of its own.

    A dict without leaves of its own gives way to the first of its entries that goes by a name in `wrappers` and has
    some.
    """
    for _ in range(4):
        if not isinstance(root, dict) or _has_leaf(root, is_leaf):
            return root
        inner = [root[name] for name in wrappers if isinstance(root.get(name), dict)]
        inner = [one for one in inner if _has_leaf(one, is_leaf) or any(isinstance(one.get(w), dict) for w in wrappers)]
        if not inner:
            return root
        root = inner[0]
    return root


def nested(names: Sequence[str], path: Path) -> dict[tuple[str, ...], str]:
    """Returns the names by their parts, proved to make a tree: none of them is the beginning of another.

    Raises:
        CheckpointError: one is; names both.
    """
    parts = {tuple(name.split(".")): name for name in names}
    for found, name in parts.items():
        for end in range(1, len(found)):
            above = parts.get(found[:end])
            if above is not None:
                raise CheckpointError(
                    f"{above!r} is a tensor and {name!r} would lie below it; a tree cannot hold both",
                    path=path,
                    field=f"tensor {name[:200]!r}",
                )
    return parts


def _has_leaf(container: dict[Any, Any], is_leaf: Callable[[Any], bool]) -> bool:
    return any(is_leaf(value) for value in container.values())


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(index), item) for index, item in enumerate(value))
