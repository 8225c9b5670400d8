"""The complete configurations that code consumes. No framework is imported here."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from causal_forcing import plugins
from causal_forcing.runtime.engine_options import DECODERS
from causal_forcing.runtime.errors import UnknownNameError, UsageError
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.variant import Variant

SCHEMA_VERSION = 2
"""Version of the engine directory's layout and of `manifest.json`."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
"""Precision to the element type of io_tensors and of everything that is not quantised."""

RTX_COMPUTE_CAPABILITIES = (80, 86, 89, 120, 121)
"""GPU generations that TensorRT-RTX makes plans for, strong typing and bf16 given (86 is RTX 30, 89 is RTX 40)."""

DEFAULT_RTX_COMPUTE_CAPABILITIES = (86, 89, 120)
"""What an RTX plan is for where nobody says: one plan for three generations takes hardly more room than for one."""

FP8_COMPUTE_CAPABILITY = 89
"""First GPU generation with e4m3."""

IMAGE_FITS = ("stretch", "crop")
"""Ways of bringing an image to the video's shape."""

TEXT_ENCODER_USES = ("free", "keep")
"""What becomes of the text encoder once a prompt is encoded: its memory is given back, or it stays for more prompts."""


def op_digest() -> str:
    """Return a hash of the op's sources: an engine holds the op as it was when it was built."""
    digest = hashlib.sha256()
    folder = Path(plugins.__file__).parent
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cu")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What a TensorRT plan is compiled for and how; complete."""

    compute_capabilities: tuple[int, ...]
    """GPU generations that it runs on."""
    optimization_level: int = 3
    """Builder optimization level."""
    workspace_mib: int | None = None
    """Memory pool of layers' workspaces; None is the whole GPU's."""
    plugin: str | None = None
    """Form of the op's plugin; None where the op is native layers."""


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
    """fp32, bf16, fp16 or fp8."""
    decoder: str
    """Decoder from latents to pixels."""
    weights: str
    """Identity of the weights: `random:SEED`, `included:…`, pinned hub files, or `sha256:…` of local files.

    A file of TAEHV beside pinned ones adds `+taehv:` and its hash.
    """
    context_parallel: int = 1
    """Processes that run it together, each with its own share of the tokens and heads."""
    plan: PlanOptions | None = None
    """How TensorRT compiles it; None for other backends."""
    schema_version: int = SCHEMA_VERSION
    """Layout of the engine directory."""
    package_version: str = ""
    """Version of this package that builds the engine."""
    op_digest: str = ""
    """Hash of the op's sources."""

    @property
    def dtype(self) -> str:
        """Element type of io_tensors and of everything that is not quantised."""
        # ONNX Runtime has no bf16 kernels on a CPU; what fp8 does not cover is fp32 there.
        return "float32" if self.backend == "onnxruntime" else DTYPES[self.precision]

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
    decoder = fields.get("decoder", DECODERS[0])
    if decoder != DECODERS[0]:
        words += ["--decoder", str(decoder)]
    if fields.get("context_parallel", 1) != 1:
        words += ["--context-parallel", str(fields["context_parallel"])]
    words += _plan_words(fields)
    weights = str(fields.get("weights", ""))
    # Without a released checkpoint, seed 0 is what a slug stands for.
    if weights.startswith("random:") and (variant.get("checkpoint_file") or weights != "random:0"):
        words += ["--random-weights", weights.removeprefix("random:")]
    if weights.startswith("sha256:"):
        words += ["--checkpoint", "FILE", "--wan-folder", "FOLDER"]
    if decoder != DECODERS[0] and not weights.startswith("random:"):
        words += ["--taehv", "FILE"]
    return shlex.join(words)


def _plan_words(fields: dict[str, Any]) -> list[str]:
    """Return the options of `cf-build` that a plan needs beyond the defaults."""
    plan = fields.get("plan") or {}
    words: list[str] = []
    if fields.get("backend") == "tensorrt-rtx":  # a tensorrt plan is for the GPU that builds it
        capabilities = tuple(plan.get("compute_capabilities", ()))
        if capabilities != default_compute_capabilities(str(fields.get("precision"))):
            words += [f"--compute-capability={capability}" for capability in capabilities]
    for name, default in (("optimization_level", 3), ("workspace_mib", None), ("plugin", None)):
        if plan.get(name, default) not in (default, "python"):
            words += [f"--{name.replace('_', '-')}", str(plan[name])]
    return words


def default_compute_capabilities(precision: str) -> tuple[int, ...]:
    """Return the GPU generations that a tensorrt-rtx plan is for by default."""
    first = FP8_COMPUTE_CAPABILITY if precision == "fp8" else 0
    return tuple(capability for capability in DEFAULT_RTX_COMPUTE_CAPABILITIES if capability >= first)


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
