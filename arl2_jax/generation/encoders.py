"""Where the text encoder, its tokenizer and the VAE of a model lie, and what they make."""

from typing import NamedTuple

import numpy as np

from arl2_jax.codecs import Codec, load_wan_codec, vae_weights
from arl2_jax.config import ModelConfig, SamplerConfig
from arl2_jax.errors import ConfigError
from arl2_jax.generation.make_video import Text
from arl2_jax.text import Tokenizer, encode_prompts
from arl2_jax.weights import find_release, fingerprint, umt5_config

_HINT = "it is part of the Wan2.1 release"


class Encoders(NamedTuple):
    """The networks around the transformer, by their paths; None where there is none.

    Attributes:
      text_encoder: weights of UMT5, a file or a folder.
      tokenizer: tokenizer.json, or its folder.
      vae: weights of the VAE, a file or a folder.
      cache: folder in which encoded prompts are kept; None keeps none.
      tile: rows and columns of latents that the VAE computes together; None takes all.
    """

    text_encoder: str | None = None
    tokenizer: str | None = None
    vae: str | None = None
    cache: str | None = None
    tile: tuple[int, int] | None = None

    def within(self, release: str | None) -> "Encoders":
        """The same, with what is None taken from a release's folder where it is there."""
        if release is None:
            return self
        found = find_release(release)
        either = lambda own, theirs: own or (theirs and str(theirs))
        return self._replace(
            text_encoder=either(self.text_encoder, found.text_encoder),
            tokenizer=either(self.tokenizer, found.tokenizer),
            vae=either(self.vae, found.vae),
        )

    def codec(self, default: str = "") -> Codec:
        """The VAE with its weights.

        Args:
          default: path to take if `vae` is None.

        Raises:
          ConfigError: no path is known, or its weights cannot be read.
        """
        path = self.vae or default
        if not path:
            raise ConfigError("the VAE is missing", remedy=f"name its weights with --vae ({_HINT})")
        return load_wan_codec(path, tile=self.tile)

    def vae_fingerprint(self) -> str:
        """Tells the VAE's weights from others."""
        return fingerprint(vae_weights(self._path("vae")))

    def text(
        self, prompt: str, negative_prompt: str, cfg: ModelConfig, sampler: SamplerConfig
    ) -> Text:
        """Encodes a prompt and, if the sampler guides, what it leads away from.

        Raises:
          ConfigError: the prompt is empty or too long, or a file is missing or of another model.
        """
        return Text(
            self.encode([prompt], cfg.text_len, cfg.text_dim)[0],
            self.null_text(negative_prompt, cfg, sampler),
        )

    def null_text(
        self, negative_prompt: str, cfg: ModelConfig, sampler: SamplerConfig
    ) -> np.ndarray | None:
        """What guidance leads away from, [text_len, text_dim]; None if the sampler does not guide.

        Raises:
          ConfigError: as `text`; an empty prompt is what it is for.
        """
        if sampler.guidance == 1:
            return None
        return self.encode([negative_prompt], cfg.text_len, cfg.text_dim, allow_empty=True)[0]

    def encode(
        self,
        prompts: list[str],
        text_len: int,
        text_dim: int | None = None,
        *,
        allow_empty: bool = False,
    ) -> np.ndarray:
        """Encodes prompts: float32 [N, text_len, text_dim].

        Raises:
          ConfigError: as `check`.
        """
        self._check_width(text_dim)
        return encode_prompts(
            prompts,
            text_encoder=self._path("text_encoder"),
            tokenizer=self._path("tokenizer"),
            text_len=text_len,
            cache=self.cache,
            allow_empty=allow_empty,
        )

    def check(self, prompts: list[str], text_len: int, text_dim: int | None = None) -> None:
        """Checks that prompts can be encoded, without the encoder.

        Raises:
          ConfigError: one of them is empty or too long, a file is missing, or the text encoder has
            another width than `text_dim`.
        """
        self._check_width(text_dim)
        Tokenizer(self._path("tokenizer"))(prompts, text_len)

    def text_fingerprints(self) -> dict[str, str]:
        """Tells text encoder and tokenizer from others."""
        return {
            "text_encoder": fingerprint(self._path("text_encoder")),
            "tokenizer": Tokenizer(self._path("tokenizer")).fingerprint,
        }

    def text_dim(self) -> int:
        """Width of the text embeddings."""
        return umt5_config(self._path("text_encoder")).dim

    def _check_width(self, text_dim: int | None) -> None:
        found = self.text_dim()
        if text_dim is not None and found != text_dim:
            raise ConfigError(
                f"{self.text_encoder} makes texts of width {found}, but the model takes "
                f"text_dim={text_dim}",
                remedy="name the text encoder that the model was trained with",
            )

    def _path(self, name: str) -> str:
        path = getattr(self, name)
        if not path:
            words = name.replace("_", " ")
            raise ConfigError(f"the {words} is missing", remedy=f"name it with --{name} ({_HINT})")
        return path
