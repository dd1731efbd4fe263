"""What the hook must know of a model family."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ...vsa_core.grid import Thw, TokenGrid


@dataclass(frozen=True)
class ModelCall:
    """The facts of one forward pass of the diffusion model that its attention calls need."""

    latent_thw: Thw | None
    """Latent frames, height and width as the model gets them, None when the latent is no video."""
    patch_size: Thw
    context_lengths: frozenset[int]
    """Lengths of the sequences that cross-attention reads."""
    conds: frozenset[str]
    """Names of the extra conditions that are present."""


class VideoFamily(Protocol):
    """One family. Its methods look at shapes and names only, never at tensor values."""

    name: str

    def matches(self, net) -> bool:
        """Whether the diffusion model is of this family."""

    def heads(self, net) -> tuple[int, int]:
        """(number of heads, head_dim) of its video self-attention."""

    def observe(self, net, latent_shape: tuple[int, ...], context, conds: dict[str, Any]) -> ModelCall:
        """The facts of a forward pass, from what the model is called with."""

    def layer(self, net, options: dict[str, Any], seen: int) -> tuple[int | None, int | None]:
        """(index of the transformer block that calls, number of blocks), None where not known.

        seen: how many of the clip's self-attention calls this forward pass has made before this one.
        """

    def locate(self, net, call: ModelCall, options: dict[str, Any], num_tokens: int) -> TokenGrid | str:
        """Where the video tokens lie in a self-attention of num_tokens tokens, or why that is not known.

        options: the call's transformer_options.
        """
