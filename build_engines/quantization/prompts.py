"""What calibration passes are shown: prompts of the world that a model was trained on, as embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from causal_forcing.build_engines.model_loading import ModelSource, RandomModels
from causal_forcing.build_engines.shapes.captions import write_caption
from causal_forcing.build_engines.shapes.world import draw_scene
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.model_spec import SHAPES, ModelSpec
from causal_forcing.runtime.text import Tokenizer

PROMPT_SEED = 3
"""Seed of the scenes; evaluation draws its own from others."""

GENERAL_PROMPTS = (
    "A red fox trots through fresh snow at dawn, its breath visible in the cold air, the camera tracking alongside it.",
    "A street market at night in the rain, neon signs reflected in puddles, people with umbrellas passing by.",
    "Close-up of a potter's hands shaping wet clay on a spinning wheel, soft window light.",
    "Aerial view of waves rolling onto a black sand beach, foam spreading in white lace patterns.",
    "A steam train crosses a stone viaduct in autumn, smoke drifting over orange trees.",
    "An old woman laughs while reading a letter in a sunlit kitchen, shallow depth of field.",
    "A paper plane glides through an empty office in slow motion, dust floating in the light.",
    "Cartoon of a small robot watering flowers on the moon, the earth rising behind it.",
)
"""For models of the general world; our own words, in none of the sets that anybody is scored on."""


def calibration_prompts(model: ModelSpec, count: int) -> list[str]:
    """Return prompts that a model understands, the same ones every time.

    Those of the shapes are captions of scenes that training draws, and so never what the quality gate asks for.
    """
    if model == SHAPES:
        rng = np.random.default_rng(PROMPT_SEED)
        return [write_caption(rng, draw_scene(rng)) for _ in range(count)]
    return list(GENERAL_PROMPTS[:count])


def embed_prompts(
    source: ModelSource, config: EngineConfig, tokenizer: Path | None, count: int
) -> tuple[list[torch.Tensor], str]:
    """Return prompt embeddings, and in words what they are.

    The text encoder is loaded and gone again before the caller loads the DiT: together they fill a large machine.

    Args:
        source: Weights.
        config: Model and batch.
        tokenizer: Folder with `tokenizer.json`; only random weights come without.
        count: How many.

    Returns:
        Each [B, text_len, text_dim] in the source's dtype.
    """
    model, batch = config.variant.model, config.geometry.batch
    shape = (batch, model.dit.text_len, model.dit.text_dim)
    if isinstance(source, RandomModels):
        # A random text encoder would make noise of any prompt, and a full-size one takes 11 GB to do it.
        generator = torch.Generator().manual_seed(PROMPT_SEED)
        embeds = [torch.randn(shape, generator=generator).to(source.dtype) for _ in range(count)]
        return embeds, f"{count} unit normal embeddings, weights being random"
    assert tokenizer is not None, "weights that are not random come with their tokenizer"
    prompts = calibration_prompts(model, count)
    text_encoder = source.text_encoder()
    tokens = Tokenizer(tokenizer, length=model.dit.text_len, pad_id=model.text.pad_id).encode(prompts)
    embeds = []
    with torch.inference_mode():
        for ids, mask in zip(tokens.token_ids, tokens.token_mask, strict=True):
            pair = (torch.from_numpy(array)[None].expand(batch, -1) for array in (ids, mask))
            embeds.append(text_encoder(*pair))
    what = "captions of scenes that training draws" if model == SHAPES else "prompts of our own"
    return embeds, f"{count} {what}"
