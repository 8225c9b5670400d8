"""README.md and docs/ name only files that exist, and their links lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FOLDERS = ("build_engines", "runtime", "plugins", "tests", "benchmarks", "docs", ".ci", ".typing")
ARCHITECTURE_LINES = 140


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _named_files(page: Path) -> Iterator[str]:
    """Yield what stands in backticks and looks like a path of this repository, or like one of its files."""
    for code in re.findall(r"`([^`\n]+)`", _prose(page)):
        path = code.split("::")[0]
        if re.fullmatch(r"[\w./-]+", path) and (
            path.split("/")[0] in FOLDERS or path.endswith((".py", ".toml", ".md"))
        ):
            yield path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_named_file_exists(page: Path) -> None:
    sources = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    for path in _named_files(page):
        assert (ROOT / path).exists() or path in sources, f"{page.name} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\[[^\]]+\]\(([^)\s]+)\)", _prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in _anchors(linked), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_fit_the_width_of_the_sources(page: Path) -> None:
    for number, line in enumerate(_prose(page).splitlines(), start=1):
        assert len(line) <= 120 or line.startswith("|"), f"{page.name}: line {number} of its prose is {len(line)} wide"


def test_architecture_is_one_page() -> None:
    assert len((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()) <= ARCHITECTURE_LINES


def test_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    modules = [path for folder in FOLDERS[:3] for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
    missing = [path.relative_to(ROOT).as_posix() for path in modules if f"`{path.name}`" not in text]
    assert not missing, f"docs/architecture.md says nothing of {missing}"


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}
