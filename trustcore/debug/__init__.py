"""What went wrong in a JAX function, found without changing it.

import trustcore as tc
tc.debug.nan_hunt(jax.grad(loss))(params, batch)      # one sentence: where the NaN came from
step = tc.debug.inspect(train_step)                   # the same function, with step.report after each call
with tc.debug.recompiles() as log: ...                # what was traced again, and which argument changed
"""

from trustcore.debug.comparing import Comparison, compare, compare_recorded, record
from trustcore.debug.hunt import Answer, nan_hunt
from trustcore.debug.inspector import Inspected, inspect
from trustcore.debug.issues import Issue, Severity
from trustcore.debug.recompiles import RecompileLog, RecompileWarning, recompiles
from trustcore.debug.report import Report
from trustcore.debug.snapshot import Breakpoint, Snapshot
from trustcore.debug.statistics import Statistics
from trustcore.debug.stepping import Quit, Session, step
from trustcore.debug.watch import (
    Condition,
    Watch,
    below,
    exceeds,
    has_inf,
    has_nan,
    predicate,
    shape_equals,
    takes,
)

__all__ = [
    "Answer",
    "Breakpoint",
    "Comparison",
    "Condition",
    "Inspected",
    "Issue",
    "Quit",
    "RecompileLog",
    "RecompileWarning",
    "Report",
    "Session",
    "Severity",
    "Snapshot",
    "Statistics",
    "Watch",
    "below",
    "compare",
    "compare_recorded",
    "exceeds",
    "has_inf",
    "has_nan",
    "inspect",
    "nan_hunt",
    "predicate",
    "recompiles",
    "record",
    "shape_equals",
    "step",
    "takes",
]
