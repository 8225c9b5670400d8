"""Upstream itself as a peer: its pipeline, DiT and VAE from a clone, at the engine's sizes, with random weights.

What is timed is upstream's own code, `CausalInferencePipeline.inference`. Only what stands around it is replaced:
weights are drawn in place of being loaded, the prompt embedding is random in place of being encoded, modules that clips
never reach are left out, and where no flash-attn is installed attention is torch's with cuDNN preferred, which
upstream's own fallback would leave to torch.

Source: thu-ml/Causal-Forcing@1fc7bbc pipeline/causal_inference.py, utils/wan_wrapper.py, wan/modules/.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.clips import Clip, frames_of, random_initial_latent, random_prompt
from benchmarks.subject import SEED
from benchmarks.timing import CallLog, Mark, marker, synchronize
from causal_forcing.runtime.config import EngineConfig

PACKAGES = {"wan": "wan", "wan.modules": "wan/modules", "utils": "utils", "pipeline": "pipeline"}
"""Upstream's packages and their folders; their own `__init__.py` would import training and image encoders."""

HEADS, HEAD_DIM, LAYERS, CACHE_SLOTS = 12, 128, 30, 32760
"""Sizes that upstream's pipeline has as literals; other models need caches made for them."""

BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
"""Attention of torch, the first that takes a shape: heads of the VAE are too wide for the first two."""


