"""What is worth trying for a call: the grid of a declaration, without what cannot be, the likeliest first.

Whatever is cut is kept with its reason: an implementation that refuses the call, values that a constraint forbids, more
shared memory or VMEM than the device has, values that come to the same as others, and where a chip's compiler is asked
(`assembling.py`), what does not compile for it or spills registers. Nothing of this runs anything.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from kernels_pallas import tuning
from kernels_pallas.tuning import Cost, Facts, Tunable, Values
from trustcore.tune import assembling
from trustcore.tune.device import Device, Limits, limits

MOST = 12  # candidates that are compiled and measured, the defaults not counted


@dataclasses.dataclass(frozen=True)
class Cut:
    """Values that are not tried, and why."""

    values: Values
    reason: str


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What is tried, and what is not.

    Attributes:
        tried: values, those that the cost model thinks fastest first; each implementation's own defaults among them.
        cut: what is not tried.
    """

    tried: tuple[Values, ...]
    cut: tuple[Cut, ...]


def candidates(
    tunable: Tunable, device: Device, facts: Facts, *, most: int = MOST, compiled: bool = False
) -> Candidates:
    """Returns the candidates of a call on a device.

    Args:
        tunable: the op's declaration.
        device: where they are to run.
        facts: of the call.
        most: how many are kept; each implementation's defaults are always.
        compiled: whether the chip's compiler is asked, which needs no chip: what it refuses, and what spills more than
            the defaults of its implementation, is cut, and the next in the order takes its place.

    Raises:
        TuningError: that compiler is not here, or the op or the device is none that it is asked about.
    """
    with tuning.CHOOSER(None):  # defaults are meant as they are without a table
        return _listed(tunable, device, facts, most, compiled)


def _listed(tunable: Tunable, device: Device, facts: Facts, most: int, compiled: bool) -> Candidates:
    offers = limits(device)
    cut: list[Cut] = []
    seen: dict[object, Values] = {}
    defaults: list[Values] = []
    for name in tunable.grids:
        reason = tunable.refusal(device.target, name, facts)
        if reason:
            cut.append(Cut({"implementation": name}, reason))
            continue
        plain = {"implementation": name}
        defaults.append(plain)
        seen[tunable.resolved(device.target, facts, plain)] = plain
    kept: list[tuple[float, int, Values]] = []
    for values in _grid(tunable, {d["implementation"] for d in defaults}):
        reason, estimate = _examined(tunable, device, offers, facts, values)
        made = tunable.resolved(device.target, facts, values) if not reason else None
        if not reason and made in seen:
            first = seen[made]
            reason = "the same as " + (_text(first) if len(first) > 1 else f"{first['implementation']}'s defaults")
        if reason:
            cut.append(Cut(values, reason))
            continue
        seen[made] = values
        kept.append((estimate, len(kept), values))
    kept = _in_turn(kept)
    if compiled:
        ranked = [values for _, _, values in kept]
        tried, refused = assembling.sifted(tunable, device, facts, defaults, ranked, most)
        done = len(tried) + len(refused)
        cut += [Cut(values, reason) for values, reason in refused]
        cut += [Cut(values, f"ranked {i + 1} of {len(kept)} by cost") for i, values in enumerate(ranked) if i >= done]
        return Candidates((*defaults, *tried), tuple(cut))
    cut += [Cut(values, f"ranked {i + 1} of {len(kept)} by cost") for i, (_, _, values) in enumerate(kept) if i >= most]
    return Candidates((*defaults, *(values for _, _, values in kept[:most])), tuple(cut))


def _in_turn(kept: list[tuple[float, int, Values]]) -> list[tuple[float, int, Values]]:
    """The likeliest of each implementation, then the second of each: one estimate says little of another's form."""
    places: dict[str, int] = {}
    ordered = []
    for estimated, number, values in sorted(kept, key=lambda k: k[:2]):
        place = places[values["implementation"]] = places.get(values["implementation"], -1) + 1
        ordered.append((place, estimated, number, values))
    return [(estimated, number, values) for _, estimated, number, values in sorted(ordered, key=lambda k: k[:3])]


def _grid(tunable: Tunable, able: set[str]) -> Iterator[Values]:
    for name, grid in tunable.grids.items():
        if name in able and grid:
            for chosen in itertools.product(*grid.values()):
                yield {"implementation": name, **dict(zip(grid, chosen, strict=True))}


def _examined(tunable: Tunable, device: Device, offers: Limits, facts: Facts, values: Values) -> tuple[str, float]:
    """Why values cannot be ("" if they can), and the seconds that the cost model gives them."""
    reason = tunable.constraint(device.target, facts, values)
    if reason or tunable.cost is None:
        return reason, 0.0
    cost = tunable.cost(device.target, facts, values)
    if offers.onchip is not None and cost.onchip > offers.onchip:
        where = "VMEM" if device.platform == "tpu" else "shared memory"
        return f"it holds {cost.onchip} bytes of {where}, and {device.architecture} has {offers.onchip}", math.inf
    return "", estimate(cost, offers)


def estimate(cost: Cost, offers: Limits) -> float:
    """Returns the seconds of a roofline: products or memory, whichever takes longer, and the steps.

    Programs that do not fill the last round leave a part of the chip idle; a tile that does not stay in the nearest
    cache is written to memory and read again. For an order of candidates, and nothing else.
    """
    rounds = math.ceil(cost.programs / offers.slots)
    idle = rounds * offers.slots / cost.programs if cost.programs > 1 else 1.0
    spilled = 2.0 * cost.tile * cost.steps if cost.tile > offers.cache else 0.0
    return max(cost.flops / offers.flops * idle, (cost.nbytes + spilled) / offers.bandwidth) + cost.steps * offers.step


def _text(values: Values) -> str:
    return ", ".join(f"{n} {v}" for n, v in values.items() if n != "implementation")


def described(values: Values) -> str:
    """Returns values as a person reads them: "xla: block_q 128, block_k 512", "defaults" for none."""
    if not values:
        return "defaults"
    rest = _text(values)
    return f"{values.get('implementation', 'any')}: {rest or 'defaults'}"
