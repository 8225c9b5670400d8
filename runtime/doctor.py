"""What this machine can do, for `cf-build doctor`: one probe a topic, none of which can fail the program, and commands.

Only the standard library is imported; everything that is looked for is loaded by name inside its guarded probe, since a
broken installation may raise anything on import. No probe uses the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from causal_forcing.runtime import doctor_host
from causal_forcing.runtime.config import DEFAULT_RTX_COMPUTE_CAPABILITIES
from causal_forcing.runtime.doctor_gpu import (
    TENSORRT,
    TENSORRT_RTX,
    GpuList,
    find_gpus,
    probe_gpu,
    probe_tensorrt,
    probe_tool,
    probe_torch,
)
from causal_forcing.runtime.engine_options import DEFAULT_SLUG
from causal_forcing.runtime.probe import Probe, guard, is_installed

BACKENDS_PROBE = "backends"
"""Name of the probe that the verdict rests on."""
TABLE_HEADERS = ("status", "probe", "detail", "fix")
"""Column titles of `report_rows`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Something to do on this machine."""

    text: str
    """What to paste."""
    reason: str
    """What it is for, in a few words."""

    def __str__(self) -> str:
        return f"{self.text}  # {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the doctor found, and what to do."""

    probes: tuple[Probe, ...]
    """One a topic."""
    commands: tuple[Command, ...]
    """To paste, in this order."""

    @property
    def usable(self) -> bool:
        """Whether at least one backend is usable; the programs exit with 0 if so, else with 3."""
        return any(probe.name == BACKENDS_PROBE and probe.status != "fail" for probe in self.probes)


def examine(cache_folder: Path) -> Report:
    """Look at everything; never raises.

    Args:
        cache_folder: Where weights and engines are kept; it need not exist yet.
    """
    found: list[GpuList] = []

    def look_for_gpus() -> Probe:
        found.append(find_gpus())
        return probe_gpu(found[0])

    gpu = guard("gpu", look_for_gpus)
    gpus = found[0] if found else GpuList()
    torch = guard("torch", lambda: probe_torch(gpus))
    onnxruntime = guard("onnxruntime", doctor_host.probe_onnxruntime)
    tensorrt = guard(TENSORRT.name, lambda: probe_tensorrt(TENSORRT, gpus))
    tensorrt_rtx = guard(TENSORRT_RTX.name, lambda: probe_tensorrt(TENSORRT_RTX, gpus))
    # TensorRT's engines run on torch's buffers and streams.
    torch_sees_gpus = torch.status == "ok" and bool(gpus.gpus)
    # The kernels of the cuda backend and of TensorRT's plugin; they are compiled where an engine is built.
    triton = guard("triton", lambda: probe_tool("triton", "kernels for GPUs", is_needed=bool(gpus.gpus)))
    runs = {
        TENSORRT.name: torch_sees_gpus and tensorrt.status == "ok" and bool(TENSORRT.fit(gpus)),
        TENSORRT_RTX.name: torch_sees_gpus and tensorrt_rtx.status == "ok" and bool(TENSORRT_RTX.fit(gpus)),
        "cuda": torch_sees_gpus and is_installed("triton"),
        "onnxruntime": onnxruntime.status != "fail",
        "torch": torch.status != "fail",
    }
    usable = [name for name, is_usable in runs.items() if is_usable]
    probes = (
        guard("python", doctor_host.probe_python),
        guard("platform", doctor_host.probe_platform),
        guard("cpu", doctor_host.probe_cpu),
        guard("memory", doctor_host.probe_memory),
        guard("disk", lambda: doctor_host.probe_disk(cache_folder)),
        gpu,
        torch,
        onnxruntime,
        tensorrt,
        tensorrt_rtx,
        triton,
        guard("polygraphy", lambda: probe_tool("polygraphy", "NVIDIA's tools for plans")),
        guard("video", doctor_host.probe_video),
        guard("ffmpeg", doctor_host.probe_ffmpeg),
        guard("hub", doctor_host.probe_hub),
        _sum_up(usable),
    )
    builds_rtx = TENSORRT_RTX.name not in usable and tensorrt_rtx.status == "ok" and is_installed(TENSORRT_RTX.module)
    return Report(probes=probes, commands=tuple(_commands(probes, usable, gpus, builds_rtx=builds_rtx)))


def report_json(report: Report) -> dict[str, object]:
    """Return the report of `cf-build doctor --json`."""
    return {"usable": report.usable, **dataclasses.asdict(report)}


def report_rows(probes: Iterable[Probe]) -> list[tuple[str, str, str, str | None]]:
    """Return one row a probe, under `TABLE_HEADERS`."""
    return [(probe.status, probe.name, probe.detail, probe.fix) for probe in probes]


def _sum_up(usable: Sequence[str]) -> Probe:
    """Name the backends that run here, best first."""
    if usable:
        return Probe(name=BACKENDS_PROBE, status="ok", detail=f"usable: {', '.join(usable)}")
    detail = "none usable: neither torch nor onnxruntime works here"
    return Probe(name=BACKENDS_PROBE, status="fail", detail=detail, fix="pip install torch onnxruntime")


def _commands(probes: Iterable[Probe], usable: Sequence[str], gpus: GpuList, *, builds_rtx: bool) -> Iterable[Command]:
    """Yield what mends this machine, then what to run on it."""
    fixes: dict[str, list[str]] = {}
    for probe in probes:
        if probe.fix is not None:
            fixes.setdefault(probe.fix, []).append(probe.name)
    for fix, names in fixes.items():
        yield Command(text=fix, reason=f"for {', '.join(names)}")
    if usable:
        engine = f"{DEFAULT_SLUG} --backend {usable[0]}"
        # Every GPU of this machine, where the plan is not for them by default.
        others = sorted(set(TENSORRT_RTX.fit(gpus)) - set(DEFAULT_RTX_COMPUTE_CAPABILITIES))
        if usable[0] == "tensorrt-rtx" and others:
            engine += "".join(f" --compute-capability {number}" for number in TENSORRT_RTX.fit(gpus))
        yield Command(text=f"cf-build {engine}", reason="build the model that comes with the package")
        yield Command(text=f"cf-build verify {engine}", reason="compare it with what it was made from")
        yield Command(text=f"cf-generate {engine}", reason="make a clip")
    if builds_rtx:
        text = f"cf-build {DEFAULT_SLUG} --backend tensorrt-rtx"
        yield Command(text=text, reason="plans for RTX GPUs of other machines")
    if not usable:
        yield Command(text="cf-build doctor", reason="look again")
