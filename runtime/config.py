"""Options as the user gives them, and the complete configurations that code consumes. No framework is imported here.

Merge order: the variant's defaults, then the options that were given. Environment variables are read here and nowhere
else: `CAUSAL_FORCING_HOME` moves the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from causal_forcing import plugins
from causal_forcing.runtime.errors import UnknownNameError, UsageError
from causal_forcing.runtime.spec import Geometry, Variant, find_variant

SCHEMA_VERSION = 1
"""Version of the engine directory's layout and of `manifest.json`."""

DISTRIBUTION = "causal-forcing-engine"

PRECISIONS = ("fp32", "bf16", "fp16")
"""Precisions in which weights, activations and caches can be kept."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Precision to element type."""

DEFAULT_SLUG = "shapes"
"""What runs where no slug is given: the trained model that comes with the package."""

IMAGE_FITS = ("stretch", "crop")
"""Ways of bringing an image to the video's shape."""

DECODERS = ("wan",)
"""Decoders that an engine can be built with."""

CHECKPOINT_REPOSITORY = "zhuhz22/Causal-Forcing"
CHECKPOINT_REVISION = "2f8eb8bb6eeb1238da9d13e5420d342a74d634a6"
"""Pinned revision of the released Causal-Forcing checkpoints."""

WAN_REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B"
WAN_REVISION = "37ec512624d61f7aa208f7ea8140a131f93afc9a"
"""Pinned revision of the Wan base files: text encoder, tokenizer, VAE."""


def cache_folder() -> Path:
    """Return the folder for engines and caches: `$CAUSAL_FORCING_HOME`, else `causal-forcing` in the user's cache."""
    home = os.environ.get("CAUSAL_FORCING_HOME")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "causal-forcing"


