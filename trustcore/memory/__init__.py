"""Memory: how much a function takes before it runs, what takes it, and how to make it take less.

`account` tells the peak and its owners from XLA's own plan; `fit` finds the cheapest gradient within a budget;
`explained` puts the account into the error of a function that ran out of memory. `census` and `leaks` tell what lies in
memory now, by the line that made it.
"""

from trustcore.memory.account import Account, account, account_compiled
from trustcore.memory.buffers import Buffer
from trustcore.memory.fit import Fit, Plan, fit, remat_blocks
from trustcore.memory.guard import explained
from trustcore.memory.limits import Fixed, HitRate, Predictive, Pressure
from trustcore.memory.live import Census, Growth, Held, census, leaks
from trustcore.memory.pool import Pool, PoolStats
from trustcore.memory.shelf import Shelf

__all__ = [
    "Account",
    "Buffer",
    "Census",
    "Fit",
    "Fixed",
    "Growth",
    "Held",
    "HitRate",
    "Plan",
    "Pool",
    "PoolStats",
    "Predictive",
    "Pressure",
    "Shelf",
    "account",
    "account_compiled",
    "census",
    "explained",
    "fit",
    "leaks",
    "remat_blocks",
]
