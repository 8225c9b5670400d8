"""What the user says about an engine, and what of that cannot be. No framework is imported here.

Merge order: the variant's defaults, then the options that were given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from causal_forcing.runtime.errors import UnknownNameError, UsageError
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.variant import Variant, find_variant

PRECISIONS = ("fp32", "bf16", "fp16", "fp8")
"""Precisions that engines are built in. fp8: linear layers and attention in e4m3, everything between them wider."""

PLUGIN_KINDS = ("python", "quick")
"""Forms of the TensorRT plugin: a Python class, needed to load the plan too, or a kernel inside the plan."""

DEFAULT_SLUG = "shapes"
"""What runs where no slug is given: the trained model that comes with the package."""

TAEHV_FILES = {"taehv": "taew2_1", "lighttae": "lighttaew2_1"}
"""Forms of the tiny decoder, which take different latents, and the released file of each, without its suffix."""

DECODERS = ("wan", *TAEHV_FILES)
"""Decoders that an engine can be built with, the default first."""

TAEHV_FETCH = {
    "taehv": "curl -LO https://github.com/madebyollin/taehv/raw/1f14a568f24bf8811e0a0ac601613e04fc1581e8/taew2_1.pth",
    "lighttae": "hf download lightx2v/Autoencoders lighttaew2_1.pth --local-dir .",
}
"""Commands that bring the released files of the tiny decoders; they lie on no hub at a revision known to us."""


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
