"""Every network of whole slugs, compiled by TensorRT-RTX on a machine without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from causal_forcing.build_engines.inspection import inspect_engine
from causal_forcing.runtime.backends import BACKENDS
from causal_forcing.runtime.manifest import MANIFEST_NAME, check_files, read_manifest

SMALL = ("--pixel-height", "32", "--pixel-width", "48")


@pytest.mark.parametrize(
    ("slug", "precision", "capabilities", "arguments"),
    [
        ("tiny-i2v", "fp16", [89], (*SMALL, "--compute-capability", "89")),
        ("shapes", "bf16", [86, 89, 120], ()),
        ("tiny", "fp8", [89, 120], (*SMALL, "--window-frames", "6")),
    ],
)
def test_every_network_of_a_slug_compiles(
    slug: str,
    precision: str,
    capabilities: list[int],
    arguments: tuple[str, ...],
    build: Callable[..., tuple[Path, str]],
) -> None:
    folder, _ = build(slug, "--precision", precision, *arguments)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    assert not [path.name for path in folder.iterdir() if ".onnx" in path.name], "no graph is left"
    plans = json.loads((folder / MANIFEST_NAME).read_text())["build"]["plans"]
    assert list(plans) == [network.name for network in manifest.networks]
    for name, record in plans.items():
        assert manifest.artefacts[name] == f"{name}.plan"
        assert record["compute_capabilities"] == capabilities
        assert record["precision"] == precision
        assert record["builder_version"] == BACKENDS["tensorrt-rtx"].artefact_version()
        assert record["op_digest"] == manifest.config.op_digest
        assert len(record["onnx_sha256"]) == len(record["fingerprint"]) == 64
        assert manifest.files[f"{name}.plan"].bytes == record["plan_bytes"]
    quantised = sum(
        count
        for kind, count in inspect_engine(folder)["networks"][2]["plan"]["precisions"].items()
        if kind.startswith("QUANTIZE")
    )
    assert (quantised > 0) == (precision == "fp8")
