"""`optimize`: a function in plain jnp gets the fast kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trustcore.graph.rewriting.engine import Rewritten, rewrite
from trustcore.graph.rewriting.proof import BUDGET
from trustcore.graph.rewriting.rule import Finding


def kernel_rules() -> tuple[Finding, ...]:
    """Returns the rules of `optimize`: attention, losses over a vocabulary, norms, gated and biased activations."""
    from trustcore.graph.rewriting.attention import ATTENTION
    from trustcore.graph.rewriting.cross_entropy import CROSS_ENTROPY
    from trustcore.graph.rewriting.layers import ACTIVATIONS, NORMS

    return (ATTENTION, CROSS_ENTROPY, *NORMS, *ACTIVATIONS)


def optimize(
    fn: Callable[..., Any], *, more: Sequence[Finding] = (), prove: bool = True, proof_budget: int = BUDGET
) -> Rewritten:
    """Returns `fn` with softmax attention, cross-entropy, norms and activations computed by `kernels_pallas`.

    Attention then takes O(T) memory instead of O(T^2), forward and backward; the logits of a vocabulary of 4096 columns
    or more are never whole in memory (losses are faster then, gradients a sixth slower where the table has one); norms
    and activations keep fewer arrays for the backward pass. Differentiate the result, not what is given: in a program
    that holds a backward pass already, the softmax weights are used twice and stay. What comes back has one
    reverse-mode derivative and no forward mode, as the kernels have.

    >>> fast = optimize(loss)                                                       # doctest: +SKIP
    >>> gradients = jax.jit(jax.grad(fast))(params, batch); print(fast.report)      # doctest: +SKIP

    Args:
        fn: a pure function of arrays in pytrees: a forward pass, a loss.
        more: rules that are tried before those of `kernel_rules`.
        prove, proof_budget: see `rewrite`.
    """
    return rewrite(fn, [*more, *kernel_rules()], strategy="fixpoint", prove=prove, proof_budget=proof_budget)
