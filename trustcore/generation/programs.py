"""Keeps compiled programs between processes, in JAX's persistent compilation cache under the cache folder."""

from __future__ import annotations

import functools

import jax

from trustcore.cache import cache_folder


@functools.cache
def keep_programs() -> None:
    """Turns JAX's persistent compilation cache on, unless the caller has chosen one (or none) already.

    A user's own choice, by `jax_compilation_cache_dir` or by `jax_enable_compilation_cache=False`, stands.
    """
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if chosen is not None or not enabled:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
