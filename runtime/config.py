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
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.variant import Variant, find_variant

SCHEMA_VERSION = 2
"""Version of the engine directory's layout and of `manifest.json`."""

DISTRIBUTION = "causal-forcing-engine"

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
"""Precisions that engines are built in. fp8: linear layers and attention in e4m3, everything between them wider."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
"""Precision to the element type of io_tensors and of everything that is not quantised."""

RTX_COMPUTE_CAPABILITIES = (80, 86, 89, 120, 121)
"""GPU generations that TensorRT-RTX makes plans for, strong typing and bf16 given (86 is RTX 30, 89 is RTX 40)."""

DEFAULT_RTX_COMPUTE_CAPABILITIES = (86, 89, 120)
"""What an RTX plan is for where nobody says: one plan for three generations takes hardly more room than for one."""

FP8_COMPUTE_CAPABILITY = 89
"""First GPU generation with e4m3."""

PLUGIN_KINDS = ("python", "quick")
"""Forms of the TensorRT plugin: a Python class, needed to load the plan too, or a kernel inside the plan."""

DEFAULT_SLUG = "shapes"
"""What runs where no slug is given: the trained model that comes with the package."""

IMAGE_FITS = ("stretch", "crop")
"""Ways of bringing an image to the video's shape."""

TEXT_ENCODER_USES = ("free", "keep")
"""What becomes of the text encoder once a prompt is encoded: its memory is given back, or it stays for more prompts."""

TAEHV_FILES = {"taehv": "taew2_1", "lighttae": "lighttaew2_1"}
"""Forms of the tiny decoder, which take different latents, and the released file of each, without its suffix."""

DECODERS = ("wan", *TAEHV_FILES)
"""Decoders that an engine can be built with, the default first."""

CHECKPOINT_REPOSITORY = "zhuhz22/Causal-Forcing"
CHECKPOINT_REVISION = "2f8eb8bb6eeb1238da9d13e5420d342a74d634a6"
"""Pinned revision of the released Causal-Forcing checkpoints."""

TAEHV_FETCH = {
    "taehv": "curl -LO https://github.com/madebyollin/taehv/raw/1f14a568f24bf8811e0a0ac601613e04fc1581e8/taew2_1.pth",
    "lighttae": "hf download lightx2v/Autoencoders lighttaew2_1.pth --local-dir .",
}
"""Commands that bring the released files of the tiny decoders; they lie on no hub at a revision known to us."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedRank:
    """This process's place among those that a launcher such as torchrun started for one clip."""

    rank: int
    """From 0, which writes the clip."""
    ranks: int
    """How many there are, all on this machine."""
    address: str
    """Host of the store that they meet at."""
    port: int
    """Its port."""
    launcher_has_store: bool
    """Whether the launcher serves the store; else rank 0 does."""
    attempt: str
    """Which of the launcher's attempts this is: its store outlives them."""


def launched_rank() -> LaunchedRank | None:
    """Return the place that a launcher's environment variables give this process; None without a launcher.

    Raises:
        UsageError: They are incomplete, or those of several machines.
    """
    if not os.environ.get("WORLD_SIZE"):
        return None
    ranks = _launch_number("WORLD_SIZE", "a number of processes")
    if ranks < 1:
        raise UsageError("WORLD_SIZE is '0', expected a number of processes: unset WORLD_SIZE")
    if ranks == 1 and not os.environ.get("RANK"):
        return None
    rank, local = _launch_number("RANK", "a rank"), os.environ.get("LOCAL_WORLD_SIZE")
    if rank >= ranks:
        raise UsageError(
            f"RANK is {rank}, expected one below WORLD_SIZE, {ranks}: use torchrun --nproc_per_node={ranks}"
        )
    if local and local != str(ranks):
        raise UsageError(f"{ranks} processes share a clip, {local} of them on this machine: start all of them on one")
    return LaunchedRank(
        rank=rank,
        ranks=ranks,
        address=os.environ.get("MASTER_ADDR") or "127.0.0.1",
        port=_launch_number("MASTER_PORT", "a port") if ranks > 1 else 0,
        launcher_has_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0",
    )


def _launch_number(name: str, expected: str) -> int:
    given = os.environ.get(name)
    if given is None:
        raise UsageError(f"WORLD_SIZE is set, as by torchrun, but {name} is not: use torchrun, or unset WORLD_SIZE")
    if not given.isdecimal():
        raise UsageError(f"{name} is {given!r}, expected {expected}: unset WORLD_SIZE, or use torchrun")
    return int(given)


