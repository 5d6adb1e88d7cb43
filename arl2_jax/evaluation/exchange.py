"""Which memory carries identity: what models draw with memories of the twin clip."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

from arl2_jax.codecs import Codec
from arl2_jax.config import Config
from arl2_jax.evaluation.gap import Model, micro_batches
from arl2_jax.evaluation.recall import NOTHING, RecallTest, read_drawings, wilson
from arl2_jax.generation.exchange import (
    EXCHANGES,
    Exchange,
    OfLayers,
    draw_exchanged,
    exchanges_of,
)

# Clips that a device draws together; whole pairs.
_CLIPS = 16
# What a drawing can show: the clip's own sprite, its twin's, another one, or nothing.
OUTCOMES = ("own", "twin", "other", "nothing")
_OWN, _TWIN, _OTHER, _NOTHING = range(4)


class Drawings(NamedTuple):
    """Drawings of a recall test by one model, by exchange.

    Attributes:
      readings: exchange -> color and shape that each of K drawings of N clips shows, [K, N, 2].
      frames: the frame that was read, of the first drawing of the first clips, uint8 [n, H, W, 3].
    """

    readings: dict[Any, Int[np.ndarray, "drawings clips 2"]]
    frames: dict[Any, np.ndarray]


def draw_test(
    config: Config,
    codec: Codec,
    model: Model,
    test: RecallTest,
    key: jax.Array,
    *,
    exchanges: tuple[Exchange, ...] = (),
    kept: int = 0,
    draw: Callable[..., Any] = draw_exchanged,
) -> Drawings:
    """Draw the block of every clip in which its sprite comes out, under each exchange.

    Args:
      config: the run.
      codec: decodes the drawings.
      model: the model.
      test: the clips.
      key: random key; the same key gives every model the same noise.
      exchanges: by default all that the model has the memories for.
      kept: number of clips whose frames are kept.
      draw: function that draws, with the signature of `draw_exchanged`.
    """
    exchanges, noises = exchanges or exchanges_of(model.cfg), config.evaluation.recall_noises
    f, size = config.model.frames_per_block, (config.data.height, config.data.width)
    shape = (len(exchanges), noises, len(test.clips), codec.pixel_frames(f), *size, 3)
    pixels = np.empty(shape, np.float32)
    # Clips that are drawn together share the index of the drawn block.
    of_clip = np.array([event.block for event in test.events])
    for block in np.unique(of_clip):
        places = np.flatnonzero(of_clip == block)
        batch = {name: x[places] for name, x in test.batch.items()} | {"place": places}
        for i, (part, new) in enumerate(micro_batches(model.params, batch, _CLIPS)):
            own_key = jax.random.fold_in(jax.random.fold_in(key, block), i)
            latents = draw(
                *model, config.sampler, part["text"], jax.random.split(own_key, noises),
                part["latents"], np.int32(block), exchanges=exchanges,
            )  # fmt: skip
            drawn = _fetch(latents)[:, :, :new]
            at = np.asarray(_fetch(part["place"]))[:new]
            pixels[:, :, at] = _decode(codec, drawn)
    readings = read_drawings(pixels, test, config)
    last = [event.frame - event.block * f for event in test.events[:kept]]
    frames = pixels[:, 0, np.arange(len(last)), last]
    shown = np.clip(np.rint((frames + 1) * 127.5), 0, 255).astype(np.uint8)
    return Drawings(
        dict(zip(exchanges, readings, strict=True)), dict(zip(exchanges, shown, strict=True))
    )


def outcomes(
    readings: Int[np.ndarray, "drawings clips 2"], identities: Int[np.ndarray, "clips 2"]
) -> Int[np.ndarray, "drawings clips"]:
    """Classify what each drawing shows, as index of `OUTCOMES`.

    Args:
      readings: color and shape of K drawings of each clip.
      identities: color and shape of its sprite; neighbors are twins.
    """
    own = (readings == identities).all(axis=-1)
    of_twin = identities[np.arange(len(identities)) ^ 1]
    twin = (readings == of_twin).all(axis=-1)
    nothing = (readings == NOTHING).all(axis=-1)
    return np.select([own, twin, nothing], [_OWN, _TWIN, _NOTHING], _OTHER)


def exchange_scores(
    drawings: Drawings, identities: Int[np.ndarray, "clips 2"]
) -> dict[str, dict[str, Any] | None]:
    """Compute the share of each outcome by exchange, and what each kind of memory carries.

    Returns:
      For each of `EXCHANGES` the share of every outcome and their "intervals", or None if the
      model has no such memory. "carried" has "states" and "caches": of the drawings that show the
      own sprite or the twin's while that memory is the twin's, the share that shows the twin's;
      None if there are none.
    """
    scores: dict[str, dict[str, Any] | None] = dict.fromkeys(EXCHANGES)
    for name, readings in drawings.readings.items():
        scores[name] = _shares(outcomes(readings, identities))
    scores["carried"] = {kind: _carried(scores[kind]) for kind in ("states", "caches")}
    return scores


def layer_flips(drawings: Drawings, identities: Int[np.ndarray, "clips 2"]) -> dict[str, Any]:
    """Measure how much of identity the cache of each single layer carries.

    Args:
      drawings: with nothing exchanged, and with `OfLayers` of single layers.
      identities: color and shape of the sprites; neighbors are twins.

    Returns:
      "recall", the share of drawings that show the own sprite with nothing exchanged; "clips"; and
      "layers": layer -> the share of every outcome under its exchange, their "intervals", and
      "flip", the share of all drawings that show the own sprite without the exchange and the
      twin's with it.
    """
    before, layers = outcomes(drawings.readings["none"], identities), {}
    for exchange, readings in drawings.readings.items():
        if isinstance(exchange, OfLayers):
            (layer,) = exchange.layers
            after = outcomes(readings, identities)
            flip = float(np.mean((before == _OWN) & (after == _TWIN)))
            layers[layer] = {"flip": flip} | _shares(after)
            layers[layer]["intervals"]["flip"] = wilson(flip, before.shape[1])
    return {
        "recall": float(np.mean(before == _OWN)),
        "clips": before.shape[1],
        "layers": layers,
    }


def _shares(found: Int[np.ndarray, "drawings clips"]) -> dict[str, Any]:
    shares: dict[str, Any] = {name: float((found == i).mean()) for i, name in enumerate(OUTCOMES)}
    return shares | {"intervals": {name: wilson(shares[name], found.shape[1]) for name in OUTCOMES}}


def _carried(shares: Mapping[str, Any] | None) -> float | None:
    drawn = shares["own"] + shares["twin"] if shares else 0.0
    return shares["twin"] / drawn if shares and drawn else None


def _decode(codec: Codec, latents: np.ndarray) -> np.ndarray:
    """Decode drawn blocks with leading axes; the codec of sprite clips has no past."""
    pixels = codec.decode(latents.reshape(-1, *latents.shape[-4:]))
    return np.asarray(pixels).reshape(*latents.shape[:-4], *pixels.shape[1:])


def _fetch(x) -> np.ndarray:
    """Gather an array from all processes on each host."""
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
