"""A stream of frames is the whole clip, bit for bit, and knows nothing of what comes later."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax.models import vae


@pytest.mark.parametrize("size", [(1, 6, 3, 5), (2, 3, 2, 2)])
def test_stream_of_frames_is_the_clip(codec, compiled, draw, size):
    latents, (batch, frames, *places) = draw(*size, codec.channels), size
    state, pixels = vae.init_decoder_state(codec.cfg, batch, *places), []
    decode = compiled(vae.decode_frame)
    for t in range(frames):
        part, state = decode(codec.params, codec.cfg, latents[:, t], state, first=t == 0)
        pixels.append(part)
    assert [part.shape[1] for part in pixels] == [1] + [4] * (frames - 1)
    clip = codec.decode(latents)
    np.testing.assert_array_equal(jnp.concatenate(pixels, axis=1), clip)

    state, encoded = vae.init_encoder_state(codec.cfg, batch, *places), []
    encode = compiled(vae.encode_frame)
    for t, part in enumerate(pixels):
        latent, state = encode(codec.params, codec.cfg, part, state, first=t == 0)
        encoded.append(latent)
    np.testing.assert_array_equal(jnp.stack(encoded, axis=1), codec.encode(clip))


@pytest.mark.parametrize("length", [1, 3])
def test_stream_of_blocks_is_the_clip(codec, latents, pixels, length):
    state, parts = codec.init_state(1, *latents.shape[2:4]), []
    for t in range(0, latents.shape[1], length):
        part, state = codec.decode_block(latents[:, t : t + length], state, first=t == 0)
        parts.append(part)
    assert parts[0].shape[1] == codec.pixel_frames(length)
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=1), pixels)


def test_videos_of_a_batch_do_not_touch(codec, draw):
    latents = draw(2, 3, 2, 2, codec.channels)
    before, after = (codec.decode(x) for x in (latents, latents.at[1].add(1)))
    np.testing.assert_array_equal(before[0], after[0])
    assert not np.allclose(before[1], after[1], atol=1e-2)


def test_pixels_depend_on_no_later_latent(shallow, draw):
    """Derivatives of the pixels of each latent frame, in a random direction."""
    latents, weights = draw(1, 3, 2, 3, shallow.channels), draw(4, 6, 3)
    frames = np.repeat(np.eye(3), (1, 2, 2), axis=1)

    @jax.jit
    def influence(latents, chosen):
        pixels = lambda x: vae.decode(shallow.params, shallow.cfg, x)[0]
        chosen = chosen[:, None, None, None]
        gradient = jax.grad(lambda x: jnp.sum(pixels(x) * chosen * weights))(latents)
        return jnp.abs(gradient).sum((0, 2, 3, 4))

    matrix = np.stack([influence(latents, chosen) for chosen in frames])
    assert np.isfinite(matrix).all()
    assert (matrix[np.triu_indices(3, 1)] == 0).all()
    assert (matrix[np.tril_indices(3)] > 0).all()


def test_latents_depend_on_no_later_pixel(codec, pixels):
    before, after = (codec.encode(x)[0] for x in (pixels, pixels.at[:, 5:].set(0)))
    np.testing.assert_array_equal(before[:2], after[:2])
    assert not np.allclose(before[2], after[2], atol=1e-3)
