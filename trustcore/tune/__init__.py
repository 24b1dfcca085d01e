"""Tuning: block sizes, implementations and program forms, measured on the device at hand and kept for it.

`search` measures a call now, `best` says what would be taken for it and why, `using` and `set_mode` let ops read what
was found. `calls_of` lists what a program asks; `register` makes an op of your own known. See docs/tuning.md.
"""

from kernels_pallas.tuning import Cost, Facts, Tunable, Values
from trustcore.tune.asked import calls_of
from trustcore.tune.choosing import Choice, best, current_mode, set_mode, using
from trustcore.tune.device import Device, this_device
from trustcore.tune.listing import Candidates, Cut, candidates
from trustcore.tune.measure import pinned
from trustcore.tune.registry import declared, names, register
from trustcore.tune.searching import Result, search
from trustcore.tune.table import Entry

__all__ = [
    "Candidates",
    "Choice",
    "Cost",
    "Cut",
    "Device",
    "Entry",
    "Facts",
    "Result",
    "Tunable",
    "Values",
    "best",
    "calls_of",
    "candidates",
    "current_mode",
    "declared",
    "names",
    "pinned",
    "register",
    "search",
    "set_mode",
    "this_device",
    "using",
]