def package_version() -> str:
    """Return this distribution's version."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


def launched_processes() -> int:
    """Return how many processes a launcher such as torchrun started for this run.

    Raises:
        UsageError: Its environment variable holds something else.
    """
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal() or int(given) < 1:
        raise UsageError(f"WORLD_SIZE is {given!r}, expected a number of processes: unset WORLD_SIZE")
    return int(given)


def op_digest() -> str:
    """Return a hash of the op's sources: an engine holds the op as it was when it was built."""
    digest = hashlib.sha256()
    folder = Path(plugins.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What the user says about an engine; None inherits the variant's or the backend's default."""

    slug: str = DEFAULT_SLUG
    """Model and way of running it; `cf-generate --list` shows all."""
    backend: str = "auto"
    """Backend that runs the engine, or auto."""
    precision: str | None = None
    """fp32, bf16 or fp16."""
    pixel_height: int | None = None
    """Height of the video, a multiple of 16."""
    pixel_width: int | None = None
    """Width of the video, a multiple of 16."""
    window_frames: int | None = None
    """Latent frames that the KV cache holds."""
    sink_frames: int | None = None
    """First latent frames of the clip that never leave the cache."""
    decoder: str = "wan"
    """Decoder from latents to pixels."""
    checkpoint: Path | None = None
    """DiT checkpoint file, or the folder of the released layout."""
    wan_folder: Path | None = None
    """Wan2.1-T2V-1.3B folder with text encoder, tokenizer and VAE."""
    random_weights: int | None = None
    """Seed of random weights, in place of a checkpoint."""

    def __post_init__(self) -> None:
        if self.precision is not None and self.precision not in PRECISIONS:
            raise UnknownNameError("precision", self.precision, PRECISIONS)
        if self.decoder not in DECODERS:
            raise UnknownNameError("decoder", self.decoder, DECODERS)
        if self.random_weights is not None and (self.checkpoint or self.wan_folder):
            raise UsageError("--random-weights excludes --checkpoint and --wan-folder: give one or the other")

    def variant(self) -> Variant:
        """Return the variant that the slug names."""
        return find_variant(self.slug)

    def geometry(self) -> Geometry:
        """Return the shapes: the variant's, with the given options over them."""
        variant = self.variant()

        def choose(given: int | None, default: int) -> int:
            return default if given is None else given

        return Geometry(
            chunk_frames=variant.chunk_frames,
            pixel_height=choose(self.pixel_height, variant.pixel_height),
            pixel_width=choose(self.pixel_width, variant.pixel_width),
            window_frames=choose(self.window_frames, variant.window_frames),
            sink_frames=choose(self.sink_frames, variant.sink_frames),
            patch_size=variant.model.dit.patch_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that an engine's content depends on; its fingerprint is how the engine is found."""

    variant: Variant
    """Model and schedule."""
    geometry: Geometry
    """Fixed shapes."""
    backend: str
    """Backend that runs the engine."""
    backend_version: str
    """What the artefact is tied to: an opset, or a library's version."""
    precision: str
    """fp32, bf16 or fp16."""
    decoder: str
    """Decoder from latents to pixels."""
    weights: str
    """Identity of the weights: `random:SEED`, `included:…`, pinned hub files, or `sha256:…` of local files."""
    schema_version: int = SCHEMA_VERSION
    """Layout of the engine directory."""
    package_version: str = ""
    """Version of this package that builds the engine."""
    op_digest: str = ""
    """Hash of the op's sources."""

    @property
    def dtype(self) -> str:
        """Element type of activations, weights and caches."""
        return DTYPES[self.precision]

    def fields(self) -> dict[str, Any]:
        """Return the fields that the fingerprint covers, as plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def fingerprint(self) -> str:
        """Return the SHA-256 of all fields, hexadecimal."""
        return fingerprint_of(self.fields())

    def folder(self, root: Path) -> Path:
        """Return where this engine lives below `root`."""
        return root / self.variant.slug / self.fingerprint()[:16]

    def build_command(self) -> str:
        """Return the `cf-build` command that builds this engine."""
        return build_command(self.fields())


def fingerprint_of(fields: dict[str, Any]) -> str:
    """Return the SHA-256 of configuration fields in canonical JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def build_command(fields: dict[str, Any]) -> str:
    """Return the `cf-build` command for configuration fields, also those of another schema."""
    variant, geometry = fields.get("variant", {}), fields.get("geometry", {})
    words = ["cf-build", str(variant.get("slug", "SLUG"))]
    for option in ("pixel_height", "pixel_width", "window_frames", "sink_frames"):
        if geometry.get(option) != variant.get(option):
            words += [f"--{option.replace('_', '-')}", str(geometry.get(option))]
    for option in ("backend", "precision"):
        if option in fields:
            words += [f"--{option}", str(fields[option])]
    weights = str(fields.get("weights", ""))
    # Without a released checkpoint, seed 0 is what a slug stands for.
    if weights.startswith("random:") and (variant.get("checkpoint_file") or weights != "random:0"):
        words += ["--random-weights", weights.removeprefix("random:")]
    if weights.startswith("sha256:"):
        words += ["--checkpoint", "FILE", "--wan-folder", "FOLDER"]
    return shlex.join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """What a clip is made from, complete; saved in its record."""

    prompt: str
    """Text of the clip."""
    seed: int = 0
    """Seed of all noise."""
    total_blocks: int | None = None
    """Chunks of the clip, an image's latent frame included; None goes on without end."""
    image: str | None = None
    """Path or URL of the image that an I2V clip starts from."""
    image_fit: str = "stretch"
    """How the image is brought to the video's shape: stretch (as upstream) or crop."""

    def __post_init__(self) -> None:
        if self.total_blocks is not None and self.total_blocks < 1:
            raise UsageError(f"--total-blocks {self.total_blocks} makes no video: use 1 or more")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed {self.seed} is out of range: use a number from 0 to {2**64 - 1}")
        if self.image_fit not in IMAGE_FITS:
            raise UnknownNameError("image fit", self.image_fit, IMAGE_FITS)
