"""What a clip is asked for with, and what is refused before anything is built, loaded or written."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from causal_forcing.runtime.config import TEXT_ENCODER_USES, GenerateConfig
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.environment import rank_exchange
from causal_forcing.runtime.errors import (
    EngineNotFoundError,
    ImageError,
    OutputError,
    RecordError,
    UnknownNameError,
    UsageError,
)
from causal_forcing.runtime.frame_output import check_writable
from causal_forcing.runtime.image import ImageFit, load_image
from causal_forcing.runtime.manifest import read_manifest
from causal_forcing.runtime.record import check_record_path
from causal_forcing.runtime.resolution import check_fits, resolve_engine

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipRequest:
    """Everything that `cf-generate` was asked for."""

    options: EngineOptions
    """Which engine."""
    generate: GenerateConfig
    """Which clip."""
    output: str | None = None
    """An mp4 file, or a folder for PNG frames; None takes a free name in `output_dir`."""
    output_dir: Path = Path("outputs")
    """Folder of clips without `output`; it is made if it is not there."""
    fps: int
    """Playback rate."""
    device: str = "auto"
    """Where to run."""
    engine_folder: Path | None = None
    """An engine directory to use as it is; None finds or builds one."""
    image_sha256: str | None = None
    """What the image must hash to, as the engine gets it; None takes any."""
    text_encoder: str = "free"
    """What becomes of the text encoder once the prompt is encoded: free or keep."""
    prompt_cache: bool = True
    """Whether the prompt's embedding is looked for, and kept, on disk."""

    def __post_init__(self) -> None:
        if self.text_encoder not in TEXT_ENCODER_USES:
            raise UnknownNameError("use of the text encoder", self.text_encoder, TEXT_ENCODER_USES)


def check_request(request: ClipRequest, *, writes: bool = True) -> npt.NDArray[np.float32] | None:
    """Find what is wrong with the request before anything is built, loaded or written; returns the image.

    What needs no framework comes first, so that most refusals are instant.
    """
    options, generate = request.options, request.generate
    variant = options.variant()
    geometry = options.geometry()
    if options.ranks > 1:
        rank_exchange()
    if writes:
        _check_output(request)
    if request.engine_folder is not None:
        if not request.engine_folder.is_dir():
            raise EngineNotFoundError(
                f"no engine directory {request.engine_folder}: leave out --engine, or run: cf-build {options.slug}"
            )
        manifest = read_manifest(request.engine_folder)
        check_fits(manifest, options)
        geometry = manifest.config.geometry
    if variant.takes_image and generate.image is None:
        raise ImageError(f"{variant.slug} starts from an image and none was given: add --image-path FILE")
    if generate.image is not None and not variant.takes_image:
        raise ImageError(f"{variant.slug} makes video from text alone: leave out --image-path, or use an i2v slug")
    image = None
    if generate.image is not None:
        image = load_image(
            generate.image,
            pixel_height=geometry.pixel_height,
            pixel_width=geometry.pixel_width,
            resize=ImageFit(generate.image_fit),
        )
        if request.image_sha256 not in (None, image_sha256(image)):
            raise RecordError(f"the image {generate.image} is not the record's any more: bring back the one it was")
    if request.engine_folder is None:
        resolve_engine(options, weights="", device=request.device)
    return image


def _check_output(request: ClipRequest) -> None:
    if request.output is not None:
        if not request.output.strip():
            raise UsageError("--output is empty: name an .mp4 file, or a folder for PNG frames")
        check_writable(request.output)
        check_record_path(request.output)
        return
    # What would be made first: the nearest folder that is there must take it.
    folder = Path(os.path.abspath(request.output_dir))
    while not os.path.lexists(folder):
        folder = folder.parent
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        what = "is not writable" if os.path.isdir(folder) else "is no folder"
        raise OutputError(f"cannot write into {request.output_dir}: {folder} {what}; choose another --output-dir")


def image_sha256(image: npt.NDArray[np.float32]) -> str:
    """Return the hash of an image as the engine gets it, hexadecimal."""
    return hashlib.sha256(image.tobytes()).hexdigest()
