# SPDX-License-Identifier: Apache-2.0
"""Fill the tables between `<!-- begin NAME -->` and `<!-- end NAME -->` in the documentation: `make docs`.

`--check` changes nothing and exits with status 1 if a page is out of date.
"""

import re
import sys
from pathlib import Path

from hf_lowprec.describe import format_table, recipe_table
from hf_lowprec.optim.table import state_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/recipes.md", "docs/numerics.md", "docs/optimizers.md")
TABLES = {"recipes": recipe_table, "formats": format_table, "states": state_table}


def filled(text: str) -> str:
    """`text` with every table as it should be. Raises KeyError for a marker that names no table."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}{match[3]}"

    return re.sub(r"(<!-- begin (\w+)[^>]*-->)\n.*?(<!-- end \2 -->)", block, text, flags=re.DOTALL)


def main() -> int:
    stale = [page for page in PAGES if (text := (ROOT / page).read_text(encoding="utf-8")) != filled(text)]
    if "--check" in sys.argv[1:]:
        for page in stale:
            print(f"{page} is out of date: make docs")
        return bool(stale)
    for page in stale:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"updated {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
