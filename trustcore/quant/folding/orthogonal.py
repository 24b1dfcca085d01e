"""Orthogonal matrices to rotate channels with: uniformly random ones, and Hadamard matrices with random signs.

A Hadamard matrix has entries of one magnitude, so it spreads a single outlier over all channels evenly. Sizes are
2^k * m with m = 1 (Sylvester), or m = q + 1 for a prime q that is 3 mod 4, or m = 2 (q + 1) for a prime q that is 1 mod
4 (Paley, 1933): m = 12, 20, 28, 36, 44, 60, 68, 76, 84, ... For every one H @ H.T = n I holds exactly, in integers.
"""

from __future__ import annotations

import functools

import numpy as np

from trustcore.errors import QuantizationError


def random_orthogonal(size: int, *, seed: int = 0) -> np.ndarray:
    """Returns a float64 `[size, size]` orthogonal matrix, uniform over all of them.

    The Q of a Gaussian matrix's QR, with the signs that make R's diagonal positive (Mezzadri, math-ph/0609050).
    """
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return q * np.sign(np.diagonal(r))


def random_hadamard(size: int, *, seed: int = 0) -> np.ndarray:
    """Returns the float64 orthogonal matrix `diag(signs) @ H / sqrt(size)`, the signs random.

    Raises:
        QuantizationError: no Hadamard matrix of that size is known here.
    """
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size)
    return signs[:, None] * hadamard(size) / np.sqrt(size)


@functools.lru_cache(maxsize=8)
def hadamard(size: int) -> np.ndarray:
    """Returns an int8 `[size, size]` matrix of ones and minus ones with `H @ H.T = size * I`.

    Raises:
        QuantizationError: no construction here gives that size.
    """
    core, doublings = size, 0
    smallest = None
    while core >= 1:
        found = _core(core)
        if found is not None:
            smallest = (found, doublings)  # the smaller the core, the more even the matrix
        if core % 2:
            break
        core, doublings = core // 2, doublings + 1
    if smallest is None:
        raise QuantizationError(
            f"hadamard: there is no construction of size {size}; sizes are 2^k * m with m = 1, q + 1 (q a prime, "
            '3 mod 4) or 2 (q + 1) (q a prime, 1 mod 4). Rotate with a random matrix instead: "orthogonal".'
        )
    matrix, doublings = smallest
    for _ in range(doublings):  # Sylvester
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix.setflags(write=False)
    return matrix


def _core(size: int) -> np.ndarray | None:
    """Returns a Hadamard matrix that is no doubling of another, if this size has one."""
    if size in (1, 2):
        return np.array([[1]], np.int8) if size == 1 else np.array([[1, 1], [1, -1]], np.int8)
    if size % 4:
        return None
    if _is_prime(size - 1):  # and so 3 mod 4
        matrix = _bordered(_residues(size - 1), -1)
        return (matrix + np.eye(size, dtype=np.int8)).astype(np.int8)
    q = size // 2 - 1
    if _is_prime(q) and q % 4 == 1:
        matrix, eye = _bordered(_residues(q), 1), np.eye(q + 1, dtype=np.int8)
        ones = np.array([[1, 1], [1, -1]], np.int8)
        turned = np.array([[1, -1], [-1, -1]], np.int8)
        return (np.kron(matrix, ones) + np.kron(eye, turned)).astype(np.int8)
    return None


def _residues(q: int) -> np.ndarray:
    """Returns Jacobsthal's matrix `[q, q]`: 1 where row minus column is a square modulo q, -1 where not, 0 for 0."""
    squares = {i * i % q for i in range(1, q)}
    character = np.array([0, *(1 if i in squares else -1 for i in range(1, q))], np.int8)
    return character[(np.arange(q)[:, None] - np.arange(q)) % q]


def _bordered(matrix: np.ndarray, sign: int) -> np.ndarray:
    """Returns the matrix with a row of ones above, a column of `sign` to the left, and 0 in the corner."""
    q = len(matrix)
    whole = np.ones((q + 1, q + 1), np.int8)
    whole[1:, 0] = sign
    whole[0, 0] = 0
    whole[1:, 1:] = matrix
    return whole


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
