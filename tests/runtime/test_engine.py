"""The buffers that connect a session's engines."""

from __future__ import annotations

import pytest
import torch

from causal_forcing.runtime.engine import IOTensors
from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec

CPU = torch.device("cpu")


def io(name: str, *shape: int, dtype: str = "float32") -> IOTensor:
    return IOTensor(name=name, shape=shape, dtype=dtype)


STEP = NetworkSpec(
    name="step",
    inputs=(io("latent", 2, 3), io("slots", 2, dtype="int32"), io("cache", 4, 5, dtype="bfloat16")),
    outputs=(io("flow", 2, 3), io("cache_out", 4, 5, dtype="bfloat16")),
    states=(("cache_out", "cache"),),
    in_place=True,
)
CONTEXT = NetworkSpec(
    name="context",
    inputs=(io("latent", 2, 3), io("cache", 4, 5, dtype="bfloat16")),
    outputs=(io("cache_out", 4, 5, dtype="bfloat16"),),
    states=(("cache_out", "cache"),),
    in_place=True,
)
DECODER = NetworkSpec(
    name="decoder",
    inputs=(io("latent", 2, 3), io("carry", 7)),
    outputs=(io("pixels", 6), io("carry_out", 7)),
    states=(("carry_out", "carry"),),
)


def test_io_tensors_of_networks_that_share_a_name_are_one_buffer() -> None:
    tensors = IOTensors([STEP, CONTEXT, DECODER], CPU)
    assert sorted(tensors) == sorted(["latent", "slots", "cache", "flow", "cache_out", "carry", "pixels", "carry_out"])
    assert len(tensors) == 8


def test_io_tensors_have_the_shapes_and_dtypes_of_the_specification_and_start_as_zeros() -> None:
    tensors = IOTensors([STEP, CONTEXT, DECODER], CPU)
    for network in (STEP, CONTEXT, DECODER):
        for io_tensor in network.io_tensors():
            tensor = tensors[io_tensor.name]
            assert tuple(tensor.shape) == io_tensor.shape
            assert str(tensor.dtype) == f"torch.{io_tensor.dtype}"
            assert not tensor.any()


def test_io_tensors_of_a_state_in_place_share_the_inputs_buffer() -> None:
    tensors = IOTensors([STEP, CONTEXT], CPU)
    assert tensors["cache_out"] is tensors["cache"]


def test_io_tensors_of_a_carried_state_are_two_buffers() -> None:
    tensors = IOTensors([DECODER], CPU)
    assert tensors["carry_out"].data_ptr() != tensors["carry"].data_ptr()


def test_io_tensors_of_a_later_network_in_place_share_what_an_earlier_one_made() -> None:
    first = NetworkSpec(name="first", inputs=(io("latent", 2, 3),), outputs=(io("cache", 4, 5, dtype="bfloat16"),))
    tensors = IOTensors([first, CONTEXT], CPU)
    assert tensors["cache_out"] is tensors["cache"]


@pytest.mark.parametrize(
    "other", [io("latent", 3, 2), io("latent", 2, 3, 1), io("latent", 2, 3, dtype="bfloat16")], ids=str
)
def test_io_tensors_of_networks_that_disagree_are_refused_by_name(other: IOTensor) -> None:
    network = NetworkSpec(name="other", inputs=(other,), outputs=())
    with pytest.raises(AssertionError, match=r"networks disagree about io_tensor latent.*other has"):
        IOTensors([STEP, network], CPU)


def test_io_tensors_of_a_state_unlike_its_input_are_refused() -> None:
    network = NetworkSpec(
        name="odd", inputs=(io("cache", 4),), outputs=(io("cache_out", 5),), states=(("cache_out", "cache"),),
        in_place=True,
    )  # fmt: skip
    with pytest.raises(AssertionError, match="networks disagree about io_tensor cache_out"):
        IOTensors([network], CPU)


def test_measure_counts_each_buffer_once_and_takes_none() -> None:
    want = (2 * 3) * 4 + 2 * 4 + (4 * 5) * 2 + (2 * 3) * 4 + 7 * 4 * 2 + 6 * 4
    assert IOTensors.measure([STEP, CONTEXT, DECODER]) == want


def test_io_tensors_allocate_no_more_than_measure_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """KV caches are gigabytes: not even for a moment may there be a second one."""
    allocated = []
    zeros = torch.zeros

    def counted(*arguments: object, **options: object) -> torch.Tensor:
        tensor: torch.Tensor = zeros(*arguments, **options)  # type: ignore[call-overload]
        allocated.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "zeros", counted)
    IOTensors([STEP, CONTEXT, DECODER], CPU)
    assert sum(allocated) == IOTensors.measure([STEP, CONTEXT, DECODER])
