"""Memory: how much a function takes before it runs, what takes it, and how to make it take less.

`account` tells the peak and its owners from XLA's own plan; `fit` finds the cheapest gradient within a budget;
`explained` puts the account into the error of a function that ran out of memory.
"""

from trustcore.memory.account import Account, account, account_compiled
from trustcore.memory.buffers import Buffer
from trustcore.memory.fit import Fit, Plan, fit, remat_blocks
from trustcore.memory.guard import explained

__all__ = ["Account", "Buffer", "Fit", "Plan", "account", "account_compiled", "explained", "fit", "remat_blocks"]
