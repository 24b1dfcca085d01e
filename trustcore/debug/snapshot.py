"""One equation in one turn with the values that went into it: to run again, to look at, to hand to somebody else.

`Snapshot.save` writes a Python file that needs jax and NumPy alone: the inputs as compressed text, and the operation as
`jax.extend.core.primitives` spells it. Equations that contain programs of their own (a Pallas kernel, a scatter with a
function) are stored as what `jax.export` makes of them, for which the package flatbuffers is needed.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import importlib
import textwrap
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trustcore import _jax
from trustcore.debug.issues import Issue
from trustcore.debug.statistics import Statistics, of
from trustcore.debug.tap import is_float
from trustcore.errors import DebugError, TrustcoreError
from trustcore.graph import Address, Node, Probe, Program, aval, bind, observe
from trustcore.graph.observe import index_of
from trustcore.graph.program import described


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """An equation with its inputs and outputs in one turn of the loops around.

    Attributes:
        node: the equation in its program.
        turns: of the loops around, in the order of what they walk over.
        shard: of the `shard_map`s around, which device.
        inputs: arrays on the host.
        outputs: what it gave within the program.
        issue: what is wrong with it, where that is known.
    """

    node: Node
    turns: tuple[int, ...]
    shard: tuple[int, ...]
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    issue: Issue | None = None

    @property
    def address(self) -> Address:
        """Where the equation stands."""
        return self.node.address

    def replay(self, *inputs: Any) -> list[Any]:
        """Returns the outputs of the equation, computed alone.

        Args:
            *inputs: to take the place of the recorded ones; none: those.
        """
        kinds = [atom.aval for atom in self.node.eqn.invars]
        given = inputs or self.inputs
        if len(given) != len(kinds):
            raise DebugError(f"replay: {self.address.primitive} takes {len(kinds)} inputs, not {len(given)}")
        return bind(self.node.eqn, [_device(x, kind) for x, kind in zip(given, kinds, strict=True)])

    def first_bad(self) -> tuple[int, tuple[int, ...]] | None:
        """Returns which output holds NaN or Inf and the index of the first such element; None where none does.

        NaN goes before Inf.
        """
        for test in (np.isnan, np.isinf):
            for i, x in enumerate(self.outputs):
                if not is_float(x):
                    continue
                found = np.argwhere(test(_wide(x)))
                if len(found):
                    return i, tuple(int(n) for n in found[0])
        return None

    def statistics(self) -> tuple[list[Statistics | None], list[Statistics | None]]:
        """Returns the statistics of inputs and outputs; None for what holds no floats."""
        of_all = [[of(x) if is_float(x) else None for x in group] for group in (self.inputs, self.outputs)]
        return of_all[0], of_all[1]

    def save(self, path: str | Path) -> Path:
        """Writes a Python file that computes the equation again with jax alone, and returns its path.

        Raises:
            DebugError: the equation holds a program, and flatbuffers is not installed.
        """
        path = Path(path)
        path.write_text(_source(self), encoding="utf-8")
        return path

    def __str__(self) -> str:
        into, out = self.statistics()
        shard = f" on shard {', '.join(map(str, self.shard))}" if self.shard else ""
        lines = [described(self.address, self.turns) + shard]
        for name, group, stats in (("in", self.inputs, into), ("out", self.outputs, out)):
            for i, (x, s) in enumerate(zip(group, stats, strict=True)):
                lines.append(f"  {name}{i}: {s.short if s else f'{x.dtype}{list(np.shape(x))}'}")
        bad = self.first_bad()
        if bad is not None:
            lines.append(f"  first bad element: out{bad[0]}{list(bad[1])}")
        return "\n".join(lines)


class Breakpoint(TrustcoreError):
    """A watch with `stop=True` was hit.

    Attributes:
        snapshot: the equation and its inputs.
        report: of the call.
    """

    def __init__(self, watch: str, snapshot: Snapshot, report: Any):
        self.snapshot, self.report = snapshot, report
        super().__init__(f"{watch} at {described(snapshot.address, snapshot.turns)}\n{snapshot}")


def snapshot_at(
    program: Program,
    leaves: Sequence[Any],
    node: Node,
    turns: Sequence[int],
    shard: Sequence[int] = (),
    issue: Issue | None = None,
) -> Snapshot:
    """Returns the snapshot of an equation: the program runs again, and keeps what goes into it.

    Args:
        program: of the function.
        leaves: its inputs.
        node: a leaf equation.
        turns: of the loops around, in the order in which they run.
        shard: of the `shard_map`s around, which device.
        issue: what is wrong with it.
    """
    probe = Probe(node, turns)
    run = jax.jit(lambda *values: observe(program, values, probe)[1])
    sheet = run(*[jnp.asarray(leaf) for leaf in leaves])[node.scope.number]
    for device in shard:
        sheet = jax.tree.map(lambda x, d=device: x[d], sheet)
    inputs, outputs = (tuple(np.asarray(x) for x in sheet[name]) for name in ("inputs", "outputs"))
    return Snapshot(node, index_of(node, turns), tuple(shard), inputs, outputs, issue)


def _wide(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x if x.dtype.kind in "fc" and x.dtype.itemsize >= 4 else x.astype(np.float32)


def _device(x: Any, kind: Any) -> Any:
    """An array as the equation takes it; a random key is kept as its numbers."""
    if jnp.issubdtype(kind.dtype, jax.dtypes.prng_key) and not jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.asarray(x), impl=_jax.key_implementation(kind.dtype))
    return jnp.asarray(x, kind.dtype)


# ---- the file --------------------------------------------------------------------------------------------------------

_FILE = '''\
"""{title}

