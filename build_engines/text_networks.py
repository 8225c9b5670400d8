"""The networks of the prompt encoder: one, or several in a row."""

from __future__ import annotations

from collections.abc import Iterator

from causal_forcing.build_engines.model_loading import ModelSource
from causal_forcing.build_engines.models.text_encoder import split_stages
from causal_forcing.build_engines.networks import Network
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.model_spec import DiTSpec, TextSpec
from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec

TEXT_NETWORK_PARAMETERS = 1_600_000_000
"""Most parameters of a network of the text encoder: a little more than the DiT has, so that what compiles one compiles
the other. Compiling takes three to four times a network's weights in memory."""


def text_networks(
    source: ModelSource,
    text: TextSpec,
    dit: DiTSpec,
    geometry: Geometry,
    *,
    precision: str,
    max_parameters: int = TEXT_NETWORK_PARAMETERS,
) -> Iterator[Network]:
    """Describe the prompt encoder, which makes what the DiT attends to: one network, or several in a row.

    They are loaded one at a time where their source can.

    Args:
        source: Where the encoder comes from.
        text: Its sizes.
        dit: The model that reads the prompt embedding.
        geometry: Shapes to fix.
        precision: Dtype of activations.
        max_parameters: The encoder is split where it has more.
    """
    shape = (geometry.batch, dit.text_len)
    token_mask = IOTensor(name="token_mask", shape=shape, dtype="int64")
    # Numbered, so that no engine reads the buffer that it writes.
    chain = [
        IOTensor(name="token_ids", shape=shape, dtype="int64"),
        *(
            IOTensor(name=f"text_hidden_{index}", shape=(*shape, text.dim), dtype=precision)
            for index in range(1, len(split_stages(text, max_parameters)))
        ),
        IOTensor(name="prompt_embeds", shape=(*shape, dit.text_dim), dtype=precision),
    ]
    names = text_network_names(text, max_parameters)
    for index, module in enumerate(source.text_encoder_parts(max_parameters)):
        yield Network(
            spec=NetworkSpec(name=names[index], inputs=(chain[index], token_mask), outputs=(chain[index + 1],)),
            module=module,
        )


def text_network_names(text: TextSpec, max_parameters: int = TEXT_NETWORK_PARAMETERS) -> list[str]:
    """Return the names of the prompt encoder's networks, in the order in which they run."""
    count = len(split_stages(text, max_parameters))
    return ["text_encoder"] if count == 1 else [f"text_encoder_{index}" for index in range(1, count + 1)]
