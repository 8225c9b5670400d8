"""CUDA C++ files of this package: compiled by NVRTC for the GPU at hand on first use, and launched.

NVRTC and the bindings are what torch itself requires where it is built for CUDA; no compiler has to be installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

ARCHITECTURE = "sm_90a"
"""GPUs the files are written for: Hopper with its own instructions."""

_folders: list[Path] = []
"""Where machine code is kept: the last one counts."""


def keep_machine_code(folder: Path) -> None:
    """Look for machine code in a folder before compiling, and leave there what had to be compiled."""
    _folders[:] = [folder]


def launch(
    source: str,
    name: str,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    tensors: Sequence[torch.Tensor | None],
    integers: Sequence[int],
) -> None:
    """Launch a kernel on torch's current device and stream.

    Args:
        source: File in this package.
        name: Kernel, declared `extern "C"`.
        grid: Blocks along x, y and z.
        threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block; always the same for one kernel.
        tensors: First parameters, as pointers; None as a null pointer.
        integers: Other parameters, as `int`.
    """
    from cuda.bindings import driver

    values = (*(0 if tensor is None else tensor.data_ptr() for tensor in tensors), *integers)
    types = (*[ctypes.c_void_p] * len(tensors), *[ctypes.c_int] * len(integers))
    kernel = _kernel(torch.cuda.current_device(), source, name, shared_bytes)
    stream = torch.cuda.current_stream().cuda_stream
    _check(driver.cuLaunchKernel(kernel, *grid, threads, 1, 1, shared_bytes, stream, (values, types), 0))


def compile_source(source: str) -> bytes:
    """Return a file's machine code for `ARCHITECTURE`; needs no GPU."""
    from cuda.bindings import nvrtc

    program = _check(nvrtc.nvrtcCreateProgram(_read(source), source.encode(), 0, [], []))
    options = [f"--gpu-architecture={ARCHITECTURE}".encode(), b"-std=c++17"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(error) != 0:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{source} does not compile: {log.decode()}")
    code: bytes = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    return code


@functools.cache
def _kernel(device: int, source: str, name: str, shared_bytes: int) -> Any:
    from cuda.bindings import driver

    function = _check(driver.cuModuleGetFunction(_module(device, source), name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return function


@functools.cache
def _module(device: int, source: str) -> Any:
    from cuda.bindings import driver

    # A module belongs to its device's context, which torch has made current: hence the argument.
    del device
    return _check(driver.cuModuleLoadData(_machine_code(source)))


def _machine_code(source: str) -> bytes:
    """Return a file's machine code: kept, or compiled and kept."""
    if not _folders:
        return compile_source(source)
    from cuda.bindings import nvrtc

    compiler = ".".join(str(part) for part in nvrtc.nvrtcVersion()[1:])
    identity = f"{ARCHITECTURE} {compiler}\n".encode() + _read(source)
    path = _folders[-1] / f"{Path(source).stem}-{hashlib.sha256(identity).hexdigest()[:16]}.cubin"
    if path.exists():
        return path.read_bytes()
    code = compile_source(source)
    with contextlib.suppress(OSError):  # a folder that cannot be written costs the compiling again, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".partial-{os.getpid()}")
        partial.write_bytes(code)
        partial.replace(path)
    return code


def _read(source: str) -> bytes:
    return resources.files("causal_forcing.plugins.kernels").joinpath(source).read_bytes()


def _check(answer: tuple[Any, ...]) -> Any:
    """Return the value in an answer of the CUDA bindings, or raise its error."""
    error, *values = answer
    if int(error) != 0:
        raise RuntimeError(f"CUDA failed: {error!r}")
    return values[0] if values else None
