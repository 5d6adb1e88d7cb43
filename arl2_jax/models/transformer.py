"""The causal Wan network as a module whose layers can be inspected and replaced."""

from flax import nnx
from jaxtyping import Array, Float, Int

from arl2_jax.config import ModelConfig
from arl2_jax.memory import Room
from arl2_jax.models.embeddings import Stem
from arl2_jax.models.layer import Conditions, Params, TransformerLayer, to_public
from arl2_jax.models.params import layer_of, stem_of
from arl2_jax.models.wan import check_latents, embed_clip, make_layer, make_stem, noisy_half
from arl2_jax.nn.positions import video_grid


class WanTransformer(nnx.Module):
    """The network with its parameters, one module per layer, for use in other programs.

    It computes the same as `apply` and `apply_clip`, layer by layer without a scan, so that layers
    may differ in any way: `model.layers[3].memory` is the memory of layer 3 and may be replaced.
    Programs grow with depth; generation and training use the functions.

    Args:
      cfg: the model.
      rngs: source of the initial parameters.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.stem = Stem(cfg, rngs=rngs)
        layers = range(cfg.num_layers)
        self.layers = nnx.List([TransformerLayer(cfg, cfg.memory_of(i), rngs=rngs) for i in layers])

    @classmethod
    def from_params(cls, cfg: ModelConfig, params: Params) -> "WanTransformer":
        """Make the module around parameters of `init_params` or `load_params`."""
        model = nnx.eval_shape(lambda: cls(cfg, rngs=nnx.Rngs(0)))
        model.stem = make_stem(cfg, stem_of(params))
        for i in range(cfg.num_layers):
            model.layers[i] = make_layer(cfg, i, layer_of(params, i))
        return model

    def to_params(self) -> Params:
        """Return the parameters as `init_params` does, a nested dict with string keys."""
        pure = lambda module: nnx.to_pure_dict(nnx.split(module)[1])
        layers = {str(i): to_public(pure(layer)) for i, layer in enumerate(self.layers)}
        return pure(self.stem) | {"blocks": layers}

    def init_memory(self, *, batch: int, frames: int | None, tokens_per_frame: int) -> list:
        """Return the empty state of every layer's memory; arguments as in `init_memory`."""
        room = Room(frames, tokens_per_frame, self.cfg.frames_per_block)
        return [layer.memory.init_state(batch, room) for layer in self.layers]

    def block(
        self,
        latents: Float[Array, "b f rows columns channels"],
        timestep: Float[Array, "b f"],
        text: Float[Array, "b l text_dim"],
        *,
        memory: list,
        position: int | Int[Array, ""] = 0,
        write: bool = False,
    ) -> tuple[Float[Array, "b f rows columns out_channels"], list]:
        """Run one frame block as `apply` does; memory is a list with one state per layer."""
        rows, columns = check_latents(self.cfg, latents, timestep)
        x = self.stem.embed_patches(latents)
        time, modulation = self.stem.embed_time(timestep)
        grid = video_grid(position, latents.shape[1], rows, columns, self.cfg.head_dim)
        embedded, states = self.stem.text_embedding(text), []
        for layer, state in zip(self.layers, memory, strict=True):
            context = layer.cross_attn.encode(embedded)
            x, state, _ = layer.block(x, Conditions(modulation, grid), context, state, write=write)
            states.append(state)
        return self.stem.predict_flow(x, time, *latents.shape[2:4]), states

    def clip(
        self,
        clean: Float[Array, "b t rows columns channels"],
        noisy: Float[Array, "b t rows columns channels"],
        timestep: Float[Array, "b t"],
        text: Float[Array, "b l text_dim"],
    ) -> tuple[Float[Array, "b t rows columns out_channels"], list[dict[str, Array]]]:
        """Run all blocks of a clip as `apply_clip` does; diagnostics are one dict per layer."""
        tokens = embed_clip(self.stem, self.cfg, clean, noisy, timestep, text)
        x, diagnostics = tokens.x, []
        for layer in self.layers:
            context = layer.cross_attn.encode(tokens.text)
            blocks = clean.shape[1] // self.cfg.frames_per_block
            x, logged = layer.clip(x, tokens.conditions, context, blocks, copies=2)
            diagnostics.append(logged)
        return self.stem.predict_flow(noisy_half(x), tokens.time, *clean.shape[2:4]), diagnostics
