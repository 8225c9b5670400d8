"""Runs golden cases, the recorded work of upstream's own code, through the ordinary loader, builder and session.

`run_case` is what the golden folder's `check.py` calls. Engines are built once per shape into a temporary folder.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from causal_forcing.build_engines.builder import BuildJob, build, cut_networks
from causal_forcing.build_engines.cuda.tape_set import TapeSet, lay_out
from causal_forcing.build_engines.model_loading import ReleasedModels
from causal_forcing.build_engines.weights import WeightFiles
from causal_forcing.plugins.dit_ops import rotate
from causal_forcing.runtime.config import EngineConfig, op_digest
from causal_forcing.runtime.decoder import WanDecoder
from causal_forcing.runtime.encoder import WanEncoder
from causal_forcing.runtime.engine import Engine
from causal_forcing.runtime.engines.cuda_engine import CudaEngine, DeviceWeights
from causal_forcing.runtime.environment import package_version
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.loading import EngineSet, load_engines
from causal_forcing.runtime.manifest import Manifest
from causal_forcing.runtime.model_spec import DiTSpec, ModelSpec, TextSpec, VAESpec
from causal_forcing.runtime.noise import GivenNoise
from causal_forcing.runtime.rope import RopePhases
from causal_forcing.runtime.schedule import FlowMatchSchedule, add_noise_, flow_to_x0_, timestep_embedding
from causal_forcing.runtime.session import Chunk, VideoSession
from causal_forcing.runtime.text import Tokenizer
from causal_forcing.runtime.text_encoder import TEXT_ENCODER, TextEncoder
from causal_forcing.runtime.variant import Variant

Case = Mapping[str, Any]
Outputs = dict[str, torch.Tensor]

_TOKENIZER = Path("wan_models/Wan2.1-T2V-1.3B/google/umt5-xxl")


def run_case(name: str, case: Case, weights: Case, folder: Path, engine: str) -> Outputs:
    """Compute a golden case's outputs from its inputs.

    Args:
        name: Name of the case.
        case: `manifest["cases"][name]`.
        weights: `manifest["weights"]`.
        folder: The golden folder.
        engine: Backend that computes; `cuda-on-cpu` plays the tapes of `cuda` on the CPU.

    Raises:
        NotImplementedError: This project does not serve the case.
    """
    runners: dict[str, Callable[..., Outputs]] = {
        "dit_call_sequence": run_clip,
        "pipeline": run_clip,
        "text": run_text,
        "vae": run_vae,
        "scheduler": run_scheduler,
        "functions": run_functions,
    }
    if case["kind"] not in runners:
        raise NotImplementedError(f"{case['kind']} is not served")
    torch.set_num_threads(2)
    return runners[case["kind"]](name, case, weights, folder, engine)


def run_clip(name: str, case: Case, weights: Case, folder: Path, engine: str) -> Outputs:
    """Generate the case's clip with a `VideoSession` whose DiT engines are listened to."""
    chunks, recorder = record_clip(case, weights, folder, engine)
    outputs = {"latents": torch.cat([chunk.latents for chunk in chunks], dim=1)}
    outputs["pixels_fp16"] = torch.cat([chunk.pixels for chunk in chunks], dim=1)
    return outputs | recorder.outputs(load_file(folder / case["file"]), shift=case["timestep_shift"])


def record_clip(case: Case, weights: Case, folder: Path, engine: str) -> tuple[list[Chunk], Recorder]:
    """Generate the case's clip; returns its chunks and what the DiT engines did."""
    engines = build_clip(case, weights, folder, engine, noise=load_file(folder / case["file"])["noise"])
    recorder = Recorder()
    return generate(case, folder, recorder.listen(engines), to_the_end=True), recorder


def generate_clip(
    case: Case, weights: Case, folder: Path, engine: str, *, ranks: int = 1
) -> tuple[list[Chunk], list[str]]:
    """Generate the case's clip with all engines there are; returns its chunks and the names of the passes."""
    engines = build_clip(case, weights, folder, engine, noise=load_file(folder / case["file"])["noise"], ranks=ranks)
    passes: list[str] = []
    counted = {name: Counted(each, passes) for name, each in engines.engines.items()}
    return generate(case, folder, dataclasses.replace(engines, engines=counted)), passes


