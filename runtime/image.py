"""The picture that an image-to-video clip starts from: a file or a URL to a normalised array.

Upstream (Causal-Forcing `inference.py`, I2V branch) converts to RGB, resizes with torchvision's `Resize((H, W))`, which
on a PIL image is PIL's antialiased bilinear filter and ignores the aspect ratio, and normalises with mean and standard
deviation 0.5. `ImageFit.STRETCH` is exactly that, except that a photo's EXIF orientation is applied first: upstream
would animate it lying on its side.
"""

from __future__ import annotations

import io
import os
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from causal_forcing.runtime.errors import ImageError

# PIL, numpy and urllib's client are imported where they are used, so that `--help` does not pay for them.
if TYPE_CHECKING:
    import urllib.request

    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

MAX_IMAGE_PIXELS = 100_000_000
"""Largest picture that is decoded; its header is read first, so that a bomb costs nothing."""
MAX_DOWNLOAD_BYTES = 64 * 2**20
"""Largest picture that is downloaded."""
DOWNLOAD_TIMEOUT_S = 20.0
"""Longest silence of a server."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""What PIL may try. Its other decoders are for pictures that nobody animates, and one of them runs Ghostscript."""


class ImageFit(StrEnum):
    """How a picture of another aspect ratio becomes the video's."""

    STRETCH = "stretch"
    """Change the aspect ratio; upstream's way."""
    CROP = "crop"
    """Keep the aspect ratio: cut equal margins off the longer side."""


def load_image(
    source: str, *, pixel_height: int, pixel_width: int, resize: ImageFit = ImageFit.STRETCH
) -> npt.NDArray[np.float32]:
    """Load the conditioning image of an I2V clip.

    Args:
        source: Path of a picture, or an http(s) URL of one. Downloads are kept nowhere.
        pixel_height: Height H of the video.
        pixel_width: Width W of the video.
        resize: What to do about another aspect ratio.

    Returns:
        [1, 3, 1, H, W] float32 RGB in [-1, 1], contiguous.

    Raises:
        ImageError: Missing, unreachable, not a picture, damaged, or too large.
    """
    import numpy as np

    image = _fit(_decode(source, _read(source)), pixel_height, pixel_width, resize)
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    return np.ascontiguousarray(((pixels - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1)[None, :, None])


def _read(source: str) -> Path | io.BytesIO:
    """Return what PIL can open: the path of a regular file, or a download."""
    if not source.strip():
        raise ImageError("--image-path is empty: name one picture file")
    scheme = urlsplit(source).scheme if "://" in source else ""
    if scheme in ("http", "https"):
        return io.BytesIO(_download(source))
    if scheme:
        raise ImageError(f"cannot load image {source}: {scheme}:// is not supported, expected a path or http(s)://")
    path = Path(source).expanduser()
    try:
        exists, is_file = os.path.exists(path), os.path.isfile(path)
    except ValueError as error:
        raise ImageError(f"cannot load image {source!r}: {error}; check --image-path") from error
    if not exists:
        raise ImageError(f"image {source} does not exist: check --image-path")
    if not is_file:
        kind = "a folder" if os.path.isdir(path) else "not a regular file"
        raise ImageError(f"image {source} is {kind}: name one picture file with --image-path")
    return path


def _download(url: str) -> bytes:
    import http.client
    import urllib.error
    import urllib.request

    # Some hosts turn away urllib's own name.
    request = urllib.request.Request(url, headers={"User-Agent": "causal-forcing-engine", "Accept": "image/*"})
    try:
        with _opener().open(request, timeout=DOWNLOAD_TIMEOUT_S) as response:
            content: bytes = response.read(MAX_DOWNLOAD_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise ImageError(
                f"cannot download image {url}: the server answered HTTP {error.code} {error.reason}; check the URL"
            ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
        raise ImageError(
            f"cannot download image {url}: {_reason(error)}; check the URL, or download it yourself and give the path"
        ) from error
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise ImageError(
            f"image {url} is larger than {MAX_DOWNLOAD_BYTES // 2**20} MiB: scale it down and give the file's path"
        )
    return content


def _opener() -> urllib.request.OpenerDirector:
    """Return a client that speaks http(s) and nothing else, redirects included (urllib's own follows them to ftp)."""
    import urllib.request

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _decode(source: str, content: Path | io.BytesIO) -> Image:
    """Decode to RGB, upright, refusing by its header a picture that is too large."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]  # AVIF is not in every build
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is next
            image = Image.open(content, formats=formats)
        with image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise _too_large(source, f"{image.width}×{image.height} pixels")
            image.load()
            return _as_rgb(ImageOps.exif_transpose(image))
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{source} is not an image that can be read: expected {', '.join(formats)}; convert it to PNG"
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(source, "far more pixels") from error
    except PermissionError as error:
        raise ImageError(f"cannot read image {source}: {_reason(error)}; check its permissions") from error
    except Exception as error:  # PIL's decoders meet damage with whatever their parsing trips over
        raise ImageError(
            f"image {source} is truncated or damaged: {_reason(error)}; save or download it again"
        ) from error


def _as_rgb(image: Image) -> Image:
    if image.mode.startswith("I;16"):
        # PIL's conversion clips 16-bit grey at 255, which makes it white.
        import numpy as np
        import PIL.Image

        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _fit(image: Image, height: int, width: int, resize: ImageFit) -> Image:
    from PIL.Image import Resampling

    box = None
    if resize is ImageFit.CROP:
        scale = min(image.width / width, image.height / height)
        # Clamped: rounding may put a margin of zero just below it, which PIL refuses.
        margin_x = max(0.0, (image.width - width * scale) / 2)
        margin_y = max(0.0, (image.height - height * scale) / 2)
        box = (margin_x, margin_y, image.width - margin_x, image.height - margin_y)
    return image.resize((width, height), Resampling.BILINEAR, box=box)


def _too_large(source: str, got: str) -> ImageError:
    return ImageError(
        f"image {source} has {got}, expected at most {MAX_IMAGE_PIXELS // 10**6} megapixels: scale it down first"
    )


def _reason(error: BaseException) -> str:
    """Return the innermost reason of an error, in one line."""
    reason = getattr(error, "reason", error)
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return " ".join(str(text).split())
