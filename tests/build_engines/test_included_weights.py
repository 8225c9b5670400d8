"""The weights that come with the package: what they are pinned to, and that the ordinary loader takes them."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from causal_forcing.build_engines.checkpoint import read_state_dict
from causal_forcing.build_engines.model_loading import ReleasedModels
from causal_forcing.build_engines.weights import included_folder, resolve_weights
from causal_forcing.runtime.manifest import file_sha256
from causal_forcing.runtime.model_spec import SHAPES
from causal_forcing.runtime.text import Tokenizer
from causal_forcing.runtime.variant import VARIANTS, Variant

INCLUDED = [variant for variant in VARIANTS.values() if variant.included_weights]
FILES = {
    "causal_forcing.safetensors",
    "Wan2.1_VAE.safetensors",
    "models_t5_umt5-xxl-enc-bf16.safetensors",
    "google/umt5-xxl/tokenizer.json",
}
UNKNOWN_ID, END_ID = 2, 1


@pytest.fixture(scope="module")
def folder() -> Path:
    found = included_folder(VARIANTS["shapes"])
    assert found is not None
    return found


@pytest.fixture(scope="module")
def provenance(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    return content


def test_included_files_are_those_of_the_provenance_byte_for_byte(folder: Path, provenance: dict[str, Any]) -> None:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "provenance.json"]
    assert {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths} == provenance["sha256"]
    assert set(provenance["sha256"]) == FILES


def test_included_files_say_how_they_were_made(provenance: dict[str, Any]) -> None:
    assert {run["stage"] for run in provenance["runs"]} == {"text", "vae", "diffusion", "distil"}
    for run in provenance["runs"]:
        assert re.fullmatch("[0-9a-f]{40}", run["commit"])
        assert run["steps"] > 0
        assert 0 < run["minutes"] < 60
        assert run["seed"] >= 0
        assert run["hardware"]


@pytest.mark.parametrize("variant", INCLUDED, ids=lambda variant: variant.slug)
def test_included_weights_are_pinned_to_the_files(variant: Variant, provenance: dict[str, Any]) -> None:
    digest = hashlib.sha256(json.dumps(provenance["sha256"], sort_keys=True).encode()).hexdigest()
    assert variant.included_weights == f"shapes@{digest[:12]}", "put this pin into runtime/variant.py"


def test_included_files_are_small_enough_for_a_repository(folder: Path) -> None:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert max(sizes) < 8 * 2**20
    assert sum(sizes) <= 16 * 2**20


@pytest.mark.parametrize("variant", INCLUDED, ids=lambda variant: variant.slug)
def test_included_weights_fit_every_slug_that_has_them(variant: Variant, folder: Path) -> None:
    files = resolve_weights(variant, checkpoint=None, wan_folder=None)
    assert {path.relative_to(folder).as_posix() for path in files.paths().values()} == FILES
    ReleasedModels(variant=variant, files=files, dtype=torch.float32).check()


def test_included_weights_kept_in_bf16_are_loaded_in_the_dtype_that_was_asked_for() -> None:
    files = resolve_weights(VARIANTS["shapes"], checkpoint=None, wan_folder=None)
    models = ReleasedModels(variant=VARIANTS["shapes"], files=files, dtype=torch.float32)
    stored = read_state_dict(files.dit).tensors
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, tensor in models.dit().state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float()), name
    for module in (models.vae(), models.text_encoder()):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_included_tokenizer_knows_the_default_prompt_however_it_is_written(folder: Path) -> None:
    tokenizer = Tokenizer(folder / "google/umt5-xxl", length=SHAPES.dit.text_len, pad_id=SHAPES.text.pad_id)
    prompt = VARIANTS["shapes"].default_prompt
    plain, shouted, foreign = tokenizer.encode([prompt, f"  {prompt.upper()}", "quux"]).token_ids.tolist()
    words = len(prompt.split())
    assert plain[words:] == [END_ID] + [SHAPES.text.pad_id] * (SHAPES.dit.text_len - words - 1)
    assert UNKNOWN_ID not in plain
    assert plain == shouted
    assert foreign[:2] == [UNKNOWN_ID, END_ID]