def generate(case: Case, folder: Path, engines: EngineSet, *, to_the_end: bool = False) -> list[Chunk]:
    """Generate the case's clip from its own noise; `to_the_end` adds the last context pass, which nobody reads."""
    tensors, noise = load_file(folder / case["file"]), GivenNoise.from_file(folder / case["file"])
    blocks = case["num_blocks"] + case["num_initial_frames"] // case["num_frame_per_block"]
    with VideoSession(engines) as session:
        chunks = list(
            session.generate(
                tensors["prompt_embeds"],
                total_blocks=blocks,
                initial_latents=tensors.get("initial_latent"),
                noise=noise,
            )
        )
        if to_the_end:
            last = (blocks - 1) * case["num_frame_per_block"]
            session._denoiser.write_context(last, None, noise, is_initial=False)
        return chunks


def run_text(name: str, case: Case, weights: Case, folder: Path, engine: str) -> Outputs:
    """Encode the case's prompts, from text where it gives text."""
    tensors = load_file(folder / case["file"])
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    if "texts" in case:
        tokenized = Tokenizer(folder / _TOKENIZER, length=ids.shape[1], pad_id=0).encode(case["texts"])
        ids, mask = torch.from_numpy(tokenized.token_ids), torch.from_numpy(tokenized.token_mask)
    roles = Roles(text=case["weights"])
    engines = build_part(roles, weights, folder, engine, batch=ids.shape[0], text_len=ids.shape[1])
    io_tensors = engines.bind()
    io_tensors["token_ids"].copy_(ids)
    io_tensors["token_mask"].copy_(mask)
    assert engines.text_encoder is not None, "the case's text encoder was built"
    engines.text_encoder.enqueue()
    return {"prompt_embeds": io_tensors["prompt_embeds"], "input_ids": ids, "attention_mask": mask}


