"""`nan_hunt`: where did the NaN come from, in one call and one answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from trustcore.debug.inspector import Inspected
from trustcore.debug.issues import Input, Issue, cause_of
from trustcore.debug.report import Report
from trustcore.debug.snapshot import Snapshot, snapshot_at
from trustcore.debug.watch import Watch
from trustcore.graph.modules import split_arguments
from trustcore.graph.observe import index_of


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was found.

    Attributes:
        issue: the NaN that reaches a result (else the Inf), at the first place where it is; None where all is finite.
        root: the first thing that went wrong on the way there: an Inf of which a NaN was made, an argument. It is
            `issue` itself where nothing went before.
        snapshot: the equation of `root` with its inputs; None where that is an argument.
        report: of the whole call.
        outputs: what the function returned.
    """

    issue: Issue | None
    root: Issue | None
    snapshot: Snapshot | None
    report: Report
    outputs: Any

    @property
    def found(self) -> bool:
        """Whether a result holds NaN or Inf."""
        return self.issue is not None

    def __str__(self) -> str:
        if self.issue is None:
            return "All results are finite."
        text = self.issue.message
        if self.root is not None and self.root is not self.issue:
            text = f"{self.root.message} Of it came this: {self.issue.message}"
        if self.issue.reaches:
            names = ", ".join(self.issue.reaches[:3]) + (" and others" if len(self.issue.reaches) > 3 else "")
            text += f" It reaches {names}."
        if self.snapshot is not None:
            bad = self.snapshot.first_bad()
            if bad is not None and bad[1]:
                text += f" The first such element is {list(bad[1])}."
        return text

    def to_dict(self) -> dict[str, Any]:
        """Returns the answer as plain data."""
        return {
            "sentence": str(self),
            "issue": self.issue.to_dict() if self.issue else None,
            "root": self.root.to_dict() if self.root else None,
        }


def nan_hunt(fn: Callable[..., Any], *, show: Callable[[str], Any] | None = print) -> Callable[..., Answer]:
    """Returns a function that runs `fn` once and says where NaN or Inf in its results come from.

        nan_hunt(jax.grad(loss))(params, batch)

    It prints one sentence (`show=None`: nothing) and returns an `Answer`, which has the same as data, with the equation
    to run again alone.

    Args:
        fn: a pure function of pytrees, as for `inspect`.
        show: what is called with the sentence.
    """
    inspected = Inspected(fn, (Watch(),), trace=False, baseline=None, limit=1000)

    def hunt(*args: Any, **kwargs: Any) -> Answer:
        outputs, report = inspected.run(*args, **kwargs)
        answer = _answer(report, outputs, split_arguments(args, kwargs)[0])
        if show is not None:
            show(str(answer))
        return answer

    return hunt


def _answer(report: Report, outputs: Any, leaves: list[Any]) -> Answer:
    bad = [issue for issue in report.all_issues if issue.kind in ("nan", "inf") and issue.reaches]
    nans = [issue for issue in bad if issue.kind == "nan"]
    issue = (nans or bad or [None])[0]
    if issue is None:
        return Answer(None, None, None, report, outputs)
    root = issue
    if len(issue.chain) > 1:
        for other in report.all_issues:
            if other.chain and other.chain[0] == issue.chain[0] and other.kind == "inf":
                root = other
    snapshot = None
    if root.address is not None:
        places = [p for _, _, p in report.readings.measured() if p.node.address == root.address]
        place = next((p for p in places if index_of(p.node, p.turns) == root.turns and p.shard == root.shard), None)
        if place is not None:
            snapshot = snapshot_at(report.traced.program, leaves, place.node, place.turns, place.shard, root)
            into, out = snapshot.statistics()
            cause = cause_of(root.address.primitive, root.kind, out[0] or root.statistics, into)
            inputs = tuple(Input(i.source, s) for i, s in zip(root.inputs, into, strict=True))
            exact = dataclasses.replace(root, cause=cause or root.cause, inputs=inputs)
            snapshot = dataclasses.replace(snapshot, issue=exact)
            issue, root = (exact if issue is root else issue), exact
    return Answer(issue, root, snapshot, report, outputs)
