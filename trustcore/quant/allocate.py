"""Mixed bits: which format for which matrix, so that the whole fits a budget and loses the least.

    minimize sum_i cost[i, f(i)]   subject to   sum_i bytes[i, f(i)] <= budget

a knapsack with one choice for each matrix (multiple-choice knapsack), the costs being those of `sensitivity`, which are
taken to add up. Solved exactly by dynamic programming over the choices that are worth keeping: of the partial solutions
those that another beats in both bytes and cost are dropped, and those that the Lagrangian bound shows to lead to
nothing better than what is known,

    cost so far + max over l of sum over the rest of min_f (cost + l * bytes) - l * (bytes left)  >=  best known.

Where more than `LIMIT` partial solutions are left, they are thinned out evenly; the result then says how far from the
best it may be (`gap`), which the same bound gives.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trustcore.errors import QuantizationError

LIMIT = 200_000  # partial solutions, 16 bytes each


@dataclasses.dataclass(frozen=True)
class Option:
    """One format for one matrix.

    Attributes:
        path: of the matrix.
        format: its name; None leaves the matrix as it is.
        nbytes: that it takes then.
        cost: that this has, with everything else as it was.
        size: its number of weights.
    """

    path: str
    format: str | None
    nbytes: int
    cost: float
    size: int


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A choice for every matrix.

    Attributes:
        chosen: by path.
        budget: bytes that were allowed.
        gap: how much less the best choice may cost; 0 where this is the best.
    """

    chosen: Mapping[str, Option]
    budget: int
    gap: float = 0.0

    @property
    def format(self) -> dict[str, str | None]:
        """The mapping that `quantize(format=...)` and `gptq(format=...)` take; paths stand for themselves."""
        return {_literal(path): option.format for path, option in self.chosen.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(option.nbytes for option in self.chosen.values())

    @property
    def cost(self) -> float:
        """The sum of all costs."""
        return math.fsum(option.cost for option in self.chosen.values())

    @property
    def bits_per_weight(self) -> float:
        """Of all matrices together."""
        return 8 * self.nbytes / max(sum(option.size for option in self.chosen.values()), 1)

    def to_markdown(self) -> str:
        """Returns a table of matrices, formats, bytes and costs."""
        lines = ["| matrix | format | bytes | bits/weight | cost |", "|---|---|---:|---:|---:|"]
        for path, o in self.chosen.items():
            bits = 8 * o.nbytes / max(o.size, 1)
            lines.append(f"| {path} | {o.format or 'as it was'} | {o.nbytes} | {bits:.3f} | {o.cost:.3g} |")
        total = f"| **all** | | {self.nbytes} of {self.budget} | {self.bits_per_weight:.3f} | {self.cost:.3g} |"
        return "\n".join([*lines, total])

    def __rich__(self) -> Any:
        from rich.table import Table

        bits, within = self.bits_per_weight, "" if self.gap == 0 else f" (the best may cost {self.gap:.2g} less)"
        table = Table(
            title=f"{self.nbytes} of {self.budget} bytes, {bits:.3f} bits a weight, cost {self.cost:.3g}{within}"
        )
        for name in ("matrix", "format", "bytes", "cost"):
            table.add_column(name, justify="left" if name in ("matrix", "format") else "right")
        for path, o in self.chosen.items():
            table.add_row(path, o.format or "as it was", str(o.nbytes), f"{o.cost:.3g}")
        return table

    def __str__(self) -> str:
        return self.to_markdown()


def allocate(
    options: Sequence[Option], *, nbytes: int | None = None, bits_per_weight: float | None = None
) -> Allocation:
    """Returns the choice of smallest cost that takes at most that many bytes.

    Args:
        options: the formats that each matrix may take, as `sensitivity` gives them.
        nbytes: the budget; or
        bits_per_weight: the budget, over all matrices of `options`.

    Raises:
        QuantizationError: not exactly one budget is given, a cost or size is no number, or even the smallest formats
            take more.

    Exact unless `gap` says otherwise. Time grows with the number of partial solutions that are worth keeping, which
    rarely passes some thousands.
    """
    items = _by_path(options)
    sizes = sum(choices[0].size for choices in items.values())
    if (nbytes is None) == (bits_per_weight is None):
        raise QuantizationError("allocate: give either nbytes or bits_per_weight.")
    budget = nbytes if nbytes is not None else int((bits_per_weight or 0) * sizes / 8)
    least = sum(min(o.nbytes for o in choices) for choices in items.values())
    if least > budget:
        raise QuantizationError(
            f"allocate: the smallest formats take {least} bytes ({8 * least / max(sizes, 1):.3f} bits a weight), the "
            f"budget is {budget}. Allow more, or offer smaller formats."
        )
    kept = [_worth_keeping(choices) for choices in items.values()]
    picks, gap = _solve(kept, budget)
    return Allocation({c[p].path: c[p] for c, p in zip(kept, picks, strict=True)}, budget, gap)


def frontier(options: Sequence[Option], points: int = 25) -> list[Allocation]:
    """Returns the best choices for budgets from the smallest to the largest that make a difference."""
    items = _by_path(options)
    low = sum(min(o.nbytes for o in choices) for choices in items.values())
    high = sum(max(o.nbytes for o in _worth_keeping(choices)) for choices in items.values())
    found = [allocate(options, nbytes=int(b)) for b in np.linspace(low, high, points)]
    return [a for i, a in enumerate(found) if i == 0 or a.nbytes != found[i - 1].nbytes]


def to_svg(curve: Sequence[Allocation], *, width: int = 640, height: int = 400) -> str:
    """Returns a plot of cost (logarithmic) against bits a weight as an SVG document."""
    points = [(a.bits_per_weight, max(a.cost, 1e-12)) for a in curve]
    if not points:
        raise QuantizationError("to_svg: there is nothing to plot.")
    x_low, x_high = _padded([x for x, _ in points])
    y_low, y_high = _padded([math.log10(y) for _, y in points])
    left, bottom, right, top = 70, height - 50, width - 20, 20

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (math.log10(y) - y_low) / (y_high - y_low)
        return left + across * (right - left), bottom - up * (bottom - top)

    marks = [place(x, y) for x, y in points]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="black"/>',
        f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in marks)}" fill="none" stroke="#1f77b4"/>',
    ]
    for (x, y), (bits, cost) in zip(marks, points, strict=True):
        label = f"<title>{bits:.3f} bits, cost {cost:.3g}</title>"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#1f77b4">{label}</circle>')
    for i in range(6):
        x = x_low + (x_high - x_low) * i / 5
        y = 10 ** (y_low + (y_high - y_low) * i / 5)
        across, up = place(x, y)
        parts.append(f'<text x="{across:.1f}" y="{bottom + 18}" text-anchor="middle">{x:.2f}</text>')
        parts.append(f'<text x="{left - 6}" y="{up + 4:.1f}" text-anchor="end">{y:.1e}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 10}" text-anchor="middle">bits a weight</text>')
    turned = f'transform="rotate(-90 14 {(top + bottom) / 2})"'
    parts.append(f'<text x="14" y="{(top + bottom) / 2}" text-anchor="middle" {turned}>cost</text>')
    return "\n".join([*parts, "</svg>"])


