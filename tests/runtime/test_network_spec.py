"""What a network is said to take and give."""

from __future__ import annotations

from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec


def test_network_spec_lists_inputs_before_outputs() -> None:
    a, b = (IOTensor(name=name, shape=(2, 3), dtype="float32") for name in "ab")
    assert list(NetworkSpec(name="n", inputs=(a,), outputs=(b,)).io_tensors()) == [a, b]
    assert a.elements == 6