Computes one operation with the inputs that it had: python {name}
"""

import base64
import zlib

import jax
import jax.numpy as jnp
import numpy as np
{imports}
KINDS = {kinds!r}
DATA = """
{data}
"""


def load():
    data, found = zlib.decompress(base64.b64decode(DATA)), []
    for dtype, shape in KINDS:
        size = jnp.dtype(dtype).itemsize * int(np.prod(shape))
        found.append(jnp.asarray(np.frombuffer(data[:size], jnp.dtype(dtype)).reshape(shape)))
        data = data[size:]
    return found


def operation(*inputs):
    {body}


if __name__ == "__main__":
    inputs = load()
    outputs = jax.tree.leaves(operation(*inputs))
    for kind, arrays in (("in", inputs), ("out", outputs)):
        for i, x in enumerate(arrays):
            wide = np.asarray(x.astype(jnp.float32) if x.dtype.itemsize < 4 else x)
            bad = f"{{int(np.isnan(wide).sum())}} NaN and {{int(np.isinf(wide).sum())}} Inf"
            print(f"{{kind}}{{i}}: {{x.dtype}}{{list(x.shape)}} with {{bad}}, {{wide.reshape(-1)[:4]}}")
'''


def _source(snapshot: Snapshot) -> str:
    inputs = [np.asarray(x, order="C") for x in snapshot.inputs]
    data = base64.b64encode(zlib.compress(b"".join(x.tobytes() for x in inputs), 9)).decode()
    imports: set[str] = set()
    try:
        body = _operation(snapshot, imports)
    except _NotPlain as reason:
        body = _exported(snapshot, str(reason), imports)
    title = snapshot.issue.message if snapshot.issue is not None else described(snapshot.address, snapshot.turns)
    return _FILE.format(
        title="\n".join(textwrap.wrap(title.replace("\\", "/").replace('"""', "'''"), 115)),
        name="this_file.py",
        imports="".join(f"{line}\n" for line in sorted(imports)),
        kinds=[(x.dtype.name, x.shape) for x in inputs],
        data="\n".join(textwrap.wrap(data, 115)),
        body=body,
    )


class _NotPlain(Exception):
    """A parameter that Python source cannot spell."""


def _operation(snapshot: Snapshot, imports: set[str]) -> str:
    from jax.extend.core import primitives

    eqn = snapshot.node.eqn
    if any(jnp.issubdtype(aval(atom).dtype, jax.dtypes.extended) for atom in eqn.invars):
        raise _NotPlain("a random key")
    names = [name for name, value in vars(primitives).items() if value is eqn.primitive]
    if not names:
        raise _NotPlain(f"{eqn.primitive.name} is no public primitive")
    imports.add("from jax.extend.core import primitives")
    params = "".join(f", {name}={_spelled(value, imports)}" for name, value in eqn.params.items())
    return f"return primitives.{names[0]}.bind(*inputs{params})"


def _spelled(value: Any, imports: set[str]) -> str:
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    if isinstance(value, float):
        return f"float({str(value)!r})"
    if isinstance(value, (np.dtype, type)) and not _is_class(value):
        return f"jnp.dtype({jnp.dtype(value).name!r})"
    if isinstance(value, np.generic):
        return f"np.{value.dtype.name}({value.item()!r})"
    if isinstance(value, enum.Enum):
        return f"{_imported(type(value), imports)}[{value.name!r}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if f.init]
        inner = ", ".join(f"{f.name}={_spelled(getattr(value, f.name), imports)}" for f in fields)
        return f"{_imported(type(value), imports)}({inner})"
    names = getattr(value, "_fields", None)
    if isinstance(value, tuple) and names is not None:
        inner = ", ".join(f"{name}={_spelled(getattr(value, name), imports)}" for name in names)
        return f"{_imported(type(value), imports)}({inner})"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_spelled(item, imports) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    raise _NotPlain(f"a parameter of type {type(value).__name__}")


def _is_class(value: Any) -> bool:
    try:
        jnp.dtype(value)
    except TypeError:
        return True
    return False


def _imported(kind: type, imports: set[str]) -> str:
    top = kind.__qualname__.split(".")[0]
    if getattr(importlib.import_module(kind.__module__), top, None) is None:
        raise _NotPlain(f"a parameter of type {kind.__name__}")
    imports.add(f"from {kind.__module__} import {top}")
    return kind.__qualname__


def _exported(snapshot: Snapshot, reason: str, imports: set[str]) -> str:
    try:
        from jax import export

        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in snapshot.inputs]
        blob = export.export(jax.jit(snapshot.replay))(*shapes).serialize()
    except ImportError as error:
        raise DebugError(
            f"save: {snapshot.address.primitive} has {reason}, so it is stored as jax.export makes it, which needs a "
            f"package that is not installed ({error.name}): pip install flatbuffers"
        ) from error
    imports.add("from jax import export")
    text = "\n".join(textwrap.wrap(base64.b64encode(zlib.compress(blob, 9)).decode(), 115))
    lines = (
        f'program = """\n{text}\n"""',
        "blob = bytearray(zlib.decompress(base64.b64decode(program)))",
        "return export.deserialize(blob).call(*inputs)",
    )
    return "\n    ".join(lines)