def run_vae(name: str, case: Case, weights: Case, folder: Path, engine: str) -> Outputs:
    """Decode the case's latents and encode its image and video, whichever it has."""
    tensors = load_file(folder / case["file"])
    outputs: Outputs = {}
    roles = Roles(vae=case["weights"])
    if "latents" in tensors:
        batch, frames, _, height, width = tensors["latents"].shape
        engines = build_part(roles, weights, folder, engine, batch=batch, latent_hw=(height, width))
        io_tensors = engines.bind()
        decoder = WanDecoder(engines.engines["vae_decoder_first"], engines.engines["vae_decoder"], io_tensors)
        pixels = []
        for frame in range(frames):
            io_tensors["latent"].copy_(tensors["latents"][:, frame : frame + 1])
            pixels.append(decoder.decode().clone())
        outputs["decoded_raw"] = torch.cat(pixels, dim=1)
    for source, target in (("image", "image_latent"), ("video", "video_latent")):
        if source in tensors:
            batch, *_, height, width = tensors[source].shape
            engines = build_part(roles, weights, folder, engine, batch=batch, latent_hw=(height // 8, width // 8))
            encoder_engines = (engines.engines["vae_encoder_first"], engines.engines["vae_encoder"])
            outputs[target] = WanEncoder(*encoder_engines, engines.bind()).encode(tensors[source])
    if not outputs:
        raise NotImplementedError("activations inside the VAE are not an engine's outputs")
    return outputs


def run_scheduler(name: str, case: Case, weights: Case, folder: Path, engine: str) -> Outputs:
    """Evaluate the schedule and its two steps."""
    tensors = load_file(folder / case["file"])
    schedule = FlowMatchSchedule(case.get("timestep_shift", 5.0))
    outputs = {"timesteps": schedule.timesteps, "sigmas": schedule.sigmas}
    for key in tensors:
        if key.startswith("warped."):
            outputs[key] = schedule.warp([int(step) for step in key.removeprefix("warped.").split("_")])
    sigma = schedule.sigma(tensors["timestep"]).reshape(-1, 1, 1, 1)
    noisy = tensors["x0"].clone()
    add_noise_(noisy, tensors["noise"], sigma)
    outputs["add_noise.out"] = noisy.clone()
    outputs["flow_to_x0.out"] = x0_of(tensors["add_noise.out"], tensors["flow"], sigma)
    return outputs


def run_functions(name: str, case: Case, weights: Case, folder: Path, engine: str) -> Outputs:
    """Evaluate RoPE and the timestep embedding."""
    tensors = load_file(folder / case["file"])
    frames, rows, columns = tensors["rope.grid"].tolist()
    outputs: Outputs = {}
    for key in tensors:
        if ".out.start" in key:
            head, start = key.split(".out.start")
            x = tensors[f"{head}.x"]
            cos, sin = (torch.zeros(x.shape[1], x.shape[3] // 2) for _ in range(2))
            RopePhases(cos, sin, frames=frames, rows=rows, columns=columns).place(int(start))
            outputs[key] = rotate(x.transpose(1, 2), cos, sin).transpose(1, 2)
        if key.startswith("sinusoid.dim") and key.endswith(".f64"):
            dim = int(key.removeprefix("sinusoid.dim").removesuffix(".f64"))
            outputs[key] = timestep_embedding(tensors["sinusoid.t"], dim)
    return outputs


class Recorder:
    """Listens to a session's DiT engines: what goes in, what comes out, and what upstream's context pass would give.

    Upstream evaluates the whole network in its context pass and throws the flow away; our context pass stops earlier.
    To compare that flow too, the recorder runs `dit_step` on the same inputs and puts the caches back. For the same
    reason every pass is one of its own: engines that could join two are left out.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        """(input, flow) of every call, in order."""
        self.caches: list[dict[str, torch.Tensor]] = []
        """KV caches after every call."""
        self.io_tensors: Mapping[str, torch.Tensor] = {}
        """The session's buffers."""
        self._step: Engine | None = None

    def listen(self, engines: EngineSet) -> EngineSet:
        """Return the engine set with its DiT engines wrapped."""
        self._step = engines.engines["dit_step"]
        wrapped = {
            name: Listener(engine, self) if name in ("dit_step", "dit_context") else engine
            for name, engine in engines.engines.items()
            if name != "dit_context_step"
        }
        return dataclasses.replace(engines, engines=wrapped)

    def called(self, network: str) -> None:
        """Record a call that has just run."""
        caches = {
            name: tensor.clone() for name, tensor in self.io_tensors.items() if "_cache_" in name and name[0] in "kv"
        }
        if network == "dit_context":
            self._run_step_like_context()
        self.calls.append(
            (self.io_tensors["latent"].float().cpu().clone(), self.io_tensors["flow"].float().cpu().clone())
        )
        self.caches.append(caches)
        for name, tensor in caches.items():
            self.io_tensors[name].copy_(tensor)

    def outputs(self, tensors: Mapping[str, torch.Tensor], *, shift: float) -> Outputs:
        """Return flow and x0 of every call under the golden names; timesteps come from the case's inputs."""
        schedule = FlowMatchSchedule(shift)
        outputs: Outputs = {}
        for index, (latent, flow) in enumerate(self.calls):
            outputs[f"call{index:03}.flow"] = flow
            if (timestep := tensors.get(f"call{index:03}.timestep")) is not None:
                sigma = schedule.sigma(timestep)[:, :, None, None, None]
                outputs[f"call{index:03}.x0"] = x0_of(latent, flow, sigma)
        return outputs

    def _run_step_like_context(self) -> None:
        # The context pass does not set the head's modulation: find the row whose layer modulation is in use.
        table = self.io_tensors["layer_modulation_table"]
        row = next(i for i in range(table.shape[0]) if torch.equal(table[i], self.io_tensors["layer_modulation"]))
        self.io_tensors["head_modulation"].copy_(self.io_tensors["head_modulation_table"][row])
        assert self._step is not None, "listen comes before any call"
        self._step.enqueue()


class Listener:
    """An engine that tells a recorder of every call."""

    def __init__(self, engine: Engine, recorder: Recorder) -> None:
        self.spec = engine.spec
        self._engine, self._recorder = engine, recorder

    def bind(self, io_tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Engine.bind`."""
        self._engine.bind(io_tensors)
        self._recorder.io_tensors = io_tensors

    def enqueue(self) -> None:
        """See `Engine.enqueue`."""
        self._engine.enqueue()
        self._recorder.called(self.spec.name)


class Counted:
    """An engine that notes its name at each call."""

    def __init__(self, engine: Engine, calls: list[str]) -> None:
        self.spec = engine.spec
        self._engine, self._calls = engine, calls

    def bind(self, io_tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Engine.bind`."""
        self._engine.bind(io_tensors)

    def enqueue(self) -> None:
        """See `Engine.enqueue`."""
        self._calls.append(self.spec.name)
        self._engine.enqueue()


def x0_of(noisy: torch.Tensor, flow: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Apply the session's own flow-to-x0 step to a copy."""
    latent = noisy.clone()
    flow_to_x0_(latent, flow, sigma, torch.empty_like(latent, dtype=torch.float64))
    return latent


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Which golden weights play which part; None where a part is not built."""

    dit: str | None = None
    vae: str | None = None
    text: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the models to build."""
        named = {"dit": self.dit, "vae": self.vae, "text_encoder": self.text}
        return tuple(part for part, name in named.items() if name is not None)


def build_clip(
    case: Case, weights: Case, folder: Path, engine: str, *, noise: torch.Tensor, ranks: int = 1
) -> EngineSet:
    """Build and load the engines of a clip whose noise is [B, F, C, h, w]."""
    roles = Roles(dit=case["weights"], vae=case.get("vae", "vae") if case["kind"] == "pipeline" else None)
    first_chunk = case.get("denoising_step_list_first_chunk")
    variant = Variant(
        slug="golden",
        summary="",
        model=model_spec(roles, weights),
        chunk_frames=case["num_frame_per_block"],
        denoising_steps=tuple(case["denoising_step_list"]),
        first_chunk_denoising_steps=None if first_chunk is None else tuple(first_chunk),
        timestep_shift=case["timestep_shift"],
        warp_steps=case["warp_denoising_step"],
        context_timestep=float(case["context_noise"]),
    )
    windowed = case["local_attn_size"] != -1
    window_frames = case["local_attn_size"] if windowed else case["kv_cache_frames"]
    geometry = Geometry(
        chunk_frames=variant.chunk_frames,
        pixel_height=8 * noise.shape[3],
        pixel_width=8 * noise.shape[4],
        window_frames=window_frames,
        # Where sink and chunk do not fit, upstream's chunk overwrites the end of the sink: a smaller sink, in effect.
        sink_frames=min(case["sink_size"], window_frames - variant.chunk_frames) if windowed else 0,
        batch=noise.shape[0],
        patch_size=variant.model.dit.patch_size,
    )
    return build_engines(variant, geometry, roles, weights, folder, engine, ranks=ranks)


def build_part(
    roles: Roles,
    weights: Case,
    folder: Path,
    engine: str,
    *,
    batch: int,
    latent_hw: tuple[int, int] = (8, 8),
    text_len: int = 512,
) -> EngineSet:
    """Build and load the engines of a VAE or a text encoder alone, at one latent frame a chunk."""
    model = model_spec(roles, weights, text_len=text_len)
    variant = Variant(slug="golden", summary="", model=model, chunk_frames=1, takes_image=True)
    geometry = Geometry(
        chunk_frames=1, pixel_height=8 * latent_hw[0], pixel_width=8 * latent_hw[1], window_frames=1, batch=batch
    )
    return build_engines(variant, geometry, roles, weights, folder, engine)


def build_engines(
    variant: Variant, geometry: Geometry, roles: Roles, weights: Case, folder: Path, engine: str, *, ranks: int = 1
) -> EngineSet:
    """Build engines from golden weights through the ordinary loader, once per fingerprint, and load them."""
    backend = engine.removesuffix("-on-cpu")
    config = EngineConfig(
        variant=variant,
        geometry=geometry,
        backend=backend,
        backend_version="golden",
        precision="fp32",
        decoder="wan",
        weights=f"{folder}:{roles}",
        context_parallel=ranks,
        package_version=package_version(),
        op_digest=op_digest(),
    )

    def file(name: str | None) -> Path:
        return folder if name is None else folder / weights[name]["file"]

    tokenizer = folder / _TOKENIZER
    files = WeightFiles(dit=file(roles.dit), vae=file(roles.vae), text_encoder=file(roles.text), tokenizer=tokenizer)
    source = ReleasedModels(variant=variant, files=files, dtype=torch.float32)
    job = BuildJob(config=config, source=source, tokenizer=tokenizer, parts=roles.parts)
    if engine != backend:
        return play_on_cpu(job)
    target = config.folder(build_root())
    if not target.exists():
        build(job, target)
    return load_engines(target, device="cuda" if engine == "cuda" else "cpu")


def play_on_cpu(job: BuildJob) -> EngineSet:
    """Write a job's tapes, and load them where there is no GPU: fused ops run their plain bodies there."""
    folder, device = Path(tempfile.mkdtemp(dir=build_root())), torch.device("cpu")
    tapes, specs, paths = TapeSet(folder), [], {}
    for network in map(lay_out, cut_networks(job)):
        paths[network.spec.name] = folder / tapes.add(network)
        specs.append(network.spec)
    tapes.finish()
    weights = DeviceWeights(folder, device)
    engines = {spec.name: CudaEngine(weights, spec, paths[spec.name]) for spec in specs}
    encoders = [spec for spec in specs if spec.name.startswith(TEXT_ENCODER)]
    return EngineSet(
        folder=folder,
        manifest=Manifest(config=job.config, networks=tuple(specs), artefacts={}, files={}),
        engines={name: engine for name, engine in engines.items() if not name.startswith(TEXT_ENCODER)},
        device=device,
        text_encoder=TextEncoder(encoders, engines.__getitem__, device, keep=True) if encoders else None,
    )


def model_spec(roles: Roles, weights: Case, *, text_len: int = 512) -> ModelSpec:
    """Return the specification of golden weights; a part that is not built has any sizes that fit the others."""
    dit = DiTSpec(dim=8, ffn_dim=8, num_heads=1, num_layers=1, freq_dim=8, text_dim=8, text_len=text_len)
    vae = VAESpec(base_dim=8)
    text = TextSpec(vocab_size=8, dim=8, attention_dim=8, ffn_dim=8, num_heads=1, num_layers=1)
    if roles.text is not None:
        text = text_spec(weights[roles.text]["model_config"])
        dit = dataclasses.replace(dit, text_dim=text.dim)
    if roles.vae is not None:
        vae = vae_spec(weights[roles.vae])
    if roles.dit is not None:
        dit = dit_spec(weights[roles.dit]["model_config"])
    return ModelSpec(name="golden", dit=dit, vae=vae, text=text)


def dit_spec(config: Case) -> DiTSpec:
    """Return the specification of a golden DiT."""
    same = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len", "eps")
    sizes = {key: config[key] for key in same}
    return DiTSpec(**sizes, latent_channels=config["in_dim"], patch_size=config["patch_size"][1])


def vae_spec(entry: Case) -> VAESpec:
    """Return the specification of a golden VAE."""
    config = entry["model_config"]
    return VAESpec(
        base_dim=config["dim"],
        dim_mult=tuple(config["dim_mult"]),
        num_res_blocks=config["num_res_blocks"],
        temporal_downsample=tuple(config["temperal_downsample"]),
        latent_channels=config["z_dim"],
        latent_mean=tuple(entry["mean"]),
        latent_std=tuple(entry["std"]),
    )


def text_spec(config: Case) -> TextSpec:
    """Return the specification of a golden text encoder."""
    names = {
        "attention_dim": "dim_attn",
        "ffn_dim": "dim_ffn",
        "num_layers": "encoder_layers",
        "max_distance": "max_dist",
    }
    names |= {same: same for same in ("vocab_size", "dim", "num_heads", "num_buckets", "eps")}
    return TextSpec(**{ours: config[theirs] for ours, theirs in names.items()})


@functools.cache
def build_root() -> Path:
    """Return a temporary folder for engines that lives as long as the process."""
    root = Path(tempfile.mkdtemp(prefix="golden-engines-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root
