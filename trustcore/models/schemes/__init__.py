"""Packed matrices of other packages, read as they are: one file for each package's layout.

`scheme_of(config.json)` gives the `Scheme` that finds a model's packed matrices, or None for a model that has none.
`fields` makes the fields of the scaled formats; adding a scheme is adding a file and an entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trustcore.errors import ModelError
from trustcore.models.schemes.awq import AWQ
from trustcore.models.schemes.bitsandbytes import BitsAndBytes
from trustcore.models.schemes.compressed_tensors import CompressedTensors
from trustcore.models.schemes.float4 import GptOss
from trustcore.models.schemes.float8 import Float8
from trustcore.models.schemes.gptq import GPTQ
from trustcore.models.schemes.scheme import Packed, Scheme
from trustcore.models.values import Values

__all__ = ["SCHEMES", "Packed", "Scheme", "scheme_of"]

# By the `quant_method` of config.json.
SCHEMES: Mapping[str, Callable[[Values], Scheme]] = {
    "gptq": GPTQ,
    "awq": AWQ,
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
    "fp8": Float8,
    "fbgemm_fp8": Float8,
    "mxfp4": GptOss,
}


def scheme_of(config: Mapping[str, Any]) -> Scheme | None:
    """Returns how the model of a parsed `config.json` spells its packed matrices; None: it says nothing of any.

    Raises:
        ModelError: the method, or a variant of it, is not supported; names those that are.
    """
    given = config.get("quantization_config") or config.get("compression_config")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise ModelError(f"config.json: quantization_config is {str(given)[:64]!r}; expected an object.")
    values = Values(given, "config.json: quantization_config")
    method = given.get("quant_method")
    if method is None and ("load_in_4bit" in given or "load_in_8bit" in given):
        method = "bitsandbytes"  # files from before quant_method was written
    if method is None and "config_groups" in given:
        method = "compressed-tensors"
    make = SCHEMES.get(method) if isinstance(method, str) else None
    if make is None:
        raise ModelError(
            f"config.json: quantization_config.quant_method is {str(method)[:64]!r}; supported: {', '.join(SCHEMES)}."
        )
    try:
        return make(values)
    except ModelError as error:
        raise ModelError(f"config.json ({method}): {str(error).removeprefix('config.json: ')}") from None
