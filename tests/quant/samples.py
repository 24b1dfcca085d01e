"""Weights by seed that encoders are judged on: no grid underneath, thin and heavy tails, uneven channels."""

import numpy as np

DISTRIBUTIONS = ("gaussian", "heavy", "shifted")


def weights_of(distribution: str, k: int = 1024, n: int = 96, seed: int = 0) -> np.ndarray:
    """Returns float32 `[n, k]`: n rows of k inputs, as GGUF lays a matrix out.

    "gaussian": independent normals of deviation 0.02. "heavy": Student's t with 4 degrees of freedom. "shifted":
    normals whose scale and mean vary by row and by group of 64 inputs.
    """
    rng = np.random.default_rng((seed, DISTRIBUTIONS.index(distribution)))
    if distribution == "gaussian":
        weights = rng.standard_normal((n, k))
    elif distribution == "heavy":
        weights = rng.standard_t(4, (n, k))
    else:
        groups = (n, k // 64)
        scale = np.repeat(np.exp(0.7 * rng.standard_normal(groups)), 64, axis=1)
        mean = np.repeat(0.5 * rng.standard_normal(groups), 64, axis=1)
        weights = scale * (rng.standard_normal((n, k)) + mean)
    return (0.02 * weights).astype(np.float32)


def importance_of(k: int = 1024, seed: int = 0) -> np.ndarray:
    """Returns float32 `[k]`: mean squares of activations as models have them, a few channels far above the rest."""
    return np.exp(1.5 * np.random.default_rng((seed, 99)).standard_normal(k)).astype(np.float32)


def mean_error(weights: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None = None) -> float:
    """Returns the mean square of `weights - decoded`, `[n, k]`; with an importance `[k]`, weighted by it."""
    squares = (weights.astype(np.float64) - decoded.astype(np.float64)) ** 2
    if importance is None:
        return float(squares.mean())
    return float((squares * importance).sum() / (importance.astype(np.float64).sum() * len(weights)))
