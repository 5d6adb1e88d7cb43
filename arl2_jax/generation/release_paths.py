"""Paths of the networks around the transformer: text encoder, tokenizer and VAE."""

import dataclasses

from arl2_jax.codecs import Codec, load_wan_codec, vae_weights
from arl2_jax.errors import ConfigError
from arl2_jax.text import TextEncoder
from arl2_jax.weights import find_release, fingerprint


@dataclasses.dataclass(frozen=True)
class ReleasePaths:
    """Paths of a release's parts besides the transformer, None where unknown, and their options.

    Attributes:
      text_encoder: weights of UMT5, a file or a folder.
      tokenizer: tokenizer.json, or its folder.
      vae: weights of the VAE, a file or a folder.
      cache: folder in which encoded prompts are kept; None keeps none.
      vae_tile: rows and columns of latents that the VAE computes together; None takes all.
    """

    text_encoder: str | None = None
    tokenizer: str | None = None
    vae: str | None = None
    cache: str | None = None
    vae_tile: tuple[int, int] | None = None

    def within(self, release: str | None) -> "ReleasePaths":
        """Return the paths with unknown ones taken from a release's folder, where it has them."""
        if release is None:
            return self
        found = find_release(release)
        either = lambda own, theirs: own or (theirs and str(theirs))
        return dataclasses.replace(
            self,
            text_encoder=either(self.text_encoder, found.text_encoder),
            tokenizer=either(self.tokenizer, found.tokenizer),
            vae=either(self.vae, found.vae),
        )

    def open_text_encoder(self) -> TextEncoder:
        """Return the text encoder; its weights are read when a prompt needs them.

        Raises:
          ConfigError: a path is unknown.
        """
        encoder = _known("text_encoder", self.text_encoder)
        return TextEncoder(encoder, _known("tokenizer", self.tokenizer), self.cache)

    def load_codec(self, default: str = "") -> Codec:
        """Return the VAE with its weights.

        Args:
          default: path to take if `vae` is None.

        Raises:
          ConfigError: no path is known.
          WeightsError: the weights cannot be read.
        """
        return load_wan_codec(_known("vae", self.vae or default), tile=self.vae_tile)

    def vae_fingerprint(self) -> str:
        """Return a fingerprint of the VAE's weights."""
        return fingerprint(vae_weights(_known("vae", self.vae)))


def _known(field: str, path: str | None) -> str:
    if not path:
        raise ConfigError(
            "is missing", field=field, remedy="name its path; it is part of the Wan2.1 release"
        )
    return path
