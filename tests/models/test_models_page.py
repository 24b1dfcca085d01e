"""docs/models.md is what the table of families gives today."""

import runpy
from pathlib import Path

from trustcore.models.families import FAMILIES

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date():
    made = runpy.run_path(str(DOCS / "write_models.py"))["page"]()
    assert (DOCS / "models.md").read_text(encoding="utf-8") == made, "run python docs/write_models.py"
    assert all(f"| `{name}` |" in made for name in FAMILIES)
