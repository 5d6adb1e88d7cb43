"""What a block may depend on: itself, the text, and clean blocks before it; nothing else."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax import models

BLOCKS = 3


def blocks_of(x, cfg):
    """[B, T, ...] -> [blocks, B, f, ...]."""
    return np.moveaxis(
        np.reshape(x, (x.shape[0], BLOCKS, cfg.frames_per_block, *x.shape[2:])), 1, 0
    )


@pytest.fixture(scope="module")
def gradients(params, cfg, clip):
    """For every block, the gradient of a random projection of its flow with respect to the clip."""
    weights = jax.random.normal(jax.random.key(1), clip.noisy.shape)

    @jax.jit
    def gradient(block):
        def projected(clip):
            flow, _ = models.apply_clip(params, cfg, *clip)
            own = jnp.arange(flow.shape[1]) // cfg.frames_per_block == block
            return jnp.sum(flow * weights * own[:, None, None, None])

        return jax.grad(projected)(clip)

    return [jax.device_get(gradient(i)) for i in range(BLOCKS)]


@pytest.mark.parametrize("i", range(BLOCKS))
def test_block_sees_earlier_clean_blocks_and_itself(gradients, cfg, i):
    of_clean, of_noisy, of_timestep = (blocks_of(g, cfg) for g in gradients[i][:3])
    for j in range(BLOCKS):
        # Exactly zero: no path at all, rather than a small weight.
        assert bool(np.any(of_clean[j])) == (j < i)
        assert bool(np.any(of_noisy[j])) == (j == i)
        assert bool(np.any(of_timestep[j])) == (j == i)
    assert np.any(gradients[i].text)


def test_clips_of_a_batch_do_not_meet(params, cfg, clip, apply_clip):
    changed = jax.tree.map(lambda x: x.at[1].add(1.0), clip)
    flow, _ = apply_clip(params, cfg, *clip)
    other, _ = apply_clip(params, cfg, *changed)
    np.testing.assert_array_equal(other[0], flow[0])
    assert np.abs(other[1] - flow[1]).max() > 0.1


@pytest.mark.parametrize("i", range(BLOCKS))
def test_what_is_invisible_may_even_be_nan(params, cfg, clip, apply_clip, i):
    """A mask that multiplies by zero would let it through."""
    block = (np.arange(clip.clean.shape[1]) // cfg.frames_per_block)[:, None, None, None]
    poisoned = clip._replace(
        clean=jnp.where(block < i, clip.clean, jnp.nan),
        noisy=jnp.where(block == i, clip.noisy, jnp.nan),
    )
    flow, _ = apply_clip(params, cfg, *clip)
    seen, _ = apply_clip(params, cfg, *poisoned)
    np.testing.assert_array_equal(blocks_of(seen, cfg)[i], blocks_of(flow, cfg)[i])


def test_denoising_leaves_the_memory_and_writing_changes_it(params, cfg, clip, apply):
    memory = models.init_memory(cfg, batch=2, frames=4, tokens_per_frame=6)
    arguments = (params, cfg, clip.clean[:, :2], 0 * clip.timestep[:, :2], clip.text)
    flow, written = apply(*arguments, memory=memory, position=jnp.int32(0), write=True)
    again, kept = apply(*arguments, memory=written, position=jnp.int32(2))
    assert len(written) == 2  # one state per run of equal layers
    chex.assert_trees_all_equal(kept, written)
    for before, after in zip(jax.tree.leaves(memory), jax.tree.leaves(written), strict=True):
        assert all(np.any(a != b) for a, b in zip(after, before, strict=True))  # in every layer
    assert np.abs(again - flow).max() > 0.01


def test_written_block_does_not_read_what_it_writes(params, cfg, clip, apply):
    """The pass that writes predicts the same flow as the same pass without writing."""
    memory = models.init_memory(cfg, batch=2, frames=4, tokens_per_frame=6)
    arguments = (params, cfg, clip.clean[:, :2], 0 * clip.timestep[:, :2], clip.text)
    reading, _ = apply(*arguments, memory=memory, position=jnp.int32(0))
    writing, _ = apply(*arguments, memory=memory, position=jnp.int32(0), write=True)
    # Two programs of the same sums, up to their order.
    np.testing.assert_allclose(writing, reading, atol=1e-5)
