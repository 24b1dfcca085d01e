"""Layer by layer through any function: the inputs of some weights, the weights replaced, then on with the new ones.

The program of `fn(params, *batch)` is written out in one straight line and cut into stages. The weights of a stage are
those whose inputs depend on the same earlier weights: queries, keys and values; then the output of attention; then gate
and up; then down; and so on through the layers. For each stage one program runs over the batches:

    values carried from before, the weights of the stage before -> values carried on, statistics of this stage's inputs

so that every equation is computed once for each batch, and no more is held than the values that are still needed
(the activations between two products), one stage's weights as floats, and one stage's statistics. Weights that share an
input share its statistics. Stages of one form, as the layers of a model are, share one compiled program.

What a weight is used for besides its products (a tied table that is looked up too) is computed with what the weight is
at that point: the float weight before its stage, the new one after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from trustcore.errors import QuantizationError
from trustcore.graph import Product, View, aval, bind, inline, product_of, through
from trustcore.quant.calibration.capture import Site, decoded, named_leaves, operand_rows, site_of, trace
from trustcore.quant.calibration.observers import Observer, State


class Matrix(NamedTuple):
    """One matrix of a leaf, or a stack of them that meet one batch axis.

    Attributes:
        path: of the leaf.
        index: its position on the leaf's leading axes; () where the leaf is one matrix.
        site: its axes.
    """

    path: str
    index: tuple[int, ...]
    site: Site


class Stage(NamedTuple):
    """A stage as it is reached.

    Attributes:
        number: of the stage, from 0.
        count: of all stages.
        states: the observer's state of the inputs of each matrix; matrices that share an input share the object.
        values: the float matrices, for whoever takes the stage to replace.
    """

    number: int
    count: int
    states: dict[Matrix, State]
    values: dict[Matrix, Any]


def stages(
    fn: Callable[..., Any],
    params: Any,
    batches: Sequence[Sequence[Any]],
    observer: Observer,
    paths: Sequence[str],
    *,
    strict: bool = True,
) -> Iterator[Stage]:
    """Yields each stage in turn; whoever takes it puts new float matrices into `values` before asking for the next.

    Args:
        fn: a function of (params, *batch).
        params: a pytree of weights.
        batches: calibration data, all of one shape.
        observer: of the inputs.
        paths: of the leaves to go through.
        strict: whether a leaf that takes part in no product is an error; otherwise it is passed over.

    Raises:
        QuantizationError: there are no batches, they differ in shape, or a leaf takes part in no product.
    """
    if not batches:
        raise QuantizationError("there are no batches; give calibration data of the shapes that the function takes.")
    shapes = [jax.tree.map(lambda leaf: (np.shape(leaf), str(jnp.asarray(leaf).dtype)), tuple(b)) for b in batches]
    odd = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is not None:
        raise QuantizationError(
            f"batch {odd} has the shapes {shapes[odd]}, batch 0 has {shapes[0]}; cut the data into batches of one "
            "shape."
        )
    plan = _Plan(fn, params, batches[0], paths, strict)
    found = {matrix.path for matrix in plan.matrices}
    if len(found) < len(paths):  # what is no factor of a product is an input like any other
        plan = _Plan(fn, params, batches[0], [path for path in paths if path in found], strict)
    leaves = named_leaves(params)
    carried = [dict(zip(plan.batch_inputs, jax.tree.leaves(tuple(batch)), strict=True)) for batch in batches]
    replaced: dict[Matrix, Any] = {}
    pending: dict[int, State] = {}
    programs: dict[str, Any] = {}

    def value_of(matrix: Matrix) -> Any:
        return replaced[matrix] if matrix in replaced else decoded(leaves[matrix.path])[matrix.index]

    for number in range(plan.count):
        part = plan.part(number)
        program = programs.setdefault(part.key, jax.jit(lambda *inputs, part=part: part.run(observer, *inputs)))
        floats = [value_of(matrix).reshape(shape) for matrix, shape in part.floats]
        shared = [plan.constants[var] for var in part.shared]
        states = [pending.pop(g) if g in pending else _start(plan, observer, g) for g in part.groups]
        for i, values in enumerate(carried):
            made, states = program(states, floats, shared, [values[var] for var in part.carried])
            carried[i] = {var: values[var] for var in part.kept} | dict(zip(part.made, made, strict=True))
        pending.update(zip(part.groups, states, strict=True))
        del floats
        here = [matrix for matrix in plan.matrices if plan.stage_of[matrix] == number]
        if not here:
            continue
        stage = Stage(number, plan.count, {m: pending[plan.group_of[m]] for m in here}, {m: value_of(m) for m in here})
        yield stage
        replaced.update({m: jnp.asarray(value) for m, value in stage.values.items()})
        for group in {plan.group_of[m] for m in here}:
            del pending[group]
        # Two stages later nothing reads a float of this one, unless the leaf is used again.
        replaced = {m: value for m, value in replaced.items() if plan.last_use[m] > number}


def _start(plan: _Plan, observer: Observer, group: int) -> State:
    site = plan.sites[group]
    state = observer.init(site.k)
    for axis in reversed(site.stacked):
        state = jax.tree.map(lambda leaf, n=site.shape[axis]: jnp.broadcast_to(leaf, (n, *leaf.shape)), state)
    return state


class _Part(NamedTuple):
    """The program of one stage: its equations, what goes in and what comes out."""

    key: str
    eqns: list[JaxprEqn]
    floats: list[tuple[Matrix, tuple[int, ...]]]
    float_vars: list[Var]
    shared: list[Var]
    carried: list[Var]
    kept: list[Var]
    made: list[Var]
    groups: list[int]
    inputs: list[tuple[int, Var, Product, Site]]  # of the products: (which of groups, x, ...)

    def run(self, observer: Observer, states: list[Any], floats: list, shared: list, carried: list) -> tuple:
        """Returns (values made, states)."""
        env = dict(zip((*self.float_vars, *self.shared, *self.carried), (*floats, *shared, *carried), strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for eqn in self.eqns:
            env.update(zip(eqn.outvars, bind(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        states = list(states)
        for group, x, product, site in self.inputs:
            update = observer.update
            for _ in range(product.batch):
                update = jax.vmap(update)
            states[group] = update(states[group], operand_rows(read(x), product, site.k))
        return [read(var) for var in self.made], states


class _Plan:
    """The program in one line, and what depends on what."""

    def __init__(self, fn: Any, params: Any, batch: Sequence[Any], paths: Sequence[str], strict: bool):
        jaxpr, names = trace(fn, params, batch, paths)
        jaxpr = inline(jaxpr, [name is not None for name in names])
        leaves = jax.tree.leaves(params_without(params, paths))
        invars = jaxpr.jaxpr.invars
        n_batch = len(jax.tree.leaves(tuple(batch)))
        own = invars[: len(invars) - n_batch]
        self.eqns = jaxpr.jaxpr.eqns
        self.batch_inputs = invars[len(invars) - n_batch :]
        others = [var for var, name in zip(own, names, strict=False) if name is None]
        self.constants: dict[Var, Any] = dict(zip(others, leaves, strict=True))
        self.constants.update(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
        self.views = {
            var: View.of(name, aval(var).shape) for var, name in zip(own, names, strict=False) if name is not None
        }
        self.maker: dict[Var, int] = {}
        depth: dict[Var, int] = {}
        uses: list[tuple[Matrix, Any, Product, int]] = []
        for number, eqn in enumerate(self.eqns):
            self.maker.update(dict.fromkeys(eqn.outvars, number))
            atoms = [atom for atom in eqn.invars if not isinstance(atom, Literal)]
            first = self.views.get(atoms[0]) if atoms and atoms[0] is eqn.invars[0] else None
            view = None if first is None or len(eqn.outvars) != 1 else through(eqn, first)
            if view is not None:
                self.views[eqn.outvars[0]] = view
                continue
            level = max((depth.get(atom, 0) for atom in atoms), default=0)
            for operand in (0, 1) if eqn.primitive.name == "dot_general" else ():
                view = self.views.get(eqn.invars[operand])
                product = None if view is None else product_of(eqn, operand, view)
                if view is not None and product is not None:
                    (path, index), site = site_of(view, product)
                    uses.append((Matrix(path, index, site), eqn.invars[1 - operand], product, level))
            depth.update(
                dict.fromkeys(eqn.outvars, level + any(use[3] == level and self._is(use, eqn) for use in uses))
            )
        self.depth = depth
        self._number(uses, paths, strict)

    @staticmethod
    def _is(use: tuple[Matrix, Any, Product, int], eqn: JaxprEqn) -> bool:
        return use[1] in [atom for atom in eqn.invars if not isinstance(atom, Literal)]

    def _number(self, uses: list, paths: Sequence[str], strict: bool) -> None:
        """Groups matrices by their inputs, and finds the stage of each."""
        self.matrices = list(dict.fromkeys(use[0] for use in uses))
        found = {matrix.path for matrix in self.matrices}
        missing = [path for path in paths if path not in found]
        if (missing and strict) or not found:
            raise QuantizationError(
                f"{', '.join(missing[:5])} takes part in no product of the function that can be seen: a dot_general "
                "with the leaf itself, not inside while_loop, cond or shard_map. Leave it out by `where`."
            )
        inputs: dict[Matrix, list] = {matrix: [] for matrix in self.matrices}
        for matrix, x, product, level in uses:
            if inputs[matrix] and inputs[matrix][0][1].order != product.order and matrix.site.stacked:
                raise QuantizationError(f"{matrix.path} is used with different batch axes; leave it out by `where`.")
            inputs[matrix].append((x, product, level))
        groups: dict[tuple, int] = {}
        self.group_of, self.stage_of, self.sites = {}, {}, {}
        self.inputs: list[tuple[int, Any, Product, Site, int]] = []
        for matrix, those in inputs.items():
            key = tuple((id(x), product.order, product.batch) for x, product, _ in those)
            if key not in groups:
                groups[key] = len(groups)
                self.sites[groups[key]] = matrix.site
                self.inputs += [(groups[key], x, p, matrix.site, level) for x, p, level in those]
            self.group_of[matrix] = groups[key]
            self.stage_of[matrix] = max(level for *_, level in those)
        self.count = 1 + max(self.stage_of.values())
        # What is computed when: nothing that no statistic needs.
        self.level: dict[int, int] = {}
        todo = [x for _, x, *_ in self.inputs]
        while todo:
            atom = todo.pop()
            if isinstance(atom, Literal) or atom not in self.maker or self.maker[atom] in self.level:
                continue
            number = self.maker[atom]
            eqn = self.eqns[number]
            self.level[number] = -1 if atom in self.views else self.depth[atom]
            todo += eqn.invars
        self.needed_at: dict[Var, int] = {}
        self.last_use = dict(self.stage_of)
        for number, level in self.level.items():
            for atom in self.eqns[number].invars:
                if level >= 0 and not isinstance(atom, Literal):
                    self.needed_at[atom] = max(self.needed_at.get(atom, 0), level)
                    for matrix in self._matrices_behind(atom):
                        self.last_use[matrix] = max(self.last_use[matrix], level)

    def _matrices_behind(self, atom: Any) -> list[Matrix]:
        view = self.views.get(atom)
        return [] if view is None else [m for m in self.matrices if m.path == view.leaf]

    def _cut(self, var: Var) -> Matrix | None:
        """The matrix that a variable holds, where it is that matrix just as it lies in its leaf."""
        view, number = self.views[var], self.maker.get(var)
        if number is not None:
            eqn = self.eqns[number]
            if eqn.primitive.name != "slice" or eqn.invars[0] in self.maker:
                return None
        size = math.prod(aval(var).shape)
        for matrix in self.matrices:
            lead = matrix.site.indexed
            inner = math.prod(n for axis, n in enumerate(matrix.site.shape) if axis not in lead)
            if matrix.path == view.leaf and size == inner and list(lead) == list(range(len(lead))):
                start = int(np.ravel_multi_index(matrix.index, matrix.site.shape[: len(lead)])) if lead else 0
                if view.start == start * inner:
                    return matrix
        return None

    def part(self, number: int) -> _Part:
        """Returns the program of a stage."""
        part = _Part("", [], [], [], [], [], [], [], [], [])
        inside: set[Var] = set()
        seen: set[Var] = set()

        def bring(atom: Any) -> None:
            """Sees to it that a variable is there when the next equation runs."""
            if isinstance(atom, Literal) or atom in inside or atom in seen:
                return
            if atom in self.views:
                matrix = self._cut(atom)
                if matrix is not None:
                    part.float_vars.append(atom)
                    part.floats.append((matrix, aval(atom).shape))
                elif atom in self.maker:
                    eqn = self.eqns[self.maker[atom]]
                    for other in eqn.invars:
                        bring(other)
                    part.eqns.append(eqn)
                    inside.update(eqn.outvars)
                    return
                else:
                    path = self.views[atom].leaf
                    raise QuantizationError(
                        f"{path} {list(aval(atom).shape)} is taken apart in a way that cannot be followed matrix by "
                        "matrix; leave it out by `where`."
                    )
            else:
                (part.shared if atom in self.constants else part.carried).append(atom)
            seen.add(atom)

        for place in sorted(n for n, level in self.level.items() if level == number):
            eqn = self.eqns[place]
            for atom in eqn.invars:
                bring(atom)
            part.eqns.append(eqn)
            inside.update(eqn.outvars)
        for group, x, product, site, level in self.inputs:
            if level == number:
                bring(x)
                if group not in part.groups:
                    part.groups.append(group)
                part.inputs.append((part.groups.index(group), x, product, site))
        later = {var for var, last in self.needed_at.items() if last > number and var not in self.views}
        later |= {x for *_, x, _, _, level in self.inputs if level > number}
        held = [v for v in self.batch_inputs if v in later]
        held += [v for n, level in sorted(self.level.items()) if 0 <= level <= number for v in self.eqns[n].outvars]
        for var in held:
            if var in later:
                (part.made if var in inside else part.kept).append(var)
        return part._replace(key=_text(part))


def params_without(params: Any, paths: Sequence[str]) -> list[Any]:
    """Returns the leaves of a tree in their order, but for those at `paths`."""
    return [leaf for path, leaf in named_leaves(params).items() if path not in set(paths)]


def _text(part: _Part) -> str:
    """What the program of a part is, whatever its variables are called: equal for layers of one form."""
    names: dict[Var, str] = {}

    def name(atom: Any) -> str:
        if isinstance(atom, Literal):
            return f"{atom.val!r}:{atom.aval}"
        return names.setdefault(atom, f"v{len(names)}:{atom.aval}")

    def setting(value: Any) -> str:
        if isinstance(value, np.ndarray):
            return f"{value.dtype}{value.shape}{value.tobytes()!r}"
        parts = value if isinstance(value, tuple | list) else (value,)
        closed = [id(p) for p in parts if getattr(p, "consts", None)]  # constants are not told by the text
        return f"{value}{closed or ''}"

    lines = [" ".join(name(var) for var in (*part.float_vars, *part.shared, *part.carried))]
    for eqn in part.eqns:
        settings = {key: setting(value) for key, value in sorted(eqn.params.items())}
        ins, outs = [name(a) for a in eqn.invars], [name(v) for v in eqn.outvars]
        lines.append(f"{outs} = {eqn.primitive.name} {settings} {ins}")
    lines += [f"{g} {name(x)} {product.order} {product.batch} {site.k}" for g, x, product, site in part.inputs]
    return "\n".join([*lines, *(name(var) for var in part.made)])
