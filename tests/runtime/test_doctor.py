"""The doctor: sees what is there, survives what is broken, and says what to paste."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from causal_forcing.runtime import doctor, doctor_gpu, doctor_host
from causal_forcing.runtime.backends import BACKENDS
from causal_forcing.runtime.doctor import Report, examine, report_json, report_rows
from causal_forcing.runtime.probe import Probe


def look(folder: Path) -> dict[str, Probe]:
    return {probe.name: probe for probe in examine(folder).probes}


def texts(report: Report) -> list[str]:
    return [command.text for command in report.commands]


def pretend_missing(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else find(name))


def pretend_modules(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Make imports by name give these objects, or raise them if they are exceptions."""
    find, load = importlib.util.find_spec, importlib.import_module

    def import_module(name: str) -> Any:
        found = modules[name] if name in modules else load(name)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in modules else find(name))
    monkeypatch.setattr(importlib, "import_module", import_module)


def fake_torch(*, has_cuda: bool, capability: int = 90) -> SimpleNamespace:
    cuda = SimpleNamespace(
        is_available=lambda: has_cuda,
        device_count=lambda: 1,
        get_device_capability=lambda index: divmod(capability, 10),
        get_device_name=lambda index: "NVIDIA H100",
    )
    return SimpleNamespace(__version__="2.13.0", version=SimpleNamespace(cuda="13.0" if has_cuda else None), cuda=cuda)


class NVMLError(Exception):
    pass


def fake_nvml(capability: int = 90) -> SimpleNamespace:
    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetCudaComputeCapability=lambda handle: divmod(capability, 10),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 * 2**30),
        nvmlDeviceGetName=lambda handle: b"NVIDIA H100",
        nvmlSystemGetDriverVersion=lambda: "580.65",
    )


def pretend_tensorrt(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None, *, version: str | None = None
) -> None:
    """Put a package in the way of the real one, for other processes too; with `None` it holds type stubs alone."""
    packages = folder / "packages"
    package = packages / name
    package.mkdir(parents=True)
    if content is None:
        (package / "__init__.pyi").write_text("class Runtime: ...")
    else:
        (package / "__init__.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.syspath_prepend(str(packages))
    if version is not None:
        (package / "__init__.py").write_text(f"class Builder: ...\nclass Runtime: ...\n__version__ = {version!r}")


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_missing(monkeypatch, "pynvml")
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_doctor_import_needs_the_standard_library_only() -> None:
    script = (
        "import sys, causal_forcing.runtime.doctor\n"
        "outside = {name.split('.')[0] for name, module in sys.modules.items()"
        " if 'site-packages' in (getattr(module, '__file__', None) or '')}\n"
        "print(sorted(name for name in outside if not name.startswith(('_', 'causal'))))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_doctor_here_names_every_topic_and_finds_a_backend(tmp_path: Path) -> None:
    report = examine(tmp_path)
    probes = report.probes
    assert [probe.name for probe in probes] == [
        *("python", "platform", "cpu", "memory", "disk", "gpu", "torch", "onnxruntime"),
        *("tensorrt", "tensorrt-rtx", "triton", "polygraphy", "video", "ffmpeg", "hub", "backends"),
    ]
    assert all(probe.detail and "\n" not in probe.detail for probe in probes)
    assert report.usable
    assert importlib.metadata.version("torch") in {probe.name: probe for probe in probes}["torch"].detail


def test_doctor_report_is_json_and_rows(tmp_path: Path) -> None:
    found = examine(tmp_path)
    probes = found.probes
    report = json.loads(json.dumps(report_json(found)))
    assert report["usable"] is True
    assert report["probes"][0] == {"name": "python", "status": "ok", "detail": probes[0].detail, "fix": None}
    assert report["commands"] == [{"text": command.text, "reason": command.reason} for command in found.commands]
    assert report_rows(probes)[0] == ("ok", "python", probes[0].detail, None)
    assert len(doctor.TABLE_HEADERS) == len(report_rows(probes)[0])


def test_doctor_without_torch_uses_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_missing(monkeypatch, "torch")
    probes = look(tmp_path)
    assert probes["torch"] == Probe(name="torch", status="fail", detail="not installed", fix="pip install torch")
    assert probes["backends"].detail == "usable: onnxruntime"
    assert probes["backends"].status == "ok"


def test_doctor_without_any_backend_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_missing(monkeypatch, "torch", "onnxruntime")
    probes = look(tmp_path)
    assert probes["onnxruntime"].fix == "pip install onnxruntime"
    assert probes["backends"].fix == "pip install torch onnxruntime"
    assert probes["backends"].status == "fail"


def test_doctor_module_that_breaks_on_import_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_modules(monkeypatch, torch=OSError("libcudart.so.13:\ncannot open"), onnxruntime=RuntimeError())
    probes = look(tmp_path)
    assert probes["torch"] == Probe(name="torch", status="fail", detail="OSError: libcudart.so.13: cannot open")
    assert probes["onnxruntime"] == Probe(name="onnxruntime", status="fail", detail="RuntimeError")
    assert probes["backends"].status == "fail"


def test_doctor_probe_that_raises_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> Probe:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(doctor_host, "probe_cpu", explode)
    probes = look(tmp_path)
    assert probes["cpu"] == Probe(name="cpu", status="fail", detail="ZeroDivisionError: boom")
    assert probes["backends"].status == "ok"


def test_doctor_old_python_fails_with_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_host, "MINIMUM_PYTHON", (4, 2))
    probe = look(tmp_path)["python"]
    assert probe.status == "fail"
    assert probe.detail.endswith("expected 4.2 or newer")
    assert probe.fix == "uv python install 4.2"


def test_doctor_low_memory_and_disk_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_host, "LOW_MEMORY_BYTES", 2**60)
    monkeypatch.setattr(doctor_host, "LOW_DISK_BYTES", 2**60)
    probes = look(tmp_path / "not" / "there")
    assert probes["memory"].status == probes["disk"].status == "warn"
    assert probes["disk"].fix == f"du -sh {tmp_path}/*"
    assert probes["backends"].status == "ok"


