"""Sound to log-mel frames, the input of Whisper (Radford et al., arXiv 2212.04356, section 2.2).

    waveform ── frames of 400 samples every 160, Hann window ── |FFT|^2 ── mel filters ── log10, at most 8 below the top

Mel filters are triangles on Slaney's scale (linear up to 1000 Hz, logarithmic above), each of area one.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

RATE = 16000  # samples a second
WINDOW = 400  # samples
HOP = 160  # samples


def log_mel(waveform: Float[Array, "B S"], bins: int = 80) -> Float[Array, "B frames bins"]:
    """Returns `S // 160` frames a row, float32.

    Args:
        waveform: mono sound of 16000 samples a second, from -1 to 1, padded with zeros to the length the model reads
            (30 seconds): the loudest part of a whole row is what its other parts are measured by.
        bins: mel filters, 80 or, from Whisper large-v3 on, 128.

    Both ends are mirrored by half a window. Differentiable in the waveform.
    """
    x = jnp.pad(waveform.astype(jnp.float32), ((0, 0), (WINDOW // 2, WINDOW // 2)), mode="reflect")
    count = waveform.shape[1] // HOP
    at = np.arange(count)[:, None] * HOP + np.arange(WINDOW)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    frames = x[:, at] * jnp.asarray(window, jnp.float32)[None, None]
    spectrum = jnp.fft.rfft(frames)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)  # [B, frames, 201]
    mel = jnp.matmul(power, jnp.asarray(mel_filters(bins), jnp.float32), precision="highest")
    log = jnp.log10(jnp.maximum(mel, 1e-10))
    log = jnp.maximum(log, jnp.max(log, axis=(1, 2), keepdims=True) - 8.0)
    return (log + 4.0) / 4.0


def padded(waveform: np.ndarray, seconds: int = 30) -> np.ndarray:
    """Returns a waveform `[S]` as one row of `seconds`, float32 `[1, seconds * 16000]`: cut, or padded with silence."""
    row = np.zeros((1, seconds * RATE), np.float32)
    part = np.asarray(waveform, np.float32)[: row.shape[1]]
    row[0, : part.size] = part
    return row


@functools.cache
def mel_filters(bins: int) -> np.ndarray:
    """Returns float64 `[201, bins]`: how much of each frequency of the spectrum a mel filter takes."""
    edges = _hertz(np.linspace(0.0, _mel(RATE / 2), bins + 2))
    frequency = np.linspace(0.0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising = (frequency - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - frequency) / np.diff(edges)[1:]
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))


# Slaney's scale: 3 mel each 200 Hz up to 1000 Hz, above it 27 mel for each factor of 6.4.
_KNEE, _STEP = 1000.0, 27.0 / np.log(6.4)


def _mel(hertz: float) -> float:
    return 15.0 + _STEP * np.log(hertz / _KNEE)


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15.0, mel * 200.0 / 3.0, _KNEE * np.exp((mel - 15.0) / _STEP))
