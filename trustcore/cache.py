"""Where trustcore keeps what it can make or fetch again: models, compiled kernels, compiled programs.

`TRUSTCORE_CACHE` moves the whole folder; otherwise it is the user's cache folder as the operating system names it.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """Returns a folder inside the cache, created if need be.

    Args:
        *parts: path below the cache folder: `cache_folder("models", "smollm2")`.
    """
    root = os.environ.get("TRUSTCORE_CACHE")
    if root:
        base = Path(root).expanduser()
    else:
        import platformdirs

        base = Path(platformdirs.user_cache_dir("trustcore"))
    folder = base.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