# ---- the solver ------------------------------------------------------------------------------------------------------


def _by_path(options: Sequence[Option]) -> dict[str, list[Option]]:
    items: dict[str, list[Option]] = {}
    for option in options:
        if not math.isfinite(option.cost) or option.nbytes < 0:
            raise QuantizationError(
                f"allocate: {option.path} as {option.format} costs {option.cost} and takes {option.nbytes} bytes; both "
                "must be numbers, bytes not negative."
            )
        items.setdefault(option.path, []).append(option)
    if not items:
        raise QuantizationError("allocate: there are no options.")
    return items


def _worth_keeping(choices: list[Option]) -> list[Option]:
    """Those that no other beats in both bytes and cost, smallest first."""
    kept: list[Option] = []
    for option in sorted(choices, key=lambda o: (o.nbytes, o.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


class _Bound:
    """Lower bounds of what the matrices from i on cost within so many bytes."""

    def __init__(self, items: list[list[Option]], multipliers: np.ndarray):
        self.multipliers = multipliers
        rest = [np.zeros(len(multipliers))]
        for choices in reversed(items):
            best = np.min([o.cost + multipliers * o.nbytes for o in choices], axis=0)
            rest.append(rest[-1] + best)
        self.rest = rest[::-1]  # [i][multiplier]

    def of(self, i: int, left: np.ndarray) -> np.ndarray:
        bound = np.full(left.shape, -np.inf)
        for multiplier, sum_ in zip(self.multipliers, self.rest[i], strict=True):
            np.maximum(bound, sum_ - multiplier * left, out=bound)
        return bound


def _solve(items: list[list[Option]], budget: int) -> tuple[list[int], float]:
    """Returns the place of the choice of each item, and how far from the best it may be."""
    multiplier = _best_multiplier(items, budget)
    bound = _Bound(items, multiplier * np.array([0.0, 0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0]))
    known = _greedy(items, budget, multiplier)
    best = math.fsum(items[i][p].cost for i, p in enumerate(known))
    spare = np.append(
        np.cumsum([min(o.nbytes for o in c) for c in reversed(items)])[::-1], 0
    )  # least bytes of the rest
    nbytes, cost = np.zeros(1, np.int64), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []  # parent and choice of every state, item by item
    thinned = False
    for i, choices in enumerate(items):
        n = len(nbytes)
        all_bytes = np.concatenate([nbytes + o.nbytes for o in choices])
        all_costs = np.concatenate([cost + o.cost for o in choices])
        parent, choice = np.tile(np.arange(n), len(choices)), np.repeat(np.arange(len(choices)), n)
        left = budget - all_bytes
        hopeful = (left >= spare[i + 1]) & (all_costs + bound.of(i + 1, left) < best - 1e-12 * abs(best))
        chosen = np.nonzero(hopeful)[0]
        chosen = chosen[np.lexsort((all_costs[chosen], all_bytes[chosen]))]
        lowest = np.minimum.accumulate(all_costs[chosen])
        chosen = chosen[np.append(True, lowest[1:] < lowest[:-1])[: len(chosen)]]
        if len(chosen) > LIMIT:
            chosen = chosen[np.linspace(0, len(chosen) - 1, LIMIT).astype(int)]
            thinned = True
        if not len(chosen):  # nothing beats what is known
            return known, _gap(best, items, bound, budget) if thinned else 0.0
        nbytes, cost = all_bytes[chosen], all_costs[chosen]
        history.append((parent[chosen], choice[chosen]))
    state = int(np.argmin(cost))
    picks = []
    for parent, choice in reversed(history):
        picks.append(int(choice[state]))
        state = int(parent[state])
    picks = picks[::-1]
    return picks, _gap(float(cost.min()), items, bound, budget) if thinned else 0.0


def _gap(cost: float, items: list[list[Option]], bound: _Bound, budget: int) -> float:
    return max(cost - float(bound.of(0, np.array([float(budget)]))[0]), 0.0)


def _best_multiplier(items: list[list[Option]], budget: int) -> float:
    """The price of a byte at which the cheapest choices just fit the budget, by bisection."""

    def taken(price: float) -> int:
        return sum(min(c, key=lambda o: (o.cost + price * o.nbytes, o.nbytes)).nbytes for c in items)

    low, high = 0.0, 1e-30
    while taken(high) > budget:
        high *= 16
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) > budget else (low, middle)
    return high


def _greedy(items: list[list[Option]], budget: int, price: float) -> list[int]:
    """A choice that fits: the cheapest at that price, then every step up that still fits, the best first."""
    picks = [min(range(len(c)), key=lambda j: (c[j].cost + price * c[j].nbytes, c[j].nbytes)) for c in items]
    left = budget - sum(c[p].nbytes for c, p in zip(items, picks, strict=True))
    while True:
        steps = [
            ((c[p].cost - c[q].cost) / max(c[q].nbytes - c[p].nbytes, 1), i, q)
            for i, (c, p) in enumerate(zip(items, picks, strict=True))
            for q in range(p + 1, len(c))
            if c[q].nbytes - c[p].nbytes <= left and c[q].cost < c[p].cost
        ]
        if not steps:
            return picks
        _, i, q = max(steps)
        left -= items[i][q].nbytes - items[i][picks[i]].nbytes
        picks[i] = q


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room


def _literal(path: str) -> str:
    """A path as a pattern that matches it alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in path)
