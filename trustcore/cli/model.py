"""Loading a model for a command, with one bar while it is fetched and one while it is read."""

from __future__ import annotations

import functools
from typing import Any

from trustcore.cli import console, options


def load_model(source: str, dtype: options.FloatType | None) -> Any:
    """Returns the model that `source` names; `dtype` None keeps its weights as they are stored."""
    import trustcore
    from trustcore.catalogue import resolve

    with console.progress_bar() as report:
        path = resolve(source, progress=report)
        return trustcore.load(
            path, progress=functools.partial(report, "loading"), **options.given(dtype=dtype and dtype.value)
        )
