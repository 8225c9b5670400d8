"""An engine directory, made: load, cut into networks, export, describe, and only then give it its name."""

from __future__ import annotations

import gc
import importlib.metadata
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causal_forcing.build_engines.cuda.tape_set import TapeSet, compile_kernels, lay_out
from causal_forcing.build_engines.dit_networks import dit_networks
from causal_forcing.build_engines.engine_directory import check_room, locked, written_whole
from causal_forcing.build_engines.export import export_program, save_onnx, save_program
from causal_forcing.build_engines.model_loading import ModelSource
from causal_forcing.build_engines.networks import Network
from causal_forcing.build_engines.plans.plan_set import PlanProgress, compile_plans
from causal_forcing.build_engines.quantization.calibration import calibrate
from causal_forcing.build_engines.quantization.recipe import Recipe
from causal_forcing.build_engines.text_networks import text_network_names, text_networks
from causal_forcing.build_engines.tiny_tokenizer import write_byte_tokenizer
from causal_forcing.build_engines.vae_networks import decoder_networks, encoder_networks, taehv_networks
from causal_forcing.plugins.ranks import rehearse
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.loading import TOKENIZER_FOLDER
from causal_forcing.runtime.manifest import MANIFEST_NAME, Manifest, describe_files, stamp_files
from causal_forcing.runtime.schedule import plan_variant
from causal_forcing.runtime.variant import Variant

ALL_PARTS = ("dit", "vae", "text_encoder")
"""Models that an engine's networks are cut from."""

_ARTEFACT_SUFFIX = {"onnxruntime": ".onnx", "torch": ".pt2", "tensorrt": ".onnx", "tensorrt-rtx": ".onnx"}
"""What a network is exported to; plans are compiled from it afterwards."""

