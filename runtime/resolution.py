"""Options to a complete engine configuration, and to the engine directory that has its fingerprint."""

from __future__ import annotations

from pathlib import Path

from causal_forcing.runtime.backends import choose_backend, choose_plan, choose_precision
from causal_forcing.runtime.config import EngineConfig, op_digest
from causal_forcing.runtime.engine_options import DECODERS, TAEHV_FETCH, TAEHV_FILES, EngineOptions, check_ranks
from causal_forcing.runtime.environment import cache_folder, package_version
from causal_forcing.runtime.errors import CheckpointError, EngineMismatchError, UsageError, WeightsMissingError
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.manifest import ENGINES_FOLDER, Manifest, file_sha256
from causal_forcing.runtime.variant import CHECKPOINT_REPOSITORY, CHECKPOINT_REVISION, WAN_REPOSITORY, WAN_REVISION


def default_root() -> Path:
    """Return the folder that engines are built into and found in."""
    return cache_folder() / ENGINES_FOLDER


def weights_identity(options: EngineOptions) -> str | None:
    """Return the identity of the weights that the options stand for, without looking at any file but TAEHV's.

    Returns:
        `random:SEED`, `included:…` with the package's pin, or `hub:…` at the pinned revisions, with the hash of TAEHV's
        file where that is the decoder; None where another file is the user's own, which only the build can tell by its
        content.

    Raises:
        WeightsMissingError: The file of TAEHV is not there.
        CheckpointError: It cannot be read.
    """
    variant = options.variant()
    if options.random_weights is not None:
        return f"random:{options.random_weights}"
    if options.checkpoint or options.wan_folder:
        return None
    if variant.checkpoint_file is None:
        return None if options.taehv else "random:0"
    if variant.included_weights is not None:
        return f"included:{variant.included_weights}"
    pinned = (
        f"hub:{CHECKPOINT_REPOSITORY}@{CHECKPOINT_REVISION[:12]}/{variant.checkpoint_file}"
        f"+{WAN_REPOSITORY}@{WAN_REVISION[:12]}"
    )
    if not options.has_taehv:
        return pinned
    path = taehv_file(options)
    try:
        return f"{pinned}+taehv:{file_sha256(path)}"
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


def taehv_file(options: EngineOptions) -> Path:
    """Return the file of the tiny decoder: the one that was given, else the released one in the Wan folder.

    Raises:
        WeightsMissingError: There is none; the message has the command that brings it.
    """
    assert options.decoder in TAEHV_FILES, f"{options.decoder} is not a form of TAEHV"
    stem, fetch = TAEHV_FILES[options.decoder], TAEHV_FETCH[options.decoder]
    looked: list[Path] = []
    if options.taehv is not None:
        looked = [options.taehv]
    elif options.wan_folder is not None:
        looked = [options.wan_folder / f"{stem}{suffix}" for suffix in (".pth", ".safetensors")]
    for path in looked:
        if path.is_file():
            return path
    where = f"no {' or '.join(map(str, looked))}" if looked else "no file was named"
    raise WeightsMissingError(
        f"weights of the decoder {options.decoder} not found: {where}; where there is network run `{fetch}`, "
        f"then pass --taehv {stem}.pth"
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
    check_ranks(options.ranks, options.variant())
    backend, _ = choose_backend(options.backend, device, for_build=for_build, ranks=options.ranks)
    geometry = options.geometry()
    if options.has_taehv and options.variant().model.taehv is None:
        raise UsageError(
            f"no {options.decoder} was trained for the latents of {options.slug}: leave out --decoder and --taehv"
        )
    precision = choose_precision(backend, options.precision, device)
    if backend.name == "tensorrt-rtx":
        _check_native_ring(geometry)
    return EngineConfig(
        variant=options.variant(),
        geometry=geometry,
        backend=backend.name,
        backend_version=backend.artefact_version(),
        precision=precision,
        decoder=options.decoder or DECODERS[0],
        weights=weights,
        context_parallel=options.ranks,
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
        "decoder": (config.decoder, options.decoder),
        "context_parallel": (config.context_parallel, options.context_parallel),
        "backend": (config.backend, None if options.backend == "auto" else options.backend),
        "weights": (config.weights, None if options.random_weights is None else weights_identity(options)),
    }
    for field, (got, expected) in given.items():
        if expected is not None and got != expected:
            raise EngineMismatchError(field, got=got, expected=expected, fix=_command(options))


def _command(options: EngineOptions) -> str:
    words = [f"cf-build {options.slug}"]
    sizes = ("pixel_height", "pixel_width", "window_frames", "sink_frames")
    for name in (*sizes, "precision", "decoder", "context_parallel", "random_weights"):
        value = getattr(options, name)
        if value is not None:
            words.append(f"--{name.replace('_', '-')} {value}")
    if options.backend != "auto":
        words.append(f"--backend {options.backend}")
    return " ".join(words)
