"""The conditioning image: upstream's numbers, and one line for everything that can be wrong with a picture."""

from __future__ import annotations

import io
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from causal_forcing.runtime import image as image_module
from causal_forcing.runtime.errors import ImageError
from causal_forcing.runtime.image import ImageFit, load_image

HEIGHT, WIDTH = 32, 48


def picture(height: int = 60, width: int = 70) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def load(source: Path | str, resize: ImageFit = ImageFit.STRETCH) -> npt.NDArray[np.float32]:
    return load_image(str(source), pixel_height=HEIGHT, pixel_width=WIDTH, resize=resize)


def error_of(source: Path | str) -> str:
    with pytest.raises(ImageError) as caught:
        load(source)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    return message


class Handler(BaseHTTPRequestHandler):
    """Answers by path; silent."""

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        if name.isdigit():
            self.send_error(int(name))
            return
        if name == "to-file":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/picture.png")
            self.end_headers()
            return
        if name == "moved.png":
            self.send_response(301)
            self.send_header("Location", "/picture.png")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>no picture</html>" if name == "page.html" else png_bytes(picture()))

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_image_stretched_equals_upstreams_transform(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    # torchvision: Resize((H, W)) on a PIL image, ToTensor, Normalize([0.5], [0.5]).
    resized = np.asarray(picture().resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), dtype=np.float32)
    expected = (resized.transpose(2, 0, 1) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    result = load(tmp_path / "a.png")
    assert result.shape == (1, 3, 1, HEIGHT, WIDTH)
    assert result.dtype == np.float32
    assert result.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(result[0, :, 0], expected)


def test_image_black_and_white_span_the_range(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 0).save(tmp_path / "black.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    assert (load(tmp_path / "black.png") == -1).all()
    assert (load(tmp_path / "white.png") == 1).all()


@pytest.mark.parametrize(("size", "kept"), [((96, 32), (24, 0, 72, 32)), ((48, 64), (0, 16, 48, 48))])
def test_image_cropped_keeps_the_centre(tmp_path: Path, size: tuple[int, int], kept: tuple[int, int, int, int]) -> None:
    whole = picture(size[1], size[0])
    whole.save(tmp_path / "a.png")
    expected = np.asarray(whole.crop(kept), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(load(tmp_path / "a.png", ImageFit.CROP)[0, :, 0], expected, atol=1e-6)


@pytest.mark.parametrize("side", [1, 7, 331])
def test_image_cropped_odd_sizes_fit(tmp_path: Path, side: int) -> None:
    picture(side, 113).save(tmp_path / "a.png")
    assert load(tmp_path / "a.png", ImageFit.CROP).shape == (1, 3, 1, HEIGHT, WIDTH)


def test_image_with_exif_orientation_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shot with the camera on its side
    picture().save(tmp_path / "side.png", exif=exif)
    picture().transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    np.testing.assert_array_equal(load(tmp_path / "side.png"), load(tmp_path / "upright.png"))


def test_image_of_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0x4000, np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_allclose(load(tmp_path / "a.png"), 0x40 / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "1"])
def test_image_of_other_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    picture().convert(mode).save(tmp_path / "a.tiff")
    assert load(tmp_path / "a.tiff").shape == (1, 3, 1, HEIGHT, WIDTH)


def test_image_missing_is_reported(tmp_path: Path) -> None:
    assert "does not exist: check --image-path" in error_of(tmp_path / "none.png")


def test_image_folder_is_reported(tmp_path: Path) -> None:
    assert "is a folder: name one picture file" in error_of(tmp_path)


def test_image_of_text_is_reported_with_the_formats(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    assert "is not an image that can be read: expected PNG, JPEG" in error_of(tmp_path / "a.png")


def test_image_of_postscript_is_never_handed_to_ghostscript(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    assert "is not an image" in error_of(tmp_path / "a.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_image_truncated_is_reported(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a"
    picture().save(path, format=format)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "is truncated or damaged" in error_of(path) or "is not an image" in error_of(path)


def test_image_with_flipped_bytes_is_reported(tmp_path: Path) -> None:
    content = bytearray(png_bytes(picture()))
    content[200:220] = bytes(20)
    (tmp_path / "a.png").write_bytes(content)
    assert "is truncated or damaged" in error_of(tmp_path / "a.png")


@pytest.mark.parametrize("side", [10_001, 20_000])
def test_image_huge_by_its_header_is_refused_undecoded(tmp_path: Path, side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")))
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert "expected at most 100 megapixels" in error_of(tmp_path / "a.png")


def test_image_from_url_equals_the_file(tmp_path: Path, server: str) -> None:
    picture().save(tmp_path / "a.png")
    np.testing.assert_array_equal(load(f"{server}/picture.png"), load(tmp_path / "a.png"))
    np.testing.assert_array_equal(load(f"{server}/moved.png"), load(tmp_path / "a.png"))


@pytest.mark.parametrize("status", [404, 503])
def test_image_url_with_error_status_names_it(server: str, status: int) -> None:
    assert f"the server answered HTTP {status}" in error_of(f"{server}/{status}")


def test_image_url_of_a_page_is_not_an_image(server: str) -> None:
    assert "is not an image" in error_of(f"{server}/page.html")


def test_image_url_redirected_off_http_is_refused(server: str) -> None:
    assert "unknown url type: ftp" in error_of(f"{server}/to-file")


def test_image_url_too_long_a_download_is_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "MAX_DOWNLOAD_BYTES", 1000)
    assert "is larger than" in error_of(f"{server}/picture.png")


def test_image_url_nobody_listening_gives_the_reason() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        assert "Connection refused" in error_of(f"http://127.0.0.1:{unused.getsockname()[1]}/a.png")


def test_image_url_of_a_silent_server_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "DOWNLOAD_TIMEOUT_S", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start_s = time.monotonic()
        assert "timed out" in error_of(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png")
        assert time.monotonic() - start_s < 2


@pytest.mark.parametrize("source", ["file:///etc/hostname", "ftp://127.0.0.1/a.png"])
def test_image_url_of_other_scheme_is_refused(source: str) -> None:
    assert ":// is not supported, expected a path or http(s)://" in error_of(source)


def test_image_url_malformed_is_one_line() -> None:
    assert "cannot download image" in error_of("http://127.0.0.1:port/a b.png")
