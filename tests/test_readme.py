"""README.md is true: its commands run, what it lists is what exists, and no fence is neither run nor marked.

The mark is an HTML comment on the line above a fence: `run` is run here; `run by: .ci/run NAME` installs and is run by
.ci/run, word for word; `needs: weights`, `needs: gpu` and `needs: network` cannot be run everywhere.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import av
import pytest

from causal_forcing.build_engines.builder import network_names
from causal_forcing.build_engines.weights import planned_downloads
from causal_forcing.runtime.backends import BACKENDS
from causal_forcing.runtime.engine_options import DECODERS, TAEHV_FETCH, TAEHV_FILES, EngineOptions
from causal_forcing.runtime.record import read_record
from causal_forcing.runtime.variant import VARIANTS, find_variant

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MARKS = ("run", "run by: .ci/run clip", "run by: .ci/run tests", "needs: weights", "needs: gpu", "needs: network")


class Fence(NamedTuple):
    mark: str
    language: str
    text: str


def _fences() -> list[Fence]:
    pattern = r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$"
    return [
        Fence(found["mark"] or "", found["language"], found["text"])
        for found in re.finditer(pattern, README, flags=re.MULTILINE | re.DOTALL)
    ]


FENCES = _fences()


def _marked(mark: str) -> list[Fence]:
    return [fence for fence in FENCES if fence.mark == mark]


def _table(header: str) -> list[list[str]]:
    """Return the rows of the README's table whose first column has this header."""
    lines = iter(README.splitlines())
    next(line for line in lines if line.startswith(f"| {header} |"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all of the README's commands run in, one after the other."""
    return tmp_path_factory.mktemp("readme")


def _run_fence(text: str, language: str, folder: Path) -> str:
    environment = os.environ | {"PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
    shell = {"bash": ["bash", "-euo", "pipefail"], "python": [sys.executable]}[language]
    finished = subprocess.run(
        [*shell, "-c", text], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, f"{text}\n{finished.stdout}{finished.stderr}"
    return finished.stdout


def test_every_fence_is_marked_as_run_or_as_needing_something() -> None:
    assert FENCES
    assert len(FENCES) == README.count("\n```") / 2, "every fence was found"
    for fence in FENCES:
        assert fence.mark in MARKS, f"say above this fence what becomes of it, one of {MARKS}:\n{fence.text}"
        assert fence.language in ("bash", "python"), f"a fence is a command or a program:\n{fence.text}"


@pytest.mark.parametrize("fence", _marked("run"), ids=lambda fence: fence.text.split("\n")[0][:60])
def test_command_runs(fence: Fence, here: Path, engine_home: Path) -> None:
    _run_fence(fence.text, fence.language, here)


def test_commands_make_what_the_readme_says(here: Path) -> None:
    if not (here / "square.json").exists():
        pytest.skip("the commands were not run")
    record = read_record(here / "square.json")
    with av.open(here / "square.mp4") as clip:
        frames = sum(1 for _ in clip.decode(video=0))
    assert (record.status, record.frames, frames) == ("complete", 21, 21)
    # A prompt alone is for the model in the package.
    assert record.engine_config["weights"] == f"included:{find_variant('shapes').included_weights}"
    assert len(list((here / "frames").glob("*.png"))) == 21


@pytest.mark.parametrize("fence", _marked("needs: weights"), ids=lambda fence: fence.text.split("\n")[0][:60])
def test_options_of_a_command_that_needs_weights_are_valid(fence: Fence, here: Path, engine_home: Path) -> None:
    for command in fence.text.splitlines():
        launcher, program, options = command.rpartition("cf-generate ")
        assert launcher in ("", "torchrun --nproc_per_node=4 --no-python ")
        _run_fence(f"{program}{options} --no-instantiate", fence.language, here)


def test_download_commands_fetch_the_pinned_files() -> None:
    variant = find_variant("causal-forcing-wan2.1-t2v-1.3b-chunkwise")
    wanted = {
        (download.repo, download.revision, download.filename)
        for download in planned_downloads(variant, checkpoint=None, wan_folder=None)
    }
    got = set()
    for fence in _marked("needs: network"):
        for command in fence.text.splitlines():
            if command in TAEHV_FETCH.values():
                continue
            words = shlex.split(command)
            assert words[:2] == ["hf", "download"]
            first_option = next(index for index, word in enumerate(words) if word.startswith("--"))
            revision = words[words.index("--revision") + 1]
            got |= {(words[2], revision, filename) for filename in words[3:first_option]}
    assert got == wanted


def test_ci_runs_the_two_install_commands_word_for_word() -> None:
    (clip,), (tests,) = _marked("run by: .ci/run clip"), _marked("run by: .ci/run tests")
    assert FENCES[:2] == [clip, tests], "the README opens with both"
    for fence, last in ((clip, "cf-generate"), (tests, "pytest")):
        steps = [shlex.split(step) for step in fence.text.split("&&")]
        assert len(fence.text.splitlines()) == 1
        assert steps[0] == ["python3", "-m", "venv", ".venv"]
        assert steps[1][:3] == [".venv/bin/pip", "install", "-e"]
        assert steps[2][0] == f".venv/bin/{last}"
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    shown = subprocess.run([str(script), "--show"], capture_output=True, text=True, check=True).stdout
    assert shown == clip.text + tests.text


def test_slug_table_is_the_list_of_slugs() -> None:
    rows = {row[0].strip("`"): row for row in _table("slug")}
    assert list(rows) == list(VARIANTS)
    for slug, (_, makes, chunk_frames, passes) in rows.items():
        variant = VARIANTS[slug]
        expected = str(len(variant.denoising_steps))
        if variant.first_chunk_denoising_steps:
            expected += f", first chunk {len(variant.first_chunk_denoising_steps)}"
        assert (chunk_frames, passes) == (str(variant.chunk_frames), expected)
        assert ("image" in makes) == variant.takes_image


def test_backend_table_names_every_backend() -> None:
    rows = [(row[0].split()[0].strip("`"), row) for row in _table("backend")]
    assert {name for name, _ in rows} == set(BACKENDS)
    for name, (_, _, precisions, _) in rows:
        assert sorted(precisions.split(", ")) == sorted(BACKENDS[name].precisions)


def test_decoder_table_names_every_decoder_and_its_file() -> None:
    rows = {row[0].split(",")[0].strip("`"): row for row in _table("`--decoder`")}
    assert tuple(rows) == DECODERS
    for decoder, file in TAEHV_FILES.items():
        assert f"`{file}.pth`" in rows[decoder][1]


def test_network_table_names_every_network() -> None:
    names = [name for row in _table("network") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(names) == sorted(network_names(find_variant("tiny-i2v"), with_pair=True))


def test_glossary_names_exist() -> None:
    known = {*EngineOptions.__dataclass_fields__, *type(VARIANTS["tiny"]).__dataclass_fields__}
    known |= {"tokens_per_frame", "--total-blocks"}
    for row in _table("here"):
        for name in re.findall(r"`([^`]+)`", row[0]):
            assert name in known, f"{name} in the glossary is no name of ours"