class UpstreamPeer:
    """Upstream's pipeline at an engine's sizes.

    Args:
        root: A clone of thu-ml/Causal-Forcing.
        config: The engine's; its carrier's precision, geometry and denoising steps count.
        dtype: Type of weights and activations.
        device: Where to run.
        chunks: Chunks of a clip.
    """

    def __init__(self, root: Path, config: EngineConfig, dtype: torch.dtype, device: torch.device, chunks: int) -> None:
        self._config, self._device, self._chunks, self._dtype = config, device, chunks, dtype
        self._log = CallLog(marker(device))
        variant, geometry = config.variant, config.geometry
        self._initial = random_initial_latent(config)
        window = config.geometry.window_frames
        arguments = types.SimpleNamespace(
            denoising_step_list=list(variant.denoising_steps),
            warp_denoising_step=variant.warp_steps,
            denoising_step_list_first_chunk=variant.first_chunk_denoising_steps,
            num_frame_per_block=geometry.chunk_frames,
            independent_first_frame=False,
            context_noise=variant.context_timestep,
            model_kwargs={
                "timestep_shift": variant.timestep_shift,
                "local_attn_size": -1 if window * geometry.tokens_per_frame == CACHE_SLOTS else window,
                "sink_size": geometry.sink_frames,
            },
        )
        with _quiet(), torch.no_grad():
            causal_inference = _import_upstream(root)
            _draw_weights(config, device)
            text = _RandomText(random_prompt(config, device).to(dtype))
            pipeline = causal_inference.CausalInferencePipeline(arguments, device=device, text_encoder=text)
            pipeline = pipeline.to(dtype=dtype).to(device).eval()
            _randomise_zeros(pipeline)
        self._pipeline = pipeline
        self._fit_caches()
        pipeline.generator.forward = self._logged("pass", pipeline.generator.forward)
        pipeline.vae.decode_to_pixel = self._logged("decode", pipeline.vae.decode_to_pixel)

    def clip(self, *, staged: bool) -> Clip:
        """Make a clip: all chunks first and their decode at the end, as upstream does."""
        generator = torch.Generator().manual_seed(SEED)
        initial = None if self._initial is None else self._initial.to(self._device, self._dtype)
        geometry = self._config.geometry
        frames = self._chunks * geometry.chunk_frames - (0 if initial is None else initial.shape[1])
        channels = self._config.variant.model.dit.latent_channels
        noise = torch.randn(1, frames, channels, geometry.latent_height, geometry.latent_width, generator=generator)
        self._log.is_open = staged
        synchronize(self._device)
        begun_s = time.perf_counter()
        with _quiet(), torch.no_grad(), sdpa_kernel(list(BACKENDS), set_priority=True):
            noise = noise.to(self._device, self._dtype)
            video = self._pipeline.inference(noise, ["a prompt that is already encoded"], initial_latent=initial)
            shown = (video * 255).to(torch.uint8).cpu()
        total_ms = 1000 * (time.perf_counter() - begun_s)
        self._log.is_open = False
        self._pipeline.vae.model.clear_cache()
        made = frames_of(self._config, self._chunks)
        assert shown.shape[1] == made, f"upstream made {shown.shape[1]} frames, expected {made}"
        stages = tuple(self._steps(self._log.take())) if staged else ()
        return Clip(frames=made, total_ms=total_ms, stage_ms=stages)

    def facts(self) -> dict[str, Any]:
        """Return nothing more."""
        return {}

    def first_latents(self) -> None:
        """Return nothing: its weights and its noise are other ones."""

    def close(self) -> None:
        """Free everything."""
        self.__dict__.clear()

    def _steps(self, calls: list[tuple[str, Mark, Mark]]) -> Iterator[dict[str, float]]:
        """Yield the stages of each AR step; the last also has the decode of the whole clip."""
        passes = [begin.elapsed_ms(end) for name, begin, end in calls if name == "pass"]
        (decode,) = [begin.elapsed_ms(end) for name, begin, end in calls if name == "decode"]
        variant = self._config.variant
        initial_chunks = 0 if self._initial is None else 1
        for index in range(self._chunks):
            generated = index - initial_chunks
            steps = variant.denoising_steps
            if generated == 0 and variant.first_chunk_denoising_steps:
                steps = variant.first_chunk_denoising_steps
            count = len(steps) if generated >= 0 else 0
            stages = {"context": passes[count]} | ({"denoise": sum(passes[:count])} if count else {})
            passes = passes[count + 1 :]
            yield stages | ({"decode_of_the_clip": decode} if index + 1 == self._chunks else {})
        assert not passes, f"{len(passes)} passes of upstream belong to no chunk"

    def _logged(self, name: str, call: Any) -> Any:
        return lambda *args, **kwargs: self._log.run(name, lambda: call(*args, **kwargs))

    def _fit_caches(self) -> None:
        """Give a model of other sizes caches that fit it; upstream makes its own for the full-size model."""
        dit, geometry, pipeline = self._config.variant.model.dit, self._config.geometry, self._pipeline
        pipeline.frame_seq_length, pipeline.num_transformer_blocks = geometry.tokens_per_frame, dit.num_layers
        if (dit.num_heads, dit.head_dim, dit.num_layers) == (HEADS, HEAD_DIM, LAYERS):
            return

        def zeros(slots: int) -> torch.Tensor:
            return torch.zeros(1, slots, dit.num_heads, dit.head_dim, dtype=self._dtype, device=self._device)

        def index() -> torch.Tensor:
            return torch.tensor([0], dtype=torch.long, device=self._device)

        slots = geometry.cache_slots
        pipeline.kv_cache1 = [
            {"k": zeros(slots), "v": zeros(slots), "global_end_index": index(), "local_end_index": index()}
            for _ in range(dit.num_layers)
        ]
        pipeline.crossattn_cache = [{"is_init": False} for _ in range(dit.num_layers)]


