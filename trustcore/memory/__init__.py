"""Memory: how much a function takes before it runs, what takes it, and how to make it take less.

Before it runs: `account` tells the peak and its owners from XLA's own plan, `difference` compares two, `donations` says
which donated arguments are reused; `savings` what each way to take less would save; `fit` finds the cheapest gradient
within a budget; `explained` puts the account into the error of a function that ran out of memory. While it runs:
`census`, `leaks` and `StepPeaks` tell what lies there; `Pool`, `offload` and `Shelf` keep arrays for their next use, on
the device, the host or a disk. `flame_graph` and `trace_events` draw.
"""

from trustcore.memory.account import Account, account, account_compiled
from trustcore.memory.buffers import Buffer
from trustcore.memory.difference import Change, Difference, difference
from trustcore.memory.donation import Donation, Donations, donations
from trustcore.memory.fit import Fit, Plan, fit, remat_blocks
from trustcore.memory.flame import flame_graph
from trustcore.memory.guard import explained
from trustcore.memory.limits import Fixed, HitRate, Predictive, Pressure
from trustcore.memory.live import Census, Growth, Held, census, leaks
from trustcore.memory.offload import activation_policy, has_host_memory, memory_kinds, offload, offloaded, onload
from trustcore.memory.pool import Pool, PoolStats
from trustcore.memory.savings import Saving, Savings, savings
from trustcore.memory.shelf import Shelf
from trustcore.memory.steps import Fragmentation, StepPeak, StepPeaks, fragmentation
from trustcore.memory.timeline import trace_events

__all__ = [
    "Account",
    "Buffer",
    "Census",
    "Change",
    "Difference",
    "Donation",
    "Donations",
    "Fit",
    "Fixed",
    "Fragmentation",
    "Growth",
    "Held",
    "HitRate",
    "Plan",
    "Pool",
    "PoolStats",
    "Predictive",
    "Pressure",
    "Saving",
    "Savings",
    "Shelf",
    "StepPeak",
    "StepPeaks",
    "account",
    "account_compiled",
    "activation_policy",
    "census",
    "difference",
    "donations",
    "explained",
    "fit",
    "flame_graph",
    "fragmentation",
    "has_host_memory",
    "leaks",
    "memory_kinds",
    "offload",
    "offloaded",
    "onload",
    "remat_blocks",
    "savings",
    "trace_events",
]