@pytest.mark.usefixtures("_no_gpu")
def test_doctor_without_gpu_wants_no_tensorrt(tmp_path: Path) -> None:
    probes = look(tmp_path)
    assert probes["gpu"].status == "warn"
    assert probes["gpu"].detail.startswith("none")
    assert probes["ffmpeg"].status == "ok"
    if importlib.util.find_spec("tensorrt") is None:
        assert (probes["tensorrt"].status, probes["tensorrt"].fix) == ("ok", None)


@pytest.mark.parametrize(
    ("installed", "status", "detail", "backends"),
    [
        (None, "warn", "not installed", "cuda, onnxruntime, torch"),
        ("10.9.0.34", "warn", "10.9.0.34, expected 10.15 or newer", "cuda, onnxruntime, torch"),
        ("10.15.1.29", "ok", "10.15.1.29, serves sm_90", "tensorrt, cuda, onnxruntime, torch"),
    ],
)
def test_doctor_with_gpu_judges_tensorrt_by_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str | None, status: str, detail: str, backends: str
) -> None:
    if installed is None:
        pretend_missing(monkeypatch, "tensorrt")
    else:
        pretend_tensorrt(tmp_path, monkeypatch, "tensorrt", "", version=installed)
    pretend_modules(monkeypatch, pynvml=fake_nvml(), torch=fake_torch(has_cuda=True))
    report = examine(tmp_path)
    probes = {probe.name: probe for probe in report.probes}
    assert probes["gpu"].detail == "NVIDIA H100 (sm_90, 80.0 GiB), driver 580.65"
    assert probes["torch"].detail == "2.13.0, CUDA 13.0, NVIDIA H100 (sm_90)"
    assert (probes["tensorrt"].status, probes["tensorrt"].detail) == (status, detail)
    if status == "warn":
        assert probes["tensorrt"].fix == "pip install --upgrade 'tensorrt<12,>=10.15'"
        assert texts(report)[0] == probes["tensorrt"].fix
    assert probes["backends"].detail == f"usable: {backends}"
    best = backends.partition(",")[0]
    assert f"cf-build shapes --backend {best}" in texts(report)
    assert f"cf-build verify shapes --backend {best}" in texts(report)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "has no attribute 'Builder'"),
        ("", "has no attribute 'Builder'"),
        ("raise OSError('libnvinfer.so.11: cannot open')", "OSError: libnvinfer.so.11: cannot open"),
        ("import os; os.abort()", "its import ends with SIGABRT"),
        ("raise SystemExit(3)", "its import exits with 3"),
        ("import time; time.sleep(60)", "its import takes longer than 1 s"),
    ],
    ids=["type stubs", "an empty package", "no libraries", "abort", "exit", "hang"],
)
def test_doctor_tells_a_tensorrt_that_does_not_work_from_one_that_does(
    content: str | None, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_tensorrt(tmp_path, monkeypatch, "tensorrt", content)
    if "longer" in fault:
        monkeypatch.setattr(doctor_gpu, "IMPORT_TIMEOUT_S", 1)
    probe = look(tmp_path)["tensorrt"]
    assert probe.status == "warn"
    assert "installed, but it cannot be used" in probe.detail
    assert fault in probe.detail
    assert probe.fix == "pip install --upgrade 'tensorrt<12,>=10.15'"
    assert "tensorrt" not in sys.modules


@pytest.mark.parametrize(
    ("capability", "detail", "usable", "command"),
    [
        (89, "", "tensorrt-rtx, cuda, onnxruntime, torch", "cf-build shapes --backend tensorrt-rtx"),
        (
            80,
            "",
            "tensorrt-rtx, cuda, onnxruntime, torch",
            "cf-build shapes --backend tensorrt-rtx --compute-capability 80",
        ),
        (90, "; does not run on sm_90", "cuda, onnxruntime, torch", "cf-build shapes --backend tensorrt-rtx"),
    ],
)
def test_doctor_says_which_gpus_tensorrt_rtx_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: int, detail: str, usable: str, command: str
) -> None:
    pretend_tensorrt(tmp_path, monkeypatch, "tensorrt_rtx", "", version="1.7.1.116")
    pretend_missing(monkeypatch, "tensorrt")
    pretend_modules(monkeypatch, pynvml=fake_nvml(capability), torch=fake_torch(has_cuda=True, capability=capability))
    report = examine(tmp_path)
    probes = {probe.name: probe for probe in report.probes}
    assert probes["tensorrt-rtx"].status == "ok"
    assert probes["tensorrt-rtx"].detail == f"1.7.1.116, builds for sm_80, sm_86, sm_89, sm_120, sm_121{detail}"
    assert probes["backends"].detail == f"usable: {usable}"
    assert command in texts(report)


