"""Train the VAE of `shapes`: frames to latents of mean 0 and deviation 1, and back.

Latents are normalised by their batch's own statistics, and a little noise is added to them before they are decoded,
so that the decoder bears the errors of a denoiser. At the end the statistics are folded into the encoder's last
convolution.

    python examples/shapes/train_vae.py --output runs/shapes --minutes 3
    python examples/shapes/train_vae.py --output runs/shapes --minutes 1.5 --decoder-only
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import nn
from training import DEVICE, AveragedWeights, Optimizer, Run, write_sheet

from causal_forcing.build_engines.models.vae import VAEDecoderFirst, VAEEncoder, VAEEncoderFirst, WanVAE
from causal_forcing.build_engines.shapes.world import (
    FRAME_PIXELS,
    Tracks,
    draw_scene,
    draw_tracks,
    render,
)
from causal_forcing.runtime.model_spec import SHAPES as MODEL

SCENES = 8192
"""Scenes that are drawn once; each batch takes other ones, from another frame on and another part of the picture."""

CROP_PIXELS = 64
CROPPED_SHARE = 0.6
"""Share of the run that sees quarter pictures, four times as many."""

CLIP_FRAMES = (17, 65, 33)
"""Lengths of clips, in turn; the longest is twice what the denoiser is trained on."""

LATENT_NOISE = 0.2
"""Largest deviation of the noise that is added to latents."""

PEAK_LEARNING_RATE = 2e-3


class Codec(nn.Module):
    """The VAE over whole clips, with the statistics of its latents."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, vae: WanVAE) -> None:
        super().__init__()
        self.vae = vae
        self.first, self.rest, self.decoder = VAEEncoderFirst(vae), VAEEncoder(vae), VAEDecoderFirst(vae)
        self.register_buffer("shift", torch.zeros(vae.spec.latent_channels, 1, 1))
        self.register_buffer("scale", torch.ones(vae.spec.latent_channels, 1, 1))

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Return raw latents [B, F, C, h, w] of video [B, T, 3, H, W] in [-1, 1]; T is 1 + 4(F − 1)."""
        x = video.transpose(1, 2)
        latent, *caches = self.first(x[:, :, :1])
        if x.shape[2] == 1:
            return latent
        return torch.cat((latent, self.rest(x[:, :, 1:], *caches)[0]), dim=1)

    @staticmethod
    def normalise(latents: torch.Tensor) -> torch.Tensor:
        """Bring a batch's latents to mean 0 and deviation 1 by channel."""
        values = latents.float()
        deviation, mean = torch.std_mean(values, dim=(0, 1, 3, 4), keepdim=True)
        return (values - mean) / (deviation + 1e-4)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return video [B, T, 3, H, W] of normalised latents."""
        pixels: torch.Tensor = self.decoder(latents)[0]
        return pixels


def main(
    output: Annotated[Path, typer.Option(help="Folder of this run.")] = Path("runs/shapes"),
    minutes: Annotated[float, typer.Option(help="Time to train.")] = 3.0,
    steps: Annotated[int, typer.Option(help="Most optimizer steps.")] = 100_000,
    batch: Annotated[int, typer.Option(help="Whole clips a step.")] = 16,
    is_channels_last: Annotated[bool, typer.Option("--channels-last/--channels-first", help="Layout.")] = True,
    is_decoder_only: Annotated[bool, typer.Option("--decoder-only", help="Refine the decoder of `vae.pt`.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights and scenes.")] = 0,
) -> None:
    """Train, and write `vae.pt`; go on from it where it is there."""
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng, pair_probability=0.35) for _ in range(SCENES)]
    tracks = draw_tracks(rng, scenes, frames=max(CLIP_FRAMES))
    run = Run(output, "vae", steps=steps, minutes=minutes)
    codec = Codec(WanVAE(MODEL.vae)).to(DEVICE)
    before = run.resume()
    if before is not None:
        codec.vae.load_state_dict(before["vae"])
    if is_decoder_only:
        for module in (codec.vae.encoder, codec.vae.conv1):
            module.requires_grad_(False)
    if is_channels_last:
        lay_channels_last(codec)
    average = AveragedWeights(codec, decay=0.995)
    optimizer = Optimizer(codec, muon=False)
    while True:
        frames = CLIP_FRAMES[run.step % len(CLIP_FRAMES)]
        size = CROP_PIXELS if run.progress < CROPPED_SHARE else FRAME_PIXELS
        count = batch * CLIP_FRAMES[0] * FRAME_PIXELS**2 // (frames * size**2)  # as many pixels each time
        video = draw_batch(rng, tracks, max(1, count), frames, size)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            latents = codec.encode(video) if is_decoder_only else codec.normalise(codec.encode(video))
            deviation = LATENT_NOISE * torch.rand(len(latents), 1, 1, 1, 1, device=DEVICE)
            restored = codec.decode(latents + deviation * torch.randn_like(latents))
        error = restored.float() - video
        absolute, square = error.abs().mean(), error.square().mean()
        rate = run.learning_rate(PEAK_LEARNING_RATE, decay_from=0.4, floor=0.02)
        ((error.abs() + error.square()) * importance(video)).mean().backward()
        norm = optimizer.step(rate)
        average.update()
        run.log(absolute=absolute.detach(), psnr=10 * torch.log10(4 / square.detach()), gradient=norm)
        if not run.advance():
            break
    average.copy_to(codec)
    codec.eval()
    with torch.inference_mode():
        if not is_decoder_only:
            measure_latents(codec, [draw_batch(rng, tracks, batch, CLIP_FRAMES[0], FRAME_PIXELS) for _ in range(24)])
        video = draw_batch(rng, tracks, 8, CLIP_FRAMES[1], FRAME_PIXELS)
        restored = codec.decode((codec.encode(video) - codec.shift) / codec.scale)
    write_sheet(torch.cat((video, restored), dim=3), output / "vae.png")
    run.save(vae=folded(codec).state_dict(), seed=seed)


def draw_batch(rng: np.random.Generator, tracks: Tracks, count: int, length: int, size: int) -> torch.Tensor:
    """Return video [count, length, 3, size, size] in [-1, 1]: parts of scenes, in time and space."""
    rows = rng.integers(len(tracks.background), size=count)
    start = int(rng.integers(max(CLIP_FRAMES) - length + 1))
    part = tracks.part(rows, slice(start, start + length))
    video = render(part, device=DEVICE)
    if size < FRAME_PIXELS:
        # Cut where an object is: most of a picture is flat.
        middle = np.stack((part.y[:, 0, length // 2], part.x[:, 0, length // 2]), axis=1)
        corner = middle + rng.uniform(-size * 0.75, size * -0.25, middle.shape)
        corners = np.clip(corner.round().astype(int), 0, FRAME_PIXELS - size)
        video = torch.stack(
            [clip[..., y : y + size, x : x + size] for clip, (y, x) in zip(video, corners.tolist(), strict=True)]
        )
    return 2 * video - 1


def importance(video: torch.Tensor) -> torch.Tensor:
    """Return how much each pixel counts, [B, T, 1, H, W].

    Objects and their outlines count more than a flat background, and the clip's first frame more than others: it alone
    has a latent frame of its own, and all others follow from it.
    """
    coloured = (video.amax(2) - video.amin(2) > 0.2).float()
    near = F.max_pool2d(coloured, 7, stride=1, padding=3)
    weight = 1 + 5 * near[:, :, None]
    weight[:, 0] *= 3
    return weight


def lay_channels_last(module: nn.Module) -> None:
    """Lay convolution weights out as the GPU's kernels want them."""
    for parameter in module.parameters():
        if parameter.dim() in (4, 5):
            layout = torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
            parameter.data = parameter.data.contiguous(memory_format=layout)


def measure_latents(codec: Codec, batches: Sequence[torch.Tensor]) -> None:
    """Set the statistics of the latents of the finished encoder."""
    latents = torch.cat([codec.encode(video) for video in batches])
    deviation, mean = torch.std_mean(latents, dim=(0, 1, 3, 4))
    codec.shift.copy_(mean.view(-1, 1, 1))
    codec.scale.copy_(deviation.view(-1, 1, 1))


@torch.no_grad()
def folded(codec: Codec) -> WanVAE:
    """Return the VAE whose encoder gives normalised latents by itself."""
    vae, channels = codec.vae, codec.vae.spec.latent_channels
    assert vae.conv1.bias is not None, "upstream's convolutions have a bias"
    vae.conv1.weight[:channels] /= codec.scale.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:channels] = (vae.conv1.bias[:channels] - codec.shift.flatten()) / codec.scale.flatten()
    return vae


if __name__ == "__main__":
    typer.run(main)
