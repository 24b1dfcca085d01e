"""The `config.json` beside the weights of a model, which every format but GGUF leaves the configuration to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trustcore.weights.json_file import read_object

MAX_CONFIG_BYTES = 2**24


def with_config(metadata: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns `metadata` with "config": the `config.json` beside `path`, and nothing else that goes by that name.

    Raises:
        CheckpointError: the `config.json` is broken.
    """
    kept = {key: value for key, value in metadata.items() if key != "config"}
    config = path.with_name("config.json")
    if os.path.lexists(config):
        kept["config"] = read_object(config, "config", MAX_CONFIG_BYTES, unique=False)
    return kept
