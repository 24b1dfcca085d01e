"""Which modules a list of targets means: names, classes, and regular expressions after "re:".

Patterns come from files and Python's matcher takes exponential time on some, so that only harmless ones are run: short,
with few repetitions and none of a group. What people write (".*self_attn.*", ".*(gate|up)_proj$") is harmless.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from trustcore.errors import ModelError

_LONGEST = 256  # characters
_REPETITIONS = 4  # a name of 60 characters then takes half a million steps at most
_REPEAT = re.compile(r"(?<!\\)[*+{]")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]|\(\?(?!:)|\\[1-9]")


def matches(module: str, kind: str, targets: Sequence[str]) -> bool:
    """Returns whether a module is meant.

    Args:
        module: its name in the files, such as "model.layers.0.mlp.up_proj".
        kind: its class there, "Linear" or "Embedding".
        targets: names, classes, and patterns from the name's start after "re:".

    Raises:
        ModelError: a pattern is broken, or could take the matcher too long.
    """
    return any(_match(module, kind, target) for target in targets)


def _match(module: str, kind: str, target: str) -> bool:
    if not target.startswith("re:"):
        return target in (module, kind)
    pattern = target[3:]
    if len(pattern) > _LONGEST or len(_REPEAT.findall(pattern)) > _REPETITIONS or _REPEATED_GROUP.search(pattern):
        raise ModelError(
            f"the pattern {pattern[:64]!r} is too intricate to be run on a file's word; expected at most {_LONGEST} "
            f"characters, {_REPETITIONS} repetitions and none of a group"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what a later Python reads in another way
            return re.match(pattern, module) is not None
    except (re.error, RecursionError, OverflowError, Warning) as error:
        raise ModelError(f"the pattern {pattern[:64]!r} is no regular expression: {error}") from None
