"""A cache of prompt embeddings on disk, one small file per prompt."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from absl import logging
from etils import epath
from jaxtyping import Float

from arl2_jax.storage import reason, write_whole
from arl2_jax.text.prompts import shorten


@dataclasses.dataclass(frozen=True)
class EmbeddingCache:
    """A folder of prompt embeddings; its errors are logged and never stop a run.

    Attributes:
      folder: local or remote, created with the first embedding; None disables the cache.
      facts: what an embedding depends on besides the prompt, a JSON tree.
    """

    folder: epath.Path | None
    facts: Mapping[str, Any]

    def read(self, text: str) -> Float[np.ndarray, "l text_dim"] | None:
        """Return the float32 embedding of a cleaned prompt, or None if it is not in the cache."""
        if self.folder is None:
            return None
        file = self.folder / self._name(text)
        try:
            entry = safetensors.numpy.load(file.read_bytes())
            rows = entry["embedding"]
            if not np.array_equal(entry["sha256"], _digest(rows)):
                raise ValueError("its checksum does not match")
        except FileNotFoundError:
            return None
        except Exception as error:
            logging.warning("%s is damaged (%s); the prompt is encoded again", file, reason(error))
            return None
        return rows

    def write(self, text: str, rows: Float[np.ndarray, "l text_dim"]) -> None:
        """Write the embedding of a cleaned prompt atomically."""
        if self.folder is None:
            return
        file = self.folder / self._name(text)
        content = {"embedding": rows, "sha256": _digest(rows)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, safetensors.numpy.save(content, {"prompt": text}))
        except Exception as error:
            logging.warning(
                "the embedding of %r is not cached: cannot write %s: %s",
                shorten(text), file, reason(error),
            )  # fmt: skip

    def _name(self, text: str) -> str:
        key = json.dumps({"prompt": text, **self.facts}, sort_keys=True)
        return f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def _digest(rows: np.ndarray) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(rows.tobytes()).digest(), np.uint8)