Progress = Callable[[str], None]
"""Called with a network's name when its export begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildJob:
    """Everything a build needs."""

    config: EngineConfig
    """What to build."""
    source: ModelSource
    """Where weights come from."""
    tokenizer: Path | None = None
    """Folder with `tokenizer.json`; None writes the byte tokenizer of the random models."""
    parts: tuple[str, ...] = ALL_PARTS
    """Models to include; engines without text encoder or decoder serve embeddings and latents."""
    provenance: dict[str, Any] | None = None
    """Recorded in the manifest: weight files and their hashes."""
    recipe: Recipe | None = None
    """What of the DiT is quantised, in place of a calibration; None calibrates where precision is fp8."""


def has_pair(config: EngineConfig) -> bool:
    """Say whether an engine has `dit_context_step`: a network for engines that never wait, one clip at a time."""
    geometry = config.geometry
    return config.backend == "cuda" and geometry.batch == 1 and 2 * geometry.chunk_frames <= geometry.window_frames


def network_names(variant: Variant, parts: tuple[str, ...] = ALL_PARTS, *, with_pair: bool = False) -> list[str]:
    """Return the names of the networks that a build makes, in order."""
    names: list[str] = []
    if "dit" in parts:
        names += ["timestep_modulation", "prompt_kv", "dit_step", "dit_context"]
        if with_pair:
            names.append("dit_context_step")
    if "vae" in parts:
        names += ["vae_decoder_first", "vae_decoder"]
        if variant.takes_image:
            names += ["vae_encoder_first", "vae_encoder"]
    if "text_encoder" in parts:
        names += text_network_names(variant.model.text)
    return names


def build(
    job: BuildJob,
    folder: Path,
    *,
    progress: Progress = lambda name: None,
    plan_progress: PlanProgress = lambda name, tree: None,
) -> Manifest:
    """Build an engine directory.

    The directory appears under its name only when it is complete: a build that fails or is killed leaves nothing but a
    hidden folder, which the next build of the same engine removes.

    Args:
        job: What to build, from what.
        folder: The directory to make; an existing one is replaced at the very end.
        progress: Told each network's name as its export begins.
        plan_progress: Told how far the compiling of each network is.

    Raises:
        BuildLockedError: Another process builds the same directory.
        OutputError: The directory cannot be written.
        PlanError: TensorRT does not compile a network as it was asked to.
    """
    with locked(folder), written_whole(folder) as partial:
        started_s = time.monotonic()
        networks, artefacts, seconds = [], {}, {}
        recipe, quantization = _quantize(job, partial)
        tapes = TapeSet(partial) if job.config.backend == "cuda" else None
        for network in cut_networks(job, recipe):
            progress(network.spec.name)
            network_started_s = time.monotonic()
            check_room(network, partial)
            if tapes is not None:
                network = lay_out(network)
            artefacts[network.spec.name] = _save(network, job.config, partial) if tapes is None else tapes.add(network)
            seconds[network.spec.name] = round(time.monotonic() - network_started_s, 3)
            networks.append(network.spec)
        if tapes is not None:
            tapes.finish()
            with rehearse(job.config.context_parallel):
                compile_kernels(partial, networks, artefacts)
        plans = {}
        if job.config.plan is not None:
            # Only now, when no model is in memory any more: compiling takes several times a network's weights.
            # Not from the engine that is being replaced: whoever builds it again does not trust it.
            others = [manifest.parent for manifest in folder.parent.parent.glob(f"*/*/{MANIFEST_NAME}")]
            others = [engine for engine in others if engine != folder]
            for name, plan, record in compile_plans(
                job.config, networks, partial, engines=others, progress=plan_progress
            ):
                artefacts[name], plans[name] = plan, record
        if "text_encoder" in job.parts:
            _write_tokenizer(job, partial / TOKENIZER_FOLDER)
        manifest = Manifest(
            config=job.config,
            networks=tuple(networks),
            artefacts=artefacts,
            files=describe_files(partial),
            build={
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "seconds": round(time.monotonic() - started_s, 3),
                "network_seconds": seconds,
                "versions": {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxscript")},
                **({"plans": plans} if plans else {}),
                **quantization,
                **(job.provenance or {}),
            },
        )
        manifest.write(partial)
    stamp_files(folder, manifest)
    return manifest


def cut_networks(job: BuildJob, recipe: Recipe | None = None) -> Iterator[Network]:
    """Yield the job's networks, one model in memory at a time.

    Args:
        job: What to cut.
        recipe: What of the DiT is quantised, and how; None leaves it whole.
    """
    config = job.config
    geometry, variant = config.geometry, config.variant
    wanted = network_names(variant, job.parts)
    if "dit" in job.parts:
        timesteps = plan_variant(variant).timesteps
        denoiser = job.source.dit()
        if recipe is not None:
            recipe.apply(denoiser)
        if config.context_parallel > 1:
            denoiser.split_over(config.context_parallel, geometry.chunk_tokens)
        yield from dit_networks(
            denoiser, geometry, precision=config.dtype, timesteps=len(timesteps), with_pair=has_pair(config)
        )
        del denoiser
        gc.collect()
    if "vae" in job.parts:
        if config.decoder != "wan":
            # The two forms of TAEHV differ in this alone: lighttae was trained on latents that are not normalised.
            statistics = variant.model.vae if config.decoder == "lighttae" else None
            taehv = job.source.taehv()
            yield from taehv_networks(taehv, geometry, precision=config.dtype, statistics=statistics)
            del taehv
        if config.decoder == "wan" or "vae_encoder" in wanted:
            vae = job.source.vae()
            if config.decoder == "wan":
                yield from decoder_networks(vae, geometry, precision=config.dtype, ranks=config.context_parallel)
            if "vae_encoder" in wanted:
                yield from encoder_networks(vae, geometry, precision=config.dtype)
            del vae
        gc.collect()
    if "text_encoder" in job.parts:
        text, dit = variant.model.text, variant.model.dit
        for network in text_networks(job.source, text, dit, geometry, precision=config.dtype):
            yield network
            gc.collect()  # what exporting a part left behind, before the next part is loaded


def _quantize(job: BuildJob, folder: Path) -> tuple[Recipe | None, dict[str, Any]]:
    """Calibrate an fp8 job, or take its recipe, and leave it in the folder; returns it, and what the manifest says."""
    if job.config.precision != "fp8" or "dit" not in job.parts:
        return None, {}
    if job.recipe is not None:
        job.recipe.write(folder)
        return job.recipe, {"quantization": {"calibration": "none: the recipe was given"}}
    calibration = calibrate(job.source, job.config, job.tokenizer)
    gc.collect()
    calibration.recipe.write(folder)
    return calibration.recipe, {"quantization": calibration.record}


def _save(network: Network, config: EngineConfig, folder: Path) -> str:
    """Export one network into the folder; returns its file's name."""
    name = network.spec.name + _ARTEFACT_SUFFIX[config.backend]
    if config.backend == "torch":
        save_program(export_program(network), folder / name)
    else:
        export_onnx(network, config.geometry, folder / name)
    return name


def export_onnx(network: Network, geometry: Geometry, path: Path) -> None:
    """Export one network to an ONNX file."""
    writes = 1 if geometry.ring_is_chunk_aligned else geometry.chunk_frames
    save_onnx(export_program(network), network, path, cache_writes=writes)


def _write_tokenizer(job: BuildJob, folder: Path) -> None:
    if job.tokenizer is None:
        write_byte_tokenizer(folder)
        return
    folder.mkdir()
    for path in job.tokenizer.iterdir():
        if path.suffix in (".json", ".model"):
            shutil.copyfile(path, folder / path.name)
