"""`manifest.json`: written, read, refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causal_forcing.runtime.config import SCHEMA_VERSION, PlanOptions, fingerprint_of, op_digest
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.environment import package_version
from causal_forcing.runtime.errors import (
    CausalForcingError,
    EngineDamagedError,
    EngineMismatchError,
    EngineNotFoundError,
)
from causal_forcing.runtime.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_files,
    describe_files,
    file_sha256,
    read_manifest,
)
from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec
from causal_forcing.runtime.resolution import resolve_engine

OPTIONS = EngineOptions(slug="tiny", backend="torch", pixel_height=32, pixel_width=48, random_weights=6)
COMMAND = "cf-build tiny --pixel-height 32 --pixel-width 48 --backend torch --precision fp32 --random-weights 6"


def make_manifest(folder: Path) -> Manifest:
    """Make an engine directory of two small files."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "step.pt2").write_bytes(b"weights" * 1000)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    cache = IOTensor(name="cache", shape=(1, 2, 3), dtype="bfloat16")
    network = NetworkSpec(
        name="step",
        inputs=(cache,),
        outputs=(IOTensor(name="cache_out", shape=(1, 2, 3), dtype="bfloat16"),),
        states=(("cache_out", "cache"),),
        in_place=True,
    )
    manifest = Manifest(
        config=resolve_engine(OPTIONS, weights="random:6", device="cpu"),
        networks=(network,),
        artefacts={"step": "step.pt2"},
        files=describe_files(folder),
        build={"created": "now", "seconds": 1.5},
    )
    manifest.write(folder)
    return manifest


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    make_manifest(tmp_path / "engine")
    return tmp_path / "engine"


def sign(content: dict[str, Any]) -> None:
    """Make the hashes follow the content, as those of a real engine do."""
    if "fingerprint" in content and "config" in content:
        content["fingerprint"] = fingerprint_of(content["config"])
    content.pop("digest", None)
    content["digest"] = fingerprint_of(content)


@pytest.fixture
def edit(engine: Path) -> Callable[..., None]:
    """Change the manifest's JSON, and its hashes too unless told otherwise."""

    def apply(change: Callable[[dict[str, Any]], object], *, signed: bool = True) -> None:
        content = json.loads((engine / MANIFEST_NAME).read_text())
        change(content)
        if signed:
            sign(content)
        (engine / MANIFEST_NAME).write_text(json.dumps(content))

    return apply


def test_manifest_written_and_read_is_equal(tmp_path: Path) -> None:
    written = make_manifest(tmp_path / "engine")
    read = read_manifest(tmp_path / "engine")
    assert read == written
    assert read.config.fingerprint() == written.config.fingerprint()
    assert read.network("step") == written.networks[0]


def test_manifest_of_a_variant_with_every_option_set_is_read_back_equal(tmp_path: Path) -> None:
    two_step = "causal-forcing-wan2.1-t2v-1.3b-framewise-2step"
    written = dataclasses.replace(
        make_manifest(tmp_path / "engine"),
        config=resolve_engine(EngineOptions(slug=two_step), weights="random:0", device="cpu"),
    )
    written.write(tmp_path / "engine")
    assert read_manifest(tmp_path / "engine") == written


@pytest.mark.parametrize(
    "plan",
    [
        PlanOptions(compute_capabilities=(86, 120), optimization_level=5, workspace_mib=512),
        PlanOptions(compute_capabilities=(90,), plugin="quick"),
    ],
)
def test_manifest_of_plans_is_read_back_equal(plan: PlanOptions, tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path / "engine")
    written = dataclasses.replace(manifest, config=dataclasses.replace(manifest.config, plan=plan))
    written.write(tmp_path / "engine")
    assert read_manifest(tmp_path / "engine") == written


def test_manifest_lists_every_file_with_its_hash_and_size_but_not_itself(engine: Path) -> None:
    files = read_manifest(engine).files
    assert sorted(files) == ["step.pt2", "tokenizer/tokenizer.json"]
    assert files["step.pt2"].bytes == 7000
    assert files["step.pt2"].sha256 == file_sha256(engine / "step.pt2")
    assert sorted(describe_files(engine)) == sorted(files)


