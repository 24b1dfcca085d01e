"""A report as an interactive tree in notebooks, by treescope, where that is installed.

Scopes fold and unfold; those with NaN or Inf are open and red. Each value is a line: its address, dtype and shape, the
magnitudes as a sparkline, range and root mean square.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

from trustcore.debug.statistics import Statistics

if TYPE_CHECKING:
    from trustcore.debug.report import Report


def has_treescope() -> bool:
    """Returns whether the package is there."""
    try:
        return importlib.util.find_spec("treescope") is not None
    except ValueError:  # it was taken out of `sys.modules`
        return False


def tree_html(report: Report) -> str:
    """Returns the HTML of the tree of all values; needs treescope."""
    import treescope

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it looks through all of NumPy, old names included
        page = treescope.render_to_html(_Scope("values", report.tree(), top=True), roundtrip_mode=False)
    assert isinstance(page, str)
    return page


class _Scope:
    """A branch of the tree."""

    def __init__(self, name: str, inner: dict[str, Any], *, top: bool = False):
        self.inner = {
            key: _Scope(key, value) if isinstance(value, dict) else _Value(key, value) for key, value in inner.items()
        }
        self.name, self.top = name, top
        self.count: int = sum(child.count for child in self.inner.values())
        self.bad: int = sum(child.bad for child in self.inner.values())

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from treescope import rendering_parts as parts

        faults = f", {self.bad} not finite" if self.bad else ""
        head = parts.text(f"{self.name} ")
        if self.bad:
            head = parts.error_color(head)
        note = parts.comment_color(parts.text(f"({self.count} values{faults})"))
        return parts.build_foldable_tree_node_from_children(
            prefix=parts.siblings(head, note, parts.text(" {")),
            children=[subtree_renderer(child, path=None) for child in self.inner.values()],
            suffix="}",
            path=None,
            expand_state=parts.ExpandState.EXPANDED if self.top or self.bad else parts.ExpandState.COLLAPSED,
        )


class _Value:
    """A leaf: the statistics of a value."""

    count = 1

    def __init__(self, name: str, statistics: Statistics):
        self.name, self.statistics = name, statistics
        self.bad = int(bool(statistics.bad))

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from treescope import rendering_parts as parts

        del subtree_renderer
        name = parts.error_color(parts.text(self.name)) if self.bad else parts.text(self.name)
        figures = parts.comment_color(parts.text(f"  {self.statistics.short}  "))
        bars = parts.custom_text_color(parts.text(self.statistics.sparkline), "#4477aa")
        return parts.build_one_line_tree_node(line=parts.siblings(name, figures, bars), path=None)