class _RandomText(nn.Module):
    """Stands in for the text encoder: the same embedding for every prompt."""

    def __init__(self, embedding: torch.Tensor) -> None:
        super().__init__()
        self._embedding = embedding

    def forward(self, text_prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": self._embedding}


def check_clone(root: Path) -> None:
    """Find out early whether upstream can be imported from a folder."""
    if not (root / "pipeline" / "causal_inference.py").exists():
        raise SystemExit(f"{root} is no clone of thu-ml/Causal-Forcing: it has no pipeline/causal_inference.py")
    if importlib.util.find_spec("einops") is None:
        raise SystemExit("upstream needs einops: pip install einops")


def _import_upstream(root: Path) -> Any:
    """Import upstream's pipeline from a clone without what clips do not reach; returns its module."""
    for name, folder in PACKAGES.items():
        package = types.ModuleType(name)
        package.__path__ = [str(root / folder)]
        sys.modules[name] = package
    nothing: dict[str, dict[str, Any]] = {
        "tqdm": {"tqdm": lambda items: items}
    }  # no bar: it would write between the passes
    not_reached: dict[str, dict[str, Any]] = {
        "wan.modules.t5": {"umt5_xxl": None},
        "wan.modules.tokenizers": {"HuggingfaceTokenizer": None},
        "demo_utils": {},
        "demo_utils.memory": dict.fromkeys(
            (
                "gpu",
                "get_cuda_free_memory_gb",
                "DynamicSwapInstaller",
                "move_model_to_device_with_memory_preservation",
            )
        ),
    }
    of_diffusers: dict[str, dict[str, Any]] = {
        "diffusers": {},
        "diffusers.configuration_utils": {
            "ConfigMixin": type("ConfigMixin", (), {}),
            "register_to_config": lambda init: init,
        },
        "diffusers.models": {},
        "diffusers.models.modeling_utils": {"ModelMixin": type("ModelMixin", (nn.Module,), {})},
    }
    with _modules(nothing | not_reached | of_diffusers):
        causal_inference = importlib.import_module("pipeline.causal_inference")
    attention = importlib.import_module("wan.modules.attention")
    if not (attention.FLASH_ATTN_2_AVAILABLE or attention.FLASH_ATTN_3_AVAILABLE):
        vars(importlib.import_module("wan.modules.model"))["flash_attention"] = _torch_attention
        vars(importlib.import_module("wan.modules.causal_model"))["attention"] = _torch_attention
    return causal_inference


@contextlib.contextmanager
def _modules(contents: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Have modules of these contents while others import them."""
    before = {name: sys.modules.get(name) for name in contents}
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name, module_before in before.items():
            if module_before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module_before


def _torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
    """Attend without a mask; [B, L, N, D] in and out."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).contiguous()


def _draw_weights(config: EngineConfig, device: torch.device) -> None:
    """Have upstream's constructors draw weights on the device where they would load files."""
    wrapper = importlib.import_module("utils.wan_wrapper")
    dit, vae = config.variant.model.dit, config.variant.model.vae

    def make_dit(path: str, **options: Any) -> Any:
        with torch.device(device):
            return wrapper.CausalWanModel(
                model_type="t2v",
                patch_size=(1, dit.patch_size, dit.patch_size),
                text_len=dit.text_len,
                in_dim=dit.latent_channels,
                dim=dit.dim,
                ffn_dim=dit.ffn_dim,
                freq_dim=dit.freq_dim,
                text_dim=dit.text_dim,
                out_dim=dit.latent_channels,
                num_heads=dit.num_heads,
                num_layers=dit.num_layers,
                eps=dit.eps,
                **options,
            )

    def make_vae(pretrained_path: str, z_dim: int) -> Any:
        with torch.device(device):
            return importlib.import_module("wan.modules.vae").WanVAE_(
                dim=vae.base_dim,
                z_dim=z_dim,
                dim_mult=list(vae.dim_mult),
                num_res_blocks=vae.num_res_blocks,
                temperal_downsample=list(vae.temporal_downsample),
            )

    wrapper.CausalWanModel.from_pretrained = make_dit
    vars(wrapper)["_video_vae"] = make_vae


def _randomise_zeros(module: nn.Module) -> None:
    """Draw the weights that upstream's initialisation leaves zero: multiplying zeros takes a GPU less power."""
    for parameter in module.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send what upstream prints to stderr: stdout is the record's."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
