"""Options, complete configurations, and the fingerprint that an engine is found by."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from causal_forcing import plugins
from causal_forcing.runtime.config import (
    EngineConfig,
    GenerateConfig,
    PlanOptions,
    build_command,
    fingerprint_of,
    op_digest,
)
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.environment import package_version
from causal_forcing.runtime.errors import UsageError
from causal_forcing.runtime.resolution import resolve_engine


@pytest.fixture
def config() -> EngineConfig:
    return resolve_engine(EngineOptions(slug="tiny-i2v"), weights="random:0", device="cpu")


def changed(value: Any) -> Any:
    """Return another value of the same kind."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        first = dataclasses.fields(value)[0].name
        return dataclasses.replace(value, **{first: changed(getattr(value, first))})
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return value[:-1] if value else (1,)
    return "other" if value is None else f"{value}x"


def field_paths(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every field of a tree of configuration objects."""
    paths = []
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        path = (*prefix, field.name)
        paths += field_paths(inner, path) if dataclasses.is_dataclass(inner) else [path]
    return paths


def with_change(value: Any, path: tuple[str, ...]) -> Any:
    name, *rest = path
    inner = getattr(value, name)
    new = with_change(inner, tuple(rest)) if rest else changed(inner)
    copy = object.__new__(type(value))
    for field in dataclasses.fields(value):
        object.__setattr__(copy, field.name, new if field.name == name else getattr(value, field.name))
    return copy


def test_fingerprint_of_equal_configurations_is_equal_and_stable(config: EngineConfig) -> None:
    again = resolve_engine(EngineOptions(slug="tiny-i2v"), weights="random:0", device="cpu")
    assert config.fingerprint() == again.fingerprint() == fingerprint_of(config.fields())
    assert len(config.fingerprint()) == 64
    assert fingerprint_of({"b": [1, 2.5, None], "a": "ü"}) == fingerprint_of({"a": "ü", "b": [1, 2.5, None]})


def test_fingerprint_changes_with_every_field_at_every_depth(config: EngineConfig) -> None:
    paths = field_paths(config)
    assert ("geometry", "sink_frames") in paths
    assert ("variant", "model", "dit", "eps") in paths
    fingerprints = {".".join(path): with_change(config, path).fingerprint() for path in paths}
    assert config.fingerprint() not in fingerprints.values()
    assert len(set(fingerprints.values())) == len(paths)


def test_fingerprint_of_plans_changes_with_every_option_of_a_plan(config: EngineConfig) -> None:
    plans = [
        None,
        PlanOptions(compute_capabilities=(86,)),
        PlanOptions(compute_capabilities=(86, 89)),
        PlanOptions(compute_capabilities=(86,), optimization_level=5),
        PlanOptions(compute_capabilities=(86,), workspace_mib=1024),
        PlanOptions(compute_capabilities=(86,), plugin="python"),
        PlanOptions(compute_capabilities=(86,), plugin="quick"),
    ]
    assert len({dataclasses.replace(config, plan=plan).fingerprint() for plan in plans}) == len(plans)


@pytest.mark.parametrize(
    ("backend", "precision", "plan", "words"),
    [
        ("tensorrt-rtx", "bf16", PlanOptions(compute_capabilities=(86, 89, 120)), ""),
        ("tensorrt-rtx", "fp8", PlanOptions(compute_capabilities=(89, 120)), ""),
        (
            *("tensorrt-rtx", "fp8"),
            PlanOptions(compute_capabilities=(89, 121), optimization_level=0, workspace_mib=64),
            " --compute-capability=89 --compute-capability=121 --optimization-level 0 --workspace-mib 64",
        ),
        ("tensorrt", "bf16", PlanOptions(compute_capabilities=(90,), plugin="python"), ""),
        ("tensorrt", "bf16", PlanOptions(compute_capabilities=(90,), plugin="quick"), " --plugin quick"),
    ],
)
def test_build_command_of_plans_names_what_is_not_the_default(
    backend: str, precision: str, plan: PlanOptions, words: str, config: EngineConfig
) -> None:
    plans = dataclasses.replace(config, backend=backend, precision=precision, plan=plan)
    assert plans.build_command() == f"cf-build tiny-i2v --backend {backend} --precision {precision}{words}"


@pytest.mark.parametrize(
    ("backend", "precision", "dtype"),
    [
        ("tensorrt-rtx", "bf16", "bfloat16"),
        ("tensorrt", "fp16", "float16"),
        ("tensorrt", "fp8", "bfloat16"),
        ("onnxruntime", "fp8", "float32"),
        ("torch", "fp32", "float32"),
    ],
)
def test_dtype_is_that_of_what_is_not_quantised(backend: str, precision: str, dtype: str, config: EngineConfig) -> None:
    assert dataclasses.replace(config, backend=backend, precision=precision).dtype == dtype


def test_folder_of_a_configuration_is_its_slug_and_the_start_of_its_fingerprint(config: EngineConfig) -> None:
    assert config.folder(Path("/engines")) == Path("/engines/tiny-i2v") / config.fingerprint()[:16]


def test_resolved_configuration_carries_the_package_and_the_op(config: EngineConfig) -> None:
    assert config.package_version == package_version() != ""
    assert config.op_digest == op_digest() != ""
    assert config.dtype == "float32"


def test_op_digest_changes_with_any_source_of_the_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "plugins"
    shutil.copytree(Path(plugins.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = op_digest()
    monkeypatch.setattr(plugins, "__file__", str(folder / "__init__.py"))
    assert op_digest() == before
    seen = {before}
    for path in sorted(folder.rglob("*.py")):
        path.write_text(path.read_text() + "\n# changed\n")
        seen.add(op_digest())
    (folder / "reference.py").rename(folder / "renamed.py")
    seen.add(op_digest())
    assert len(seen) == len(list(folder.rglob("*.py"))) + 2


def test_build_command_of_defaults_names_slug_backend_and_precision_only(config: EngineConfig) -> None:
    assert config.build_command() == f"cf-build tiny-i2v --backend {config.backend} --precision fp32"


def test_build_command_of_local_files_leaves_room_for_their_paths(config: EngineConfig) -> None:
    local = dataclasses.replace(config, weights="sha256:0123")
    assert local.build_command().endswith("--checkpoint FILE --wan-folder FOLDER")
    tiny_decoder = dataclasses.replace(local, decoder="lighttae")
    assert tiny_decoder.build_command().endswith("--checkpoint FILE --wan-folder FOLDER --taehv FILE")
    assert "--decoder lighttae" in tiny_decoder.build_command()


def test_build_command_of_pinned_files_beside_a_tiny_decoder_asks_for_its_file_alone(config: EngineConfig) -> None:
    pinned = dataclasses.replace(config, weights="hub:a@1/b+c@2+taehv:0123", decoder="taehv")
    assert pinned.build_command().endswith("--precision fp32 --decoder taehv --taehv FILE")


def test_build_command_of_a_random_tiny_decoder_needs_no_file(config: EngineConfig) -> None:
    command = dataclasses.replace(config, decoder="taehv").build_command()
    assert command == f"cf-build tiny-i2v --backend {config.backend} --precision fp32 --decoder taehv"


@pytest.mark.parametrize("fields", [{}, {"variant": {"slug": "old"}}, {"weights": 3, "geometry": {"pixel_height": 1}}])
def test_build_command_of_another_schemas_fields_is_still_a_command(fields: dict[str, Any]) -> None:
    assert build_command(fields).startswith("cf-build ")


@pytest.mark.parametrize("total_blocks", [0, -3])
def test_generate_config_without_blocks_makes_no_video(total_blocks: int) -> None:
    with pytest.raises(UsageError, match=f"--total-blocks {total_blocks} makes no video: use 1 or more"):
        GenerateConfig(prompt="a cat", total_blocks=total_blocks)
