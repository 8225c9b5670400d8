"""Write the tables of README.md and docs/performance.md from the kept records, between their markers.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, each on a line of its own.

    python -m benchmarks.render_tables
    python -m benchmarks.render_tables --check
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks.checkout import ROOT
from benchmarks.records import RESULTS
from benchmarks.tables import TABLES, make_table

PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")
_MARKED = re.compile(r"^<!-- table: (?P<name>[\w-]+) -->$.*?^<!-- end -->$", flags=re.MULTILINE | re.DOTALL)


def main() -> None:
    """Rewrite the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page is not up to date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    arguments = parser.parse_args()
    stale = []
    for page in arguments.pages:
        text = page.read_text(encoding="utf-8")
        rendered = render(text, arguments.results)
        if rendered != text:
            stale.append(page)
            if not arguments.check:
                page.write_text(rendered, encoding="utf-8")
                print(page)
    if arguments.check and stale:
        names = ", ".join(page.name for page in stale)
        sys.exit(f"tables of {names} are not those of {arguments.results}: python -m benchmarks.render_tables")


def render(text: str, results: Path = RESULTS) -> str:
    """Return a page with every marked table made anew."""
    opened, found = text.count("<!-- table: "), list(_MARKED.finditer(text))
    if opened != len(found):
        raise SystemExit(f"{opened} tables begin and {len(found)} end: close each with <!-- end -->")
    for match in found:
        if match["name"] not in TABLES:
            raise SystemExit(f"no table is called {match['name']}: use {', '.join(TABLES)}")

    def replace(match: re.Match[str]) -> str:
        return f"<!-- table: {match['name']} -->\n{make_table(match['name'], results)}\n<!-- end -->"

    return _MARKED.sub(replace, text)


if __name__ == "__main__":
    main()