@pytest.mark.usefixtures("_no_gpu")
def test_doctor_without_gpu_ends_in_commands_for_the_cpu_and_in_plans_for_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_tensorrt(tmp_path, monkeypatch, "tensorrt_rtx", "", version="1.7.1.116")
    assert texts(examine(tmp_path))[-4:] == [
        "cf-build shapes --backend onnxruntime",
        "cf-build verify shapes --backend onnxruntime",
        "cf-generate shapes --backend onnxruntime",
        "cf-build shapes --backend tensorrt-rtx",
    ]


def test_doctor_commands_begin_with_every_fix_once_and_end_in_looking_again_where_nothing_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_missing(monkeypatch, "torch", "onnxruntime", "tensorrt_rtx")
    report = examine(tmp_path)
    fixes = list(dict.fromkeys(probe.fix for probe in report.probes if probe.fix))
    assert texts(report) == [*fixes, "cf-build doctor"]
    assert str(report.commands[0]) == "pip install torch  # for torch"


def test_doctor_knows_the_backends_that_there_are(tmp_path: Path) -> None:
    usable = look(tmp_path)["backends"].detail.removeprefix("usable: ").split(", ")
    assert [name for name in BACKENDS if name in usable] == usable


def test_doctor_without_triton_leaves_cuda_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_missing(monkeypatch, "triton", "tensorrt", "tensorrt_rtx")
    pretend_modules(monkeypatch, pynvml=fake_nvml(), torch=fake_torch(has_cuda=True))
    assert look(tmp_path)["backends"].detail == "usable: onnxruntime, torch"


def test_doctor_missing_tool_is_a_warning_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    optional = doctor_gpu.probe_tool("triton", "kernels")
    assert (optional.status, optional.detail) == ("ok", "not installed (optional: kernels)")
    needed = doctor_gpu.probe_tool("triton", "kernels", is_needed=True)
    assert (needed.status, needed.fix) == ("warn", "pip install triton")


def test_doctor_cpu_build_of_torch_beside_a_gpu_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_modules(monkeypatch, pynvml=fake_nvml(), torch=fake_torch(has_cuda=False))
    probe = look(tmp_path)["torch"]
    assert probe.status == "warn"
    assert probe.fix == "pip install --force-reinstall torch"


def install_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    pretend_missing(monkeypatch, "pynvml")


def test_doctor_without_nvml_asks_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, "echo 'NVIDIA L4, 8.9, 23034 MiB, 570.1'")
    assert look(tmp_path)["gpu"] == Probe(name="gpu", status="ok", detail="NVIDIA L4 (sm_89, 23034 MiB), driver 570.1")


def test_doctor_broken_driver_is_a_failure_with_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidia_smi(tmp_path, monkeypatch, "echo 'cannot talk to the driver'; exit 9")
    probe = look(tmp_path)["gpu"]
    assert probe.status == "fail"
    assert "nvidia-smi exited with 9: cannot talk to the driver" in probe.detail


def test_doctor_without_h264_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_modules(monkeypatch, av=SimpleNamespace(__version__="18.1.0", codecs_available={"mpeg4"}))
    assert look(tmp_path)["video"].status == "warn"


@pytest.mark.parametrize(("value", "status"), [("1", "warn"), ("true", "warn"), ("0", "ok"), ("", "ok")])
def test_doctor_offline_hub_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, status: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert look(tmp_path)["hub"].status == status
