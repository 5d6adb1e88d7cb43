"""Videos as a stream of frame blocks, of any length, from one compiled program."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arl2_jax import models
from arl2_jax.codecs import Codec
from arl2_jax.config import ModelConfig, SamplerConfig
from arl2_jax.generation.rollout import (
    RolloutContext,
    RolloutState,
    enter_phase,
    generate_block,
    init_rollout,
    write_block,
)

AnyArray = Array | np.ndarray


class Generator:
    """Generates videos block by block, and yields each block as soon as it is made.

    The blocks are those of `rollout` with the same key. A model whose memories are all bounded
    streams without end; for full softmax caches the number of frames must be known.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params,
        sampler: SamplerConfig,
        *,
        latent_shape: tuple[int, int, int],
        codec: Codec | None = None,
    ):
        """Stack the parameters once for all videos.

        Args:
          cfg, params: the model.
          sampler: how each block is denoised and written.
          latent_shape: rows, columns and channels of a latent frame.
          codec: decodes each block; without one the blocks are latents.

        Raises:
          ValueError: the latents are not the model's or the codec's.
        """
        f, (rows, columns, channels) = cfg.frames_per_block, latent_shape
        _, patch_rows, patch_columns = cfg.patch_size
        if channels != cfg.in_dim or rows % patch_rows or columns % patch_columns:
            raise ValueError(
                f"latent_shape={latent_shape} must be rows and columns in multiples of the patch "
                f"{patch_rows} x {patch_columns}, and {cfg.in_dim} channels"
            )
        if codec is not None and codec.channels != channels:
            raise ValueError(
                f"latent_shape={latent_shape} must have the {codec.channels} channels of the codec"
            )
        self.cfg, self.sampler, self.codec = cfg, sampler, codec
        self._shape = (f, rows, columns, channels)
        self._params = jax.jit(lambda p: models.compute_params(p, cfg))(params)
        tokens = rows * columns // (patch_rows * patch_columns)
        self._start = jax.jit(
            lambda params, text, null_text, key, frames: init_rollout(
                params,
                cfg,
                sampler,
                text,
                key,
                frames=frames,
                tokens_per_frame=tokens,
                null_text=null_text,
            ),
            static_argnames="frames",
        )
        # Memories are updated in place; the key is not donated, as it may be the caller's.
        program = functools.partial(jax.jit, static_argnames="cfg", donate_argnames="memory")
        self._next, self._remember = program(self._make_block), program(self._write_block)
        self._enter = jax.jit(
            lambda context, memory, position, key, before, after, frames: enter_phase(
                context, before, after, RolloutState(memory, position, key),
                frames=frames, tokens_per_frame=tokens,
            ),
            static_argnames=("before", "after", "frames"),
        )  # fmt: skip

    def stream(
        self,
        text_embedding: Float[AnyArray, "*batch l text_dim"],
        *,
        key: Array,
        past: Float[AnyArray, "b t rows columns channels"] | None = None,
        frames: int | None = None,
        capacity: int | None = None,
        null_text: Float[AnyArray, "l text_dim"] | None = None,
    ) -> Iterator[Array]:
        """Generate a video, or continue one; arguments are checked at the call.

        Args:
          text_embedding: [L, text_dim] for one video, or [B, L, text_dim].
          key: random key.
          past: clean latents to continue, whole blocks; they are written, but not yielded.
          frames: latent frames to generate, whole blocks; None never ends.
          capacity: latent frames, the past included, that growing memories have room for; by
            default past and `frames`. Models without such memories ignore it.
          null_text: embedding that guidance leads away from, see `rollout.init_rollout`.

        Returns:
          Iterator of latents [B, f, rows, columns, channels] float32 or, with a codec, of pixels
          [B, F, H, W, 3] uint8. With a codec that compresses time, the first block of a video has
          fewer frames than the later ones.

        Raises:
          ValueError: before anything is compiled, if shapes do not fit, or if frames are endless
            or more than capacity in a model whose memory grows; and during the stream, when an
            endless one has filled its capacity.
        """
        text = jnp.asarray(text_embedding)
        text = text[None] if text.ndim == 2 else text
        if text.ndim != 3 or text.shape[2] != self.cfg.text_dim:
            raise ValueError(
                f"text_embedding has shape {np.shape(text_embedding)}; must be [L, "
                f"{self.cfg.text_dim}] or [B, L, {self.cfg.text_dim}]"
            )
        if null_text is not None and np.shape(null_text) != text.shape[1:]:
            raise ValueError(
                f"null_text has shape {np.shape(null_text)}; must be {text.shape[1:]}, that of a "
                "text"
            )
        known = self._check_past(past, text.shape[0])
        if frames is not None and (frames < 1 or frames % self._shape[0]):
            raise ValueError(f"frames={frames} must be a positive multiple of {self._shape[0]}")
        room = self._room(known, frames, capacity)
        blocks = self._stream(text, null_text, key, past, frames, room)
        if self.codec is None:
            return blocks
        return _decoded(blocks, self.codec, past, (text.shape[0], *self._shape))

    def generate(
        self,
        text_embedding: Float[AnyArray, "*batch l text_dim"],
        *,
        frames: int,
        key: Array,
        past: Float[AnyArray, "b t rows columns channels"] | None = None,
        capacity: int | None = None,
        null_text: Float[AnyArray, "l text_dim"] | None = None,
    ) -> np.ndarray:
        """Collect `frames` latent frames of a stream in host memory; the past is not repeated.

        Args:
          text_embedding, frames, key, past, capacity, null_text: as in `stream`. Videos of several
            lengths share one compiled program if they have the same capacity.

        Returns:
          Latents [B, frames, rows, columns, channels] or, with a codec, pixels [B, F, H, W, 3].
        """
        blocks = self.stream(
            text_embedding,
            key=key,
            past=past,
            frames=frames,
            capacity=capacity,
            null_text=null_text,
        )
        return np.concatenate([np.asarray(block) for block in blocks], axis=1)

    def _stream(
        self, text, null_text, key, past, frames: int | None, room: int | None
    ) -> Iterator[Array]:
        context, state = self._start(self._params, text, null_text, key, frames=room)
        f, position, cfg = self._shape[0], 0, self.cfg
        known = 0 if past is None else past.shape[1]
        phases = dict(self.cfg.phases())
        while frames is None or position < known + frames:
            if position and position in phases:
                state = self._enter(
                    context, *state, before=cfg, after=phases[position], frames=room
                )
                cfg = phases[position]
            if past is not None and position < known:
                block = past[:, position : position + f]
                state = self._remember(context, *state, cfg=cfg, block=block)
                position += f
                continue
            if room is not None and position + f > room:
                raise ValueError(
                    f"capacity={room} latent frames are used up: the softmax caches have no room "
                    "for another block; raise it"
                )
            state, block = self._next(context, *state, cfg=cfg)
            position += f
            yield block

    def _make_block(self, context: RolloutContext, memory, position, key, cfg: ModelConfig):
        state = RolloutState(memory, position, key)
        batch = context.text[0].k.shape[1] // (2 if self.sampler.guidance > 1 else 1)
        shape = (batch, *self._shape)
        return generate_block(context, cfg, self.sampler, state, shape)

    def _write_block(self, context: RolloutContext, memory, position, key, cfg: ModelConfig, block):
        state = RolloutState(memory, position, key)
        return write_block(context, cfg, self.sampler, state, block)

    def _check_past(self, past, batch: int) -> int:
        """Check the shape of the past and return its latent frames."""
        if past is None:
            return 0
        f, *frame = self._shape
        if past.ndim != 5 or past.shape[1] % f or past.shape != (batch, past.shape[1], *frame):
            raise ValueError(
                f"past has shape {past.shape}; must be [{batch}, frames, "
                f"{', '.join(map(str, frame))}] with frames a multiple of {f}"
            )
        return past.shape[1]

    def _room(self, known: int, frames: int | None, capacity: int | None) -> int | None:
        """Return the latent frames that growing memories have room for; None without any."""
        growing = len(models.unbounded_layers(self.cfg))
        if not growing:
            return None
        if capacity is None and frames is None:
            raise ValueError(
                f"frames and capacity are both None, but {growing} of {self.cfg.num_layers} layers "
                "keep the whole past; set one of them"
            )
        needed = known + (self._shape[0] if frames is None else frames)
        if capacity is not None and capacity < needed:
            raise ValueError(
                f"capacity={capacity} is less than the {needed} latent frames of past and video; "
                "raise it"
            )
        return needed if capacity is None else capacity


def _decoded(
    blocks: Iterator[Array], codec: Codec, past: AnyArray | None, shape: tuple[int, ...]
) -> Iterator[Array]:
    """Decode the blocks to pixels; the codec's state takes in the past first."""
    batch, f, rows, columns, _ = shape
    state, first = codec.init_state(batch, rows, columns), True
    if past is not None:
        for i in range(0, past.shape[1], f):
            _, state = codec.decode_block(past[:, i : i + f], state, first=i == 0)
        first = False
    for block in blocks:
        pixels, state = codec.decode_block(block, state, first=first)
        first = False
        yield _to_uint8(pixels)


@jax.jit
def _to_uint8(pixels: Array) -> Array:
    """Convert colors in [-1, 1] to integers in 0..255."""
    return jnp.clip(jnp.rint((pixels + 1) * 127.5), 0, 255).astype(jnp.uint8)
