"""The programs' help is the one in docs/help, and what needs no model loads no framework.

python tests/test_cli_help.py       # writes docs/help anew
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HELP = ROOT / "docs" / "help"
WIDTH = 100
UPDATE = "python tests/test_cli_help.py"

PAGES = {
    "cf-generate.txt": ("cf-generate", "--help"),
    "cf-build.txt": ("cf-build", "--help"),
    **{
        f"cf-build-{name}.txt": ("cf-build", name, "--help")
        for name in ("build", "plan", "verify", "inspect", "doctor")
    },
}

# Standard library `-X importtime` would do as well; the list of modules says it without parsing.
PROBE = """
import sys
from causal_forcing.{module} import main
try:
    main({words!r})
except SystemExit as leaving:
    code = leaving.code or 0
print("LOADED", code, *[name for name in {frameworks!r} if name in sys.modules], file=sys.stderr)
"""
FRAMEWORKS = ("torch", "onnx", "onnxruntime", "transformers", "tokenizers", "av", "huggingface_hub")


def render(*command: str) -> str:
    """Return a help page as it looks in a pipe, whatever terminal and CI service this runs under."""
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "SYSTEMROOT")}
    environment |= {"COLUMNS": str(WIDTH), "TERM": "dumb", "NO_COLOR": "1", "PYTHONUTF8": "1"}
    program, *words = command
    finished = subprocess.run(
        [str(Path(sys.executable).parent / program), *words],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert not finished.stderr, finished.stderr
    return "\n".join(line.rstrip() for line in finished.stdout.strip().splitlines()) + "\n"


def words(page: str) -> list[str]:
    """Return a page's words in order, without frames and value types: those change between typer's releases."""
    page = re.sub(r"[\u2500-\u257f{}*]", " ", page)
    page = re.sub(r"<[a-z ]+>|\b(TEXT|INTEGER|PATH)\b", " ", page)
    return page.split()


@pytest.mark.parametrize("page", PAGES)
def test_help_is_the_one_in_docs(page: str) -> None:
    assert words(render(*PAGES[page])) == words((HELP / page).read_text(encoding="utf-8")), f"if meant, run: {UPDATE}"


def test_docs_hold_no_other_help() -> None:
    assert {path.name for path in HELP.iterdir()} == set(PAGES)


def test_every_option_has_help() -> None:
    for page in PAGES.values():
        for line in render(*page).splitlines():
            option = re.match(r"│\s+(--[\w-]+)\s+(<[^>]*>)?(?P<help>.*)│", line)
            assert option is None or option["help"].strip(), f"{' '.join(page)}: {option[1]} says nothing"


@pytest.mark.parametrize(
    ("module", "arguments", "code"),
    [
        ("runtime.cli", ["--help"], 0),
        ("runtime.cli", ["--version"], 0),
        ("runtime.cli", ["--list"], 0),
        ("runtime.cli", ["--list", "--json"], 0),
        ("runtime.cli", ["tiny", "--no-instantiate"], 0),
        ("runtime.cli", ["tinny", "--prompt", "a cat"], 2),
        ("runtime.cli", ["tiny", "--prompt", " "], 2),
        ("runtime.cli", ["tiny", "--prompt", "a cat", "--pixel-height", "100"], 2),
        ("runtime.cli", ["tiny", "--prompt", "a cat", "--precision", "int3"], 2),
        ("runtime.cli", ["tiny", "--prompt", "a cat", "--no-such-option"], 2),
        ("runtime.cli", ["tiny-i2v", "--prompt", "a cat", "--output", "clip.mp4"], 2),
        ("runtime.cli", ["--from-record", "missing.json"], 2),
        ("build_engines.cli", ["--help"], 0),
        ("build_engines.cli", ["build", "--help"], 0),
        ("build_engines.cli", ["--version"], 0),
        ("build_engines.cli", ["tiny", "--precision", "int3"], 2),
    ],
)
def test_what_needs_no_model_loads_no_framework(
    module: str, arguments: list[str], code: int, tmp_path: Path, engine_home: Path
) -> None:
    probe = PROBE.format(module=module, words=arguments, frameworks=FRAMEWORKS)
    finished = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.stderr.splitlines()[-1].split() == ["LOADED", str(code)], finished.stderr


if __name__ == "__main__":
    HELP.mkdir(parents=True, exist_ok=True)
    for stale in HELP.iterdir():
        stale.unlink()
    for name, command in PAGES.items():
        (HELP / name).write_text(render(*command), encoding="utf-8")
