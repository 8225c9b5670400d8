"""Upstream's modules out of a clone: imported without what clips never reach, and filled without any weight file.

Source: thu-ml/Causal-Forcing@1fc7bbc pipeline/causal_inference.py, utils/wan_wrapper.py, wan/modules/.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from causal_forcing.runtime.config import EngineConfig

PACKAGES = {"wan": "wan", "wan.modules": "wan/modules", "utils": "utils", "pipeline": "pipeline"}
"""Upstream's packages and their folders; their own `__init__.py` would import training and image encoders."""


def check_clone(root: Path) -> None:
    """Find out early whether upstream can be imported from a folder."""
    if not (root / "pipeline" / "causal_inference.py").exists():
        raise SystemExit(f"{root} is no clone of thu-ml/Causal-Forcing: it has no pipeline/causal_inference.py")
    if importlib.util.find_spec("einops") is None:
        raise SystemExit("upstream needs einops: pip install einops")


def import_pipeline(root: Path) -> Any:
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
    # A folder of that name with other kernels, as flash-attn-4 has, makes upstream think that it is there.
    has_flash_2 = hasattr(getattr(attention, "flash_attn", None), "flash_attn_varlen_func")
    if not (attention.FLASH_ATTN_3_AVAILABLE or has_flash_2):
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


def draw_weights(config: EngineConfig, device: torch.device) -> None:
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


def randomise_zeros(module: nn.Module) -> None:
    """Draw the weights that upstream's initialisation leaves zero: multiplying zeros takes a GPU less power."""
    for parameter in module.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5)
