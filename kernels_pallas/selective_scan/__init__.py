"""Mamba's selective scan: a state of S numbers a channel that decays and takes in, at rates that each token chooses.

`selective_scan` computes it forward and backward; `selective_scan_oracle` is the truth it is tested against; `explain`
says which implementation a call takes.
"""

from kernels_pallas.selective_scan.front import SELECTIVE_SCAN, explain, selective_scan
from kernels_pallas.selective_scan.oracle import selective_scan_oracle

__all__ = ["SELECTIVE_SCAN", "explain", "selective_scan", "selective_scan_oracle"]
