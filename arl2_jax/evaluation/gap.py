"""How well a model predicts held-out clips, and how far a student is from its teacher."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from arl2_jax import sharding
from arl2_jax.config import ModelConfig, SamplerConfig
from arl2_jax.diffusion import add_noise, noise_levels, per_frame
from arl2_jax.models import Params
from arl2_jax.training import losses
from arl2_jax.training.losses import NoisedClip

Batch = Mapping[str, np.ndarray]

# Clips that a device computes together; bounds its memory.
MICRO_BATCH = 8


class Model(NamedTuple):
    """Parameters and the configuration of their model."""

    params: Params
    cfg: ModelConfig


class TeacherError(NamedTuple):
    """Relative squared error of a student's x0 against its teacher's.

    Attributes:
      by_timestep: at each noise level of the sampler, [steps].
      mean: over the levels; nan for clips of a single block, which have no past.
    """

    by_timestep: Float[np.ndarray, "steps"]
    mean: float


def held_out_losses(
    params: Params, cfg: ModelConfig, clips: Batch, sampler: SamplerConfig, key: Array
) -> float:
    """Compute the flow-matching loss, with every block at a random noise level.

    Args:
      params, cfg: the model.
      clips: "latents" [N, T, rows, columns, channels] and "text" [N, L, text_dim].
      sampler: gives the shift of the noise levels, and the level at which the past is written.
      key: random key; the same key gives every model the same noise.
    """
    clip, sums = noise_clips(key, clips, cfg, sampler), []
    for micro, new in micro_batches(params, clip):
        sums.append(_loss_sum(_flow(params, cfg, micro), micro, new))
    return float(np.sum(jax.device_get(sums))) / len(clip.clean)


def teacher_error(
    student: Params,
    cfg: ModelConfig,
    teacher: Params,
    clips: Batch,
    sampler: SamplerConfig,
    key: Array,
) -> TeacherError:
    """Compute the distance of a student's x0 from its teacher's, at the same noisy input.

        error = sum |x0_student - x0_teacher|^2 / sum |x0_teacher|^2

    over all clips. Blocks see the true clip as their past, at the level sampler.context_noise; the
    first block, which has none, is left out.

    Args:
      student, cfg: the student.
      teacher: parameters of the softmax model, as `arl2_jax.models.without_delta` returns them.
      clips: as in `held_out_losses`.
      sampler: gives the noise levels, and the level at which the past is written.
      key: random key of the noise.
    """
    original = Model(teacher, cfg.teacher())
    return teacher_errors({"": Model(student, cfg)}, original, clips, sampler, key)[""]


def teacher_errors(
    students: Mapping[str, Model],
    teacher: Model,
    clips: Batch,
    sampler: SamplerConfig,
    key: Array,
) -> dict[str, TeacherError]:
    """Compute `teacher_error` of several students; the teacher is computed once."""
    flows = {name: functools.partial(_flow, *student) for name, student in students.items()}
    return flow_errors(flows, teacher, clips, sampler, key)


def flow_errors(
    flows: Mapping[str, Callable[[NoisedClip], Array]],
    teacher: Model,
    clips: Batch,
    sampler: SamplerConfig,
    key: Array,
) -> dict[str, TeacherError]:
    """Compute `teacher_error` of functions that predict the flow of a noised clip, by name."""
    levels, first = noise_levels(sampler), teacher.cfg.frames_per_block
    sums = {name: [] for name in flows}
    noised = noise_clips(key, clips, teacher.cfg, sampler)
    for micro, new in micro_batches(teacher.params, noised):
        for level in levels:
            noisy = _at_level(micro, level)
            target = _flow(*teacher, noisy)
            for name, flow in flows.items():
                sums[name].append(_error_sums(flow(noisy), target, noisy, new, first))
    return {name: _relative(jax.device_get(pairs), len(levels)) for name, pairs in sums.items()}


def put_like_params(params: Params, batch: Any) -> Any:
    """Put a batch on the devices of the parameters, sharded if its size allows it."""
    layout = jax.tree.leaves(params)[0].sharding
    if not isinstance(layout, NamedSharding):
        return batch
    divides = len(jax.tree.leaves(batch)[0]) % _batch_shards(params) == 0
    spec = sharding.BATCH if divides else PartitionSpec()
    return jax.device_put(batch, NamedSharding(layout.mesh, spec))


def micro_batches(params: Params, batch: Any, size: int | None = None) -> Iterator[tuple[Any, int]]:
    """Split a batch into parts of equal size, so that one compilation serves all.

    Args:
      params: parameters on whose devices the parts are put.
      batch: arrays of one length.
      size: clips of a part in each shard of the batch; by default `MICRO_BATCH`, or fewer if the
        whole batch is one part.

    Yields:
      A part, put like the parameters, and how many of its clips are new: the last part is padded
      with clips that were yielded before.
    """
    count, shards = len(jax.tree.leaves(batch)[0]), _batch_shards(params)
    size = size * shards if size else min(MICRO_BATCH * shards, count)
    for start in range(0, count, size):
        places = np.arange(start, start + size) % count
        part = jax.tree.map(lambda x, places=places: x[places], batch)
        yield put_like_params(params, part), min(size, count - start)


def _batch_shards(params: Params) -> int:
    """Return the number of parts in which the mesh shards a batch."""
    layout = jax.tree.leaves(params)[0].sharding
    shape = layout.mesh.shape if isinstance(layout, NamedSharding) else {}
    return shape.get("data", 1) * shape.get("fsdp", 1)


def noise_clips(key: Array, clips: Batch, cfg: ModelConfig, sampler: SamplerConfig) -> NoisedClip:
    """Noise each block of the clips to a random level; keep the result in host memory."""
    # The noise does not depend on the model: teacher and student share one compilation.
    clip = _noise_clip(key, cfg.teacher(), clips["latents"], clips["text"], sampler)
    return jax.tree.map(np.asarray, clip)


_noise_clip = jax.jit(losses.noise_clip, static_argnums=(1, 4))


@functools.partial(jax.jit, static_argnums=1)
def _flow(params: Params, cfg: ModelConfig, clip: NoisedClip):
    return losses.predict(params, cfg, clip)[0]


@jax.jit
def _at_level(clip: NoisedClip, level) -> NoisedClip:
    s = jnp.full_like(clip.s, level)
    return clip._replace(noisy=add_noise(clip.clean, clip.eps, s), s=s)


@jax.jit
def _loss_sum(flow, clip: NoisedClip, new: int | Int[Array, ""]) -> Array:
    """Sum the loss over the first `new` clips."""
    each = jnp.mean(jnp.square(flow - (clip.eps - clip.clean)), axis=(1, 2, 3, 4))
    return jnp.sum(each, where=jnp.arange(len(each)) < new)


@functools.partial(jax.jit, static_argnums=4)
def _error_sums(flow, target, clip: NoisedClip, new: int | Int[Array, ""], first: int) -> Array:
    """Sum |x0 - x0_teacher|^2 and |x0_teacher|^2 over `new` clips from frame `first` on."""
    s = per_frame(clip.s)
    pair = jnp.stack([s * (target - flow), clip.noisy - s * target])[:, :, first:]
    squares = jnp.sum(jnp.square(pair), axis=(2, 3, 4, 5))
    return jnp.sum(squares, axis=1, where=jnp.arange(squares.shape[1]) < new)


def _relative(sums, levels: int) -> TeacherError:
    error, size = np.reshape(sums, (-1, levels, 2)).sum(axis=0, dtype=np.float64).T
    with np.errstate(invalid="ignore"):
        by_timestep = error / size
    return TeacherError(by_timestep, float(by_timestep.mean()))
