"""Measures of how much a layer of a softmax model needs softmax: a value for every layer."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from arl2_jax.config import Config, ModelConfig, with_steps
from arl2_jax.data import ClipData
from arl2_jax.evaluation.exchange import draw_test, layer_flips
from arl2_jax.evaluation.gap import Model, micro_batches, noise_clips, teacher_errors
from arl2_jax.evaluation.recall import recall_test
from arl2_jax.evaluation.swap import swap_errors
from arl2_jax.generation.exchange import OfLayers
from arl2_jax.models import Params, layer_of, unstack_params, without_delta
from arl2_jax.training.loop import run_phase
from arl2_jax.training.losses import NoisedClip, distill_layers
from arl2_jax.training.retention import retention

# Clips on which retention is measured; it differs little between them.
_RETENTION_CLIPS = 4


@dataclasses.dataclass(frozen=True)
class Candidates:
    """All layers of a model after stage 1, and the means to measure them.

    Attributes:
      config: the run; all layers of its model are hybrid.
      params: all parameters.
      data: clips.
      folder: where trained candidates are kept.
      mesh: devices.
    """

    config: Config
    params: Params
    data: ClipData
    folder: epath.Path
    mesh: Mesh

    @property
    def clips(self) -> dict[str, np.ndarray]:
        """Return the held-out clips to measure on."""
        return self.data.held_out(self.config.evaluation.clips)

    @property
    def key(self) -> jax.Array:
        """Return the random key of all noise."""
        return jax.random.key(self.config.train.seed)

    @property
    def layers(self) -> range:
        """Return the indices of the layers."""
        return range(self.config.model.num_layers)


def layer_errors(candidates: Candidates) -> list[float]:
    """Compute the relative squared error of each layer's attention at the teacher's input."""
    config = candidates.config
    clip = noise_clips(candidates.key, candidates.clips, config.model, config.sampler)
    count, sums = len(clip.clean), np.zeros(config.model.num_layers)
    for part, new in micro_batches(candidates.params, clip):
        errors = jax.device_get(_distill(candidates.params, config.model, part))
        # A last part that is not full is padded with clips from the beginning.
        sums += new * np.array([errors[str(i)] for i in candidates.layers], float)
    return (sums / count).tolist()


@functools.partial(jax.jit, static_argnums=1)
def _distill(params: Params, cfg: ModelConfig, clip: NoisedClip) -> dict[str, jax.Array]:
    return distill_layers(params, cfg, clip).errors


def retentions(candidates: Candidates) -> list[float]:
    """Measure the share of a state that is left after a block, for each layer's median head."""
    count = min(_RETENTION_CLIPS, candidates.config.evaluation.clips)
    measures = retention(
        candidates.params, candidates.config.model, candidates.data.held_out(count)
    )
    return [float(np.median(row)) for row in measures["retention"]]


def swaps(candidates: Candidates) -> list[float]:
    """Compute the relative squared error of x0 with each layer as the only hybrid one."""
    config = candidates.config
    return swap_errors(
        candidates.params, config.model, candidates.clips, config.sampler, candidates.key
    )


def flips(candidates: Candidates) -> dict[str, Any]:
    """Measure what the softmax model draws if a single layer reads the twin clip's cache.

    Returns:
      As `arl2_jax.evaluation.exchange.layer_flips`.
    """
    config, codec = candidates.config, candidates.data.codec
    assert codec is not None  # synthetic clips have one
    test = recall_test(config, codec)
    teacher = Model(without_delta(candidates.params), config.model.teacher())
    exchanges = ("none", *(OfLayers("caches", (i,)) for i in candidates.layers))
    drawings = draw_test(config, codec, teacher, test, candidates.key, exchanges=exchanges)
    return layer_flips(drawings, test.identities)


def train_alone(candidates: Candidates, steps: int) -> dict[str, Model]:
    """Run stage 2 with each layer as the only hybrid one: layer -> its model.

    Args:
      candidates: the layers, after stage 1.
      steps: optimizer steps; at most a quarter of them is warm-up.
    """
    config, students = candidates.config, {}
    fewer = with_steps(config.stage2, steps)
    fewer = dataclasses.replace(fewer, warmup=min(fewer.warmup, steps // 4))
    for layer in candidates.layers:
        cfg = dataclasses.replace(config.model, hybrid_layers=(layer,))
        alone = _with_memory_of(candidates.params, layer)
        run = dataclasses.replace(config, model=cfg, stage2=fewer)
        folder = candidates.folder / f"stage2_{steps}" / f"layer_{layer:02d}"
        title = f"layer {layer}"
        result = run_phase(
            run, "stage2", alone, candidates.data, candidates.mesh, folder, title=title
        )
        students[str(layer)] = Model(result.params, cfg)
    return students


def errors_alone(students: Mapping[str, Model], candidates: Candidates) -> list[float]:
    """Compute the relative squared error of each student's x0, by layer."""
    config = candidates.config
    teacher = Model(without_delta(candidates.params), config.model.teacher())
    errors = teacher_errors(students, teacher, candidates.clips, config.sampler, candidates.key)
    return [errors[str(layer)].mean for layer in candidates.layers]


def _with_memory_of(params: Params, layer: int) -> Params:
    """Return parameters in which only one layer is hybrid."""
    teacher = unstack_params(without_delta(params))
    return teacher | {"blocks": teacher["blocks"] | {str(layer): layer_of(params, layer)}}
