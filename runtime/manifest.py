"""`manifest.json`: what an engine directory holds, and whether it may be loaded. No framework is imported here."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from causal_forcing.runtime.check_stamps import CheckStamps
from causal_forcing.runtime.config import (
    SCHEMA_VERSION,
    EngineConfig,
    PlanOptions,
    build_command,
    fingerprint_of,
    op_digest,
)
from causal_forcing.runtime.environment import cache_folder, package_version
from causal_forcing.runtime.errors import EngineDamagedError, EngineMismatchError, EngineNotFoundError, UsageError
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.model_spec import DiTSpec, ModelSpec, TAEHVSpec, TextSpec, VAESpec
from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec
from causal_forcing.runtime.variant import Variant

MANIFEST_NAME = "manifest.json"

ENGINES_FOLDER = "engines"
"""Folder of all engines inside the cache folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFile:
    """A file of an engine directory."""

    sha256: str
    """Of its content, hexadecimal."""
    bytes: int
    """Its size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`."""

    config: EngineConfig
    """What the engine was built for."""
    networks: tuple[NetworkSpec, ...]
    """Its networks, in build order."""
    artefacts: Mapping[str, str]
    """Network name to the file that holds it, relative to the directory."""
    files: Mapping[str, EngineFile]
    """Every file of the directory but the manifest, by relative path."""
    build: Mapping[str, Any] = field(default_factory=dict)
    """How it was built, for people: library versions, seconds, weight files and their hashes."""

    def network(self, name: str) -> NetworkSpec:
        """Return the specification of a network."""
        return next(network for network in self.networks if network.name == name)

    def network_files(self, name: str) -> list[str]:
        """Return the files that are of one network alone: `NAME.onnx`, `NAME.onnx.data`, `NAME.plan` and the like."""
        return [file for file in self.files if file.split("/")[-1].split(".")[0] == name]

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into a folder."""
        content = {
            "schema_version": self.config.schema_version,
            "fingerprint": self.config.fingerprint(),
            "config": self.config.fields(),
            "networks": [asdict(network) for network in self.networks],
            "artefacts": dict(self.artefacts),
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "build": dict(self.build),
        }
        content["digest"] = fingerprint_of(content)
        (folder / MANIFEST_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of an engine directory.

    Raises:
        EngineNotFoundError: There is no manifest.
        EngineDamagedError: It is not one, or was altered.
        EngineMismatchError: Another schema, package version or op built it.
    """
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        fields = content["config"]
        schema_version = content["schema_version"]
    except (FileNotFoundError, NotADirectoryError):
        raise EngineNotFoundError(
            f"no engine in {folder}: {MANIFEST_NAME} is not there; build one: cf-build SLUG"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EngineDamagedError(f"{path} is not a readable manifest ({error!r}); rebuild it: cf-build SLUG") from error
    fix = rebuild_command(folder, fields)
    if schema_version != SCHEMA_VERSION:
        raise EngineMismatchError("schema_version", got=schema_version, expected=SCHEMA_VERSION, fix=fix)
    try:
        digest = content.pop("digest")
        if fingerprint_of(fields) != content["fingerprint"] or fingerprint_of(content) != digest:
            raise EngineDamagedError(
                f"{path} was altered: its fingerprint does not match its content; rebuild it: {fix}"
            )
        manifest = Manifest(
            config=_config(fields),
            networks=tuple(_network(network) for network in content["networks"]),
            artefacts=content["artefacts"],
            files={name: EngineFile(**entry) for name, entry in content["files"].items()},
            build=content["build"],
        )
    except (TypeError, ValueError, KeyError, AttributeError, UsageError) as error:
        raise EngineDamagedError(f"{path} lacks or misnames a field ({error!r}); rebuild it: {fix}") from error
    for name, current in (("package_version", package_version()), ("op_digest", op_digest())):
        got = getattr(manifest.config, name)
        if got != current:
            raise EngineMismatchError(name, got=got, expected=current, fix=fix)
    return manifest


def rebuild_command(folder: Path, fields: Any) -> str:
    """Return the command that makes an engine anew where it is, as far as its manifest's fields tell."""
    try:
        command = build_command(fields)
        slug = str(fields["variant"]["slug"])
    except (AttributeError, TypeError, KeyError):
        return "cf-build SLUG"
    # Elsewhere than in the cache: below the folder that was given with --output.
    root = folder.absolute().parent.parent
    if folder.absolute().parent.name == slug and root != (cache_folder() / ENGINES_FOLDER).absolute():
        command += f" --output {shlex.quote(str(root))}"
    return command


def check_files(
    folder: Path, manifest: Manifest, *, names: Iterable[str] | None = None, trust_stamps: bool = False
) -> None:
    """Compare files of an engine directory with their recorded size and hash.

    Args:
        folder: The engine directory.
        manifest: Its manifest.
        names: Files to check; None is all.
        trust_stamps: Whether a big file that was hashed before and has not changed since is taken as it is.

    Raises:
        EngineDamagedError: A file is missing or differs.
    """
    fix = rebuild_command(folder, manifest.config.fields())
    stamps = CheckStamps(folder)

    def check(name: str) -> None:
        path, entry = folder / name, manifest.files[name]
        try:
            before = path.stat()
            size, same = before.st_size, before.st_size == entry.bytes
            if same and not (trust_stamps and stamps.holds(name, entry.sha256, before)):
                same = file_sha256(path) == entry.sha256
                if same:
                    stamps.add(name, entry.sha256, before, path.stat())
        except FileNotFoundError:
            raise EngineDamagedError(f"{path} is missing; rebuild it: {fix}") from None
        except OSError as error:
            raise EngineDamagedError(f"{path} cannot be read ({error.strerror}); rebuild it: {fix}") from error
        if not same:
            raise EngineDamagedError(
                f"{path} is damaged: {size} bytes whose hash or size is not the recorded one ({entry.bytes} bytes); "
                f"rebuild it: {fix}"
            )

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(check, manifest.files if names is None else names))
    stamps.write()