@pytest.mark.parametrize(("field", "expected"), [("package_version", package_version()), ("op_digest", op_digest())])
def test_manifest_of_another_version_names_field_values_and_command(
    field: str, expected: str, engine: Path, edit: Callable[..., None]
) -> None:
    edit(lambda content: content["config"].update({field: "0.0.0-old"}))
    with pytest.raises(EngineMismatchError) as caught:
        read_manifest(engine)
    assert caught.value.field == field
    assert str(caught.value) == (
        f"the engine does not fit: {field} is 0.0.0-old, expected {expected}; rebuild it: {COMMAND}"
    )


def test_manifest_of_another_schema_names_it_whatever_else_it_holds(engine: Path, edit: Callable[..., None]) -> None:
    def change(content: dict[str, Any]) -> None:
        content["schema_version"] = SCHEMA_VERSION + 1
        content["config"]["geometry"]["new_field"] = 1
        del content["networks"]

    edit(change)
    with pytest.raises(
        EngineMismatchError,
        match=f"schema_version is {SCHEMA_VERSION + 1}, expected {SCHEMA_VERSION}; rebuild it: cf-build tiny",
    ):
        read_manifest(engine)


def test_manifest_with_an_altered_configuration_is_refused(engine: Path, edit: Callable[..., None]) -> None:
    edit(lambda content: content["config"]["geometry"].update(pixel_height=64), signed=False)
    with pytest.raises(EngineDamagedError, match=r"was altered: its fingerprint does not match.*cf-build tiny"):
        read_manifest(engine)


@pytest.mark.parametrize("key", ["networks", "artefacts", "files", "build"])
def test_manifest_with_an_altered_part_is_refused(key: str, engine: Path, edit: Callable[..., None]) -> None:
    edit(lambda content: content.update({key: type(content[key])()}), signed=False)
    with pytest.raises(EngineDamagedError, match="was altered"):
        read_manifest(engine)


@pytest.mark.parametrize("key", ["config", "schema_version", "fingerprint", "networks", "artefacts", "files", "build"])
def test_manifest_without_a_part_is_damaged(key: str, engine: Path, edit: Callable[..., None]) -> None:
    edit(lambda content: content.pop(key))
    with pytest.raises(EngineDamagedError, match=f"{key}.*rebuild it: cf-build"):
        read_manifest(engine)


def test_manifest_of_a_folder_without_one_says_how_to_build(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(EngineNotFoundError, match=f"no engine in {folder}.*cf-build SLUG"):
            read_manifest(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b'{"config": null}'])
def test_manifest_that_is_not_one_is_damaged(content: bytes, engine: Path) -> None:
    (engine / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(EngineDamagedError, match=r"manifest\.json.*rebuild it: cf-build SLUG"):
        read_manifest(engine)


def test_manifest_cut_off_anywhere_is_damaged(engine: Path) -> None:
    whole = (engine / MANIFEST_NAME).read_bytes()
    for length in range(0, len(whole) - 2, 97):
        (engine / MANIFEST_NAME).write_bytes(whole[:length])
        with pytest.raises(EngineDamagedError):
            read_manifest(engine)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), signed=st.booleans())
def test_manifest_with_any_value_replaced_is_read_or_refused_but_never_crashes(
    engine: Path, data: st.DataObject, signed: bool
) -> None:
    path = engine / MANIFEST_NAME
    original = path.read_text()
    content = json.loads(original)
    node: Any = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not (isinstance(node[key], dict | list) and node[key]) or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(JSON)
    if signed:
        sign(content)
    path.write_text(json.dumps(content))
    try:
        with contextlib.suppress(CausalForcingError):
            read_manifest(engine)
    finally:
        path.write_text(original)


def test_check_files_of_a_whole_engine_passes(engine: Path) -> None:
    check_files(engine, read_manifest(engine))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.write_bytes(b"W" + path.read_bytes()[1:]),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["missing", "truncated", "longer", "altered", "a folder"],
)
def test_check_files_of_a_damaged_engine_names_the_file_and_the_build(
    damage: Callable[[Path], object], engine: Path
) -> None:
    damage(engine / "step.pt2")
    with pytest.raises(EngineDamagedError, match=r"step\.pt2") as caught:
        check_files(engine, read_manifest(engine))
    assert COMMAND in str(caught.value)
