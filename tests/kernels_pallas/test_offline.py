"""What compiling for an absent GPU says: descriptions of chips, the assembler's reports, and what is missing."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from kernels_pallas import _compat, offline

SAID = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attention_dkv' for 'sm_90a'
ptxas info    : Function properties for attention_dkv
    152 bytes stack frame, 180 bytes spill stores, 184 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 152 bytes cumulative stack size
ptxas info    : Compiling entry function 'norm_forward' for 'sm_80'
ptxas info    : Function properties for norm_forward
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""


def test_reports_of_the_assembler_are_read() -> None:
    assert list(offline.parsed(SAID)) == [
        ("attention_dkv", "sm_90a", 168, 364, 152),
        ("norm_forward", "sm_80", 40, 0, 0),
    ]
    assert list(offline.parsed("ptxas warning : nothing to see")) == []


def test_chips_are_those_that_lowering_knows() -> None:
    for name, chip in offline.CHIPS.items():
        text = chip.description
        assert text.count("{") == text.count("}") and f"shared_memory_per_block_optin: {chip.shared}" in text, name
        assert _compat._CAPABILITIES[chip.kind] == "{}.{}".format(*chip.capability), name
        assert chip.shared < chip.shared_core


def test_without_the_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str, *_: Any) -> Any:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", found)
    with pytest.raises(offline.OfflineError, match=r"jax-cuda13-plugin.*write: make aot"):
        offline.cuda_folder()