def op_digest() -> str:
    """Return a hash of the op's sources: an engine holds the op as it was when it was built."""
    digest = hashlib.sha256()
    folder = Path(plugins.__file__).parent
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cu")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def check_ranks(ranks: int, variant: Variant) -> None:
    """Check that a clip of this variant can be made by so many processes together.

    Raises:
        UsageError: The heads of its attention cannot be shared out evenly.
    """
    heads = variant.model.dit.num_heads
    valid = [str(number) for number in range(1, heads + 1) if heads % number == 0]
    if str(ranks) not in valid:
        raise UsageError(
            f"{ranks} GPUs cannot share the {heads} attention heads of {variant.slug}: use {', '.join(valid)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What the user says about an engine; None inherits the variant's or the backend's default."""

    slug: str = DEFAULT_SLUG
    """Model and way of running it; `cf-generate --list` shows all."""
    backend: str = "auto"
    """Backend that runs the engine, or auto."""
    precision: str | None = None
    """fp32, bf16, fp16 or fp8."""
    pixel_height: int | None = None
    """Height of the video, a multiple of 16."""
    pixel_width: int | None = None
    """Width of the video, a multiple of 16."""
    window_frames: int | None = None
    """Latent frames that the KV cache holds."""
    sink_frames: int | None = None
    """First latent frames of the clip that never leave the cache."""
    decoder: str | None = None
    """Decoder from latents to pixels: wan, the default, or a tiny one, taehv or lighttae."""
    context_parallel: int | None = None
    """GPUs that make one clip together, a divisor of the model's attention heads; by default 1, or all of torchrun."""
    checkpoint: Path | None = None
    """DiT checkpoint file, or the folder of the released layout."""
    wan_folder: Path | None = None
    """Wan2.1-T2V-1.3B folder with text encoder, tokenizer and VAE."""
    taehv: Path | None = None
    """File of the tiny decoder, taew2_1 or lighttaew2_1; by default the one in the Wan folder."""
    random_weights: int | None = None
    """Seed of random weights, in place of a checkpoint."""
    compute_capability: list[int] | None = None
    """GPU generation that a tensorrt-rtx plan is for, such as 89; repeat it for more. By default 86, 89 and 120."""
    optimization_level: int | None = None
    """TensorRT's builder optimization level, 0 to 5; by default 3."""
    workspace_mib: int | None = None
    """MiB of GPU memory that a layer of a TensorRT plan may work in; by default all that there is."""
    plugin: str | None = None
    """Form of the op's plugin in a tensorrt plan: python, the default, or quick, which needs no Python to load."""

    def __post_init__(self) -> None:
        if self.compute_capability is not None:  # a list on the command line; two orders are one engine
            object.__setattr__(self, "compute_capability", sorted(set(self.compute_capability)))
        if self.precision is not None and self.precision not in PRECISIONS:
            raise UnknownNameError("precision", self.precision, PRECISIONS)
        if self.decoder is not None and self.decoder not in DECODERS:
            raise UnknownNameError("decoder", self.decoder, DECODERS)
        if self.random_weights is not None and (self.checkpoint or self.wan_folder or self.taehv):
            raise UsageError("--random-weights excludes --checkpoint, --wan-folder and --taehv: give one or the other")
        if self.taehv is not None:
            self._check_taehv(self.taehv)
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(f"--optimization-level {self.optimization_level} is out of range: use 0 to 5")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UsageError(f"--workspace-mib {self.workspace_mib} leaves no memory: use 1 or more")
        if self.plugin is not None and self.plugin not in PLUGIN_KINDS:
            raise UnknownNameError("plugin", self.plugin, PLUGIN_KINDS)

    @property
    def ranks(self) -> int:
        """Processes that make one clip together."""
        return 1 if self.context_parallel is None else self.context_parallel

    @property
    def has_taehv(self) -> bool:
        """Whether the decoder is a form of TAEHV."""
        return self.decoder in TAEHV_FILES

    def _check_taehv(self, file: Path) -> None:
        """Check that a file goes with the decoder: both forms have the same tensors, only the name tells them apart."""
        if not self.has_taehv:
            raise UsageError(f"--taehv is for the tiny decoders: add --decoder {' or '.join(TAEHV_FILES)}")
        named = next((name for name in ("lighttae", "taehv") if file.name.startswith(TAEHV_FILES[name])), self.decoder)
        if named != self.decoder:
            raise UsageError(
                f"{file} is the file of --decoder {named}, which takes other latents than {self.decoder}: "
                f"use --decoder {named}"
            )

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
