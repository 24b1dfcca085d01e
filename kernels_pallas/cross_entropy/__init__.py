"""Softmax cross-entropy over a large vocabulary, `logsumexp(hidden @ table) - logit of the label`, without the logits.

`cross_entropy` computes it by chunks of the vocabulary, forward and backward; `cross_entropy_oracle` is the truth it is
tested against; `explain` says which implementation a call takes.
"""

from kernels_pallas.cross_entropy.front import CROSS_ENTROPY, cross_entropy, explain
from kernels_pallas.cross_entropy.oracle import cross_entropy_oracle

__all__ = ["CROSS_ENTROPY", "cross_entropy", "cross_entropy_oracle", "explain"]
