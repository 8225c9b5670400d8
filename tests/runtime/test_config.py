"""Options, complete configurations, and the fingerprint that an engine is found by."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from causal_forcing import plugins
from causal_forcing.runtime.config import (
    EngineConfig,
    EngineOptions,
    GenerateConfig,
    LaunchedRank,
    PlanOptions,
    build_command,
    cache_folder,
    fingerprint_of,
    launched_rank,
    op_digest,
    package_version,
)
from causal_forcing.runtime.errors import UnknownNameError, UsageError
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimization_level": 6}, "--optimization-level 6 is out of range: use 0 to 5"),
        ({"optimization_level": -1}, "--optimization-level -1 is out of range"),
        ({"workspace_mib": 0}, "--workspace-mib 0 leaves no memory: use 1 or more"),
        ({"plugin": "pyhton"}, "unknown plugin 'pyhton': did you mean 'python'"),
    ],
)
def test_plan_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineOptions(slug="tiny", **options)


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


def test_options_without_any_take_the_variants_shapes() -> None:
    shapes = EngineOptions(slug="tiny").geometry()
    assert (shapes.pixel_height, shapes.pixel_width, shapes.window_frames, shapes.sink_frames) == (96, 160, 21, 0)


def test_options_that_are_given_override_the_variants_shapes_even_with_0() -> None:
    options = EngineOptions(slug="tiny", pixel_height=32, pixel_width=48, window_frames=9, sink_frames=3)
    shapes = options.geometry()
    assert (shapes.pixel_height, shapes.pixel_width, shapes.window_frames, shapes.sink_frames) == (32, 48, 9, 3)
    with pytest.raises(UsageError, match="window_frames 0"):
        EngineOptions(slug="tiny", window_frames=0).geometry()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp23"}, "unknown precision 'fp23': did you mean 'fp32'?.*valid: fp32, bf16, fp16"),
        ({"decoder": "van"}, "unknown decoder 'van': did you mean 'wan'"),
    ],
)
def test_options_with_an_unknown_name_offer_the_nearest(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        EngineOptions(**options)


@pytest.mark.parametrize("files", [{"checkpoint": Path("a.pt")}, {"wan_folder": Path("wan")}, {"taehv": Path("a.pth")}])
def test_options_with_random_weights_and_files_are_refused(files: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--random-weights excludes --checkpoint, --wan-folder and --taehv"):
        EngineOptions(random_weights=0, **files)


def test_options_with_an_unknown_field_are_refused() -> None:
    with pytest.raises(TypeError, match="pixel_heigth"):
        EngineOptions(**{"pixel_heigth": 480})  # type: ignore[arg-type]


@pytest.mark.parametrize("total_blocks", [0, -3])
def test_generate_config_without_blocks_makes_no_video(total_blocks: int) -> None:
    with pytest.raises(UsageError, match=f"--total-blocks {total_blocks} makes no video: use 1 or more"):
        GenerateConfig(prompt="a cat", total_blocks=total_blocks)


def test_cache_folder_follows_the_environment_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAUSAL_FORCING_HOME", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.setenv("CAUSAL_FORCING_HOME", "")
    assert cache_folder() == Path("/b/causal-forcing")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "causal-forcing"


def test_launched_rank_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    assert launched_rank() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched_rank() is None, "one process, and no launcher's rank"
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert launched_rank() == LaunchedRank(
        rank=3, ranks=4, address="127.0.0.1", port=29500, launcher_has_store=False, attempt="0"
    )
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    place = launched_rank()
    assert place is not None
    assert (place.address, place.launcher_has_store) == ("localhost", True)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "several"}, "WORLD_SIZE is 'several', expected a number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "4"}, "RANK is 4, expected one below WORLD_SIZE, 4: use torchrun --nproc_per_node=4"),
        ({"LOCAL_WORLD_SIZE": "2"}, "4 processes share a clip, 2 of them on this machine: start all of them on one"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is '', expected a port"),
    ],
)
def test_launched_rank_incomplete_or_on_other_machines_is_refused(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"WORLD_SIZE": "4", "RANK": "0", "MASTER_PORT": "29500"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=re.escape(said)):
        launched_rank()
