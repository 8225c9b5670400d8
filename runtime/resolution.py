"""Options to a complete engine configuration, and to the engine directory that has its fingerprint."""

from __future__ import annotations

from pathlib import Path

from causal_forcing.runtime.backends import choose_backend, choose_plan, choose_precision
from causal_forcing.runtime.config import (
    CHECKPOINT_REPOSITORY,
    CHECKPOINT_REVISION,
    WAN_REPOSITORY,
    WAN_REVISION,
    EngineConfig,
    EngineOptions,
    cache_folder,
    op_digest,
    package_version,
)
from causal_forcing.runtime.errors import EngineMismatchError, UsageError
from causal_forcing.runtime.manifest import ENGINES_FOLDER, Manifest
from causal_forcing.runtime.spec import Geometry


def default_root() -> Path:
    """Return the folder that engines are built into and found in."""
    return cache_folder() / ENGINES_FOLDER


def weights_identity(options: EngineOptions) -> str | None:
    """Return the identity of the weights that the options stand for, without looking at any file.

    Returns:
        `random:SEED`, `included:…` with the package's pin, or `hub:…` at the pinned revisions; None where any file is
        the user's own, which only the build can tell by its content.
    """
    variant = options.variant()
    if options.random_weights is not None:
        return f"random:{options.random_weights}"
    if options.checkpoint or options.wan_folder:
        return None
    if variant.checkpoint_file is None:
        return "random:0"
    if variant.included_weights is not None:
        return f"included:{variant.included_weights}"
    return (
        f"hub:{CHECKPOINT_REPOSITORY}@{CHECKPOINT_REVISION[:12]}/{variant.checkpoint_file}"
        f"+{WAN_REPOSITORY}@{WAN_REVISION[:12]}"
    )


def resolve_engine(
    options: EngineOptions, *, weights: str, device: str = "auto", for_build: bool = False
) -> EngineConfig:
    """Complete the options.

    Args:
        options: What the user gave.
        weights: Identity of the weights.
        device: Where the engine is going to run; decides `auto` and the default precision.
        for_build: Whether the engine is only built here, perhaps for another machine.

    Raises:
        UsageError: Options that do not go together.
        BackendUnavailableError: The backend cannot be used here.
    """
    backend, _ = choose_backend(options.backend, device, for_build=for_build)
    geometry = options.geometry()
    precision = choose_precision(backend, options.precision, device)
    if backend.name == "tensorrt-rtx":
        _check_native_ring(geometry)
    return EngineConfig(
        variant=options.variant(),
        geometry=geometry,
        backend=backend.name,
        backend_version=backend.artefact_version(),
        precision=precision,
        decoder=options.decoder,
        weights=weights,
        plan=choose_plan(backend, options, precision, device),
        package_version=package_version(),
        op_digest=op_digest(),
    )


def _check_native_ring(geometry: Geometry) -> None:
    """Check that every chunk lands in consecutive slots: a native cache update writes one run of them."""
    if geometry.ring_is_chunk_aligned:
        return
    chunk = geometry.chunk_frames
    sink = geometry.sink_frames // chunk * chunk
    window = max(geometry.window_frames // chunk * chunk, sink + chunk)
    raise UsageError(
        f"a window of {geometry.window_frames} latent frames with {geometry.sink_frames} sink frames lets chunks of "
        f"{chunk} wrap around the cache, which native TensorRT-RTX layers cannot write: use --window-frames {window} "
        f"--sink-frames {sink}, or another backend"
    )


def check_fits(manifest: Manifest, options: EngineOptions) -> None:
    """Check that an engine that was named by its folder serves the options that were given with it.

    Raises:
        EngineMismatchError: It is of another slug, or an option that was given differs.
    """
    config, geometry = manifest.config, manifest.config.geometry
    given = {
        "slug": (config.variant.slug, options.slug),
        "pixel_height": (geometry.pixel_height, options.pixel_height),
        "pixel_width": (geometry.pixel_width, options.pixel_width),
        "window_frames": (geometry.window_frames, options.window_frames),
        "sink_frames": (geometry.sink_frames, options.sink_frames),
        "precision": (config.precision, options.precision),
        "backend": (config.backend, None if options.backend == "auto" else options.backend),
        "weights": (config.weights, None if options.random_weights is None else weights_identity(options)),
    }
    for field, (got, expected) in given.items():
        if expected is not None and got != expected:
            raise EngineMismatchError(field, got=got, expected=expected, fix=_command(options))


def _command(options: EngineOptions) -> str:
    words = [f"cf-build {options.slug}"]
    for name in ("pixel_height", "pixel_width", "window_frames", "sink_frames", "precision", "random_weights"):
        value = getattr(options, name)
        if value is not None:
            words.append(f"--{name.replace('_', '-')} {value}")
    if options.backend != "auto":
        words.append(f"--backend {options.backend}")
    return " ".join(words)