def stamp_files(folder: Path, manifest: Manifest) -> None:
    """Note that the files of an engine that was just built are what was hashed for its manifest."""
    stamps = CheckStamps(folder)
    for name, entry in manifest.files.items():
        status = (folder / name).stat()
        stamps.add(name, entry.sha256, status, status)
    stamps.write()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_files(folder: Path) -> dict[str, EngineFile]:
    """Return the entries of all files below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {
        path.relative_to(folder).as_posix(): EngineFile(sha256=file_sha256(path), bytes=path.stat().st_size)
        for path in paths
    }


def _config(fields: dict[str, Any]) -> EngineConfig:
    variant = dict(fields["variant"])
    model = variant["model"]
    variant["model"] = ModelSpec(
        name=model["name"],
        dit=DiTSpec(**model["dit"]),
        vae=VAESpec(**_with_tuples(model["vae"])),
        text=TextSpec(**model["text"]),
        taehv=None if model["taehv"] is None else TAEHVSpec(**_with_tuples(model["taehv"])),
    )
    for steps in ("denoising_steps", "first_chunk_denoising_steps"):
        variant[steps] = None if variant[steps] is None else tuple(variant[steps])
    plan = fields["plan"]
    if plan is not None:
        plan = PlanOptions(**{**plan, "compute_capabilities": tuple(plan["compute_capabilities"])})
    geometry = Geometry(**fields["geometry"])
    return EngineConfig(**{**fields, "variant": Variant(**variant), "geometry": geometry, "plan": plan})


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields with tuples where JSON has lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _network(fields: dict[str, Any]) -> NetworkSpec:
    def io_tensors(kind: str) -> tuple[IOTensor, ...]:
        return tuple(IOTensor(**{**io_tensor, "shape": tuple(io_tensor["shape"])}) for io_tensor in fields[kind])

    return NetworkSpec(
        name=fields["name"],
        inputs=io_tensors("inputs"),
        outputs=io_tensors("outputs"),
        states=tuple((output, source) for output, source in fields["states"]),
        in_place=fields["in_place"],
    )
