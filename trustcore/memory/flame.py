"""A flame graph of what lies in memory: stacks of calls as boxes, as wide as the bytes of the arrays that they made.

    Path("memory.svg").write_text(flame_graph(census()))

The outermost call is at the top. One SVG without scripts or fonts of its own: a browser shows the whole name and
the bytes of a box under the pointer. Gregg, "The Flame Graph", CACM 59(6), 2016.
"""

from __future__ import annotations

import dataclasses
import html
import zlib

from trustcore import units
from trustcore._jax import Frame
from trustcore.graph.program import full_place, is_library, place
from trustcore.memory.live import Census

WIDTH, ROW, TOP = 1200, 18, 26
CHARACTER = 6.8  # pixels of a letter at this size
LEAST = 0.5  # pixels of a box that is drawn


@dataclasses.dataclass
class _Box:
    nbytes: int = 0
    count: int = 0
    below: dict[tuple[str, str, bool], _Box] = dataclasses.field(default_factory=dict)


def flame_graph(found: Census, *, library: bool = False) -> str:
    """Returns the SVG of a census.

    Args:
        found: what lies in memory.
        library: whether calls within installed libraries are drawn as well; without them a stack is the user's own.
    """
    root = _Box()
    for held in found.held:
        if held.kind != "buffer" or not held.nbytes:
            continue
        stack = [f for f in reversed(held.stack) if library or not is_library(f.file)] or [held.frame]
        box = root
        _add(box, held.nbytes, held.count)
        for frame in stack:
            box = box.below.setdefault(_named(frame), _Box())
            _add(box, held.nbytes, held.count)
    depth = _depth(root)
    height = TOP + ROW * depth + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="monospace" font-size="11">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="6" y="17" fill="#222">{units.size(root.nbytes)} in {root.count} arrays, by the calls that made '
        "them</text>",
    ]
    _draw(root, 0.0, 0, WIDTH / max(root.nbytes, 1), root.nbytes, parts)
    return "\n".join([*parts, "</svg>", ""])


def _add(box: _Box, nbytes: int, count: int) -> None:
    box.nbytes, box.count = box.nbytes + nbytes, box.count + count


def _named(frame: Frame) -> tuple[str, str, bool]:
    line = place(frame) if frame.file else ""
    return f"{frame.function} {line}".strip(), f"{frame.function} ({full_place(frame)})", is_library(frame.file)


def _depth(box: _Box) -> int:
    return max((1 + _depth(inner) for inner in box.below.values()), default=0)


def _draw(box: _Box, left: float, row: int, scale: float, total: int, parts: list[str]) -> None:
    for (short, whole, foreign), inner in sorted(box.below.items(), key=lambda item: -item[1].nbytes):
        width = inner.nbytes * scale
        if width >= LEAST:
            y = TOP + row * ROW
            told = f"{whole}: {units.size(inner.nbytes)} in {inner.count} arrays, {inner.nbytes / total:.1%}"
            shown = short if len(short) * CHARACTER < width - 6 else short[: max(0, int((width - 14) / CHARACTER))]
            shown = shown + "…" if shown and shown != short else shown
            text = f'<text x="{left + 3:.1f}" y="{y + 13}" fill="#111">{html.escape(shown)}</text>' if shown else ""
            parts.append(
                f"<g><title>{html.escape(told)}</title>"
                f'<rect x="{left:.2f}" y="{y}" width="{max(width - 0.6, 0.4):.2f}" height="{ROW - 1}" rx="2" '
                f'fill="{_color(short, foreign)}"/>{text}</g>'
            )
            _draw(inner, left, row + 1, scale, total, parts)
        left += width


def _color(name: str, foreign: bool) -> str:
    """Warm for the user's own calls, grey for libraries; the same name has the same shade."""
    shade = zlib.crc32(name.encode()) % 40
    return f"hsl(220,8%,{78 + shade // 4}%)" if foreign else f"hsl({18 + shade},78%,{66 + shade // 5}%)"
