"""Our network is Wan's network, as Diffusers has it: float32 on the CPU.

Errors are a few 1e-7 where sums are taken in another order; bounds are ten times what is measured.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity.wan import (
    MaskedSelfAttention,
    channels_first,
    channels_last,
    per_token,
    random_inputs,
    random_wan,
    tensors_of,
)
from wan_names import from_diffusers

from arl2_jax import models
from arl2_jax.config import ModelConfig
from arl2_jax.memory import Room
from arl2_jax.models.embeddings import timestep_features
from arl2_jax.models.layer import Conditions
from arl2_jax.models.wan import make_layer, make_stem
from arl2_jax.nn.positions import video_grid
from arl2_jax.nn.rope import rotate, video_rope

pytestmark = pytest.mark.parity


def config(heads, head_dim, **changes):
    sizes = dict(
        dim=heads * head_dim, num_heads=heads, ffn_dim=3 * head_dim, num_layers=3, freq_dim=32,
        text_dim=20, text_len=7, in_dim=5, out_dim=5,
    )  # fmt: skip
    return ModelConfig(**sizes | changes)


# Model, then latent frames, rows and columns of tokens.
CASES = {
    "wan's heads": (config(2, 128, num_layers=1), (3, 5, 3)),
    "deep": (config(2, 16, num_layers=5, in_dim=16, out_dim=16), (4, 3, 5)),
    "narrow": (config(3, 10, text_len=3), (1, 7, 1)),
    "patches of 1 x 3": (config(1, 12, patch_size=(1, 1, 3), out_dim=4), (2, 1, 3)),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request):
    """A clip that is one block: (cfg, Diffusers' network, our parameters, inputs)."""
    cfg, (frames, rows, columns) = request.param
    cfg = dataclasses.replace(cfg, frames_per_block=frames)
    network = random_wan(cfg)
    inputs = random_inputs(cfg, frames=frames, rows=rows, columns=columns)
    return cfg, network, from_diffusers(tensors_of(network), cfg), inputs


def grid(cfg, latents):
    frames, rows, columns = latents.shape[1:4]
    return frames, rows // cfg.patch_size[1], columns // cfg.patch_size[2]


def flow_of_block(cfg, params, latents, timestep, text):
    """Our flow of a clip that is one block."""
    frames, rows, columns = grid(cfg, latents)
    sizes = dict(batch=latents.shape[0], frames=frames, tokens_per_frame=rows * columns)
    memory = models.init_memory(cfg, **sizes)
    return models.apply(params, cfg, latents, timestep, text, memory=memory)[0]


def flow_of_diffusers(cfg, network, latents, timestep, text):
    """Diffusers' flow, channels first; `timestep` of each video or of each frame."""
    _, rows, columns = grid(cfg, latents)
    told = torch.tensor(np.asarray(timestep))
    told = per_token(timestep, rows * columns) if told.ndim == 2 else told
    return network(channels_first(latents), told, torch.tensor(np.asarray(text))).sample


def test_all_parameters_are_used(case):
    cfg, network, params, _ = case
    shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
    assert shapes(params) == shapes(models.param_shapes(cfg))
    count = sum(x.size for x in jax.tree.leaves(params))
    assert count == sum(p.numel() for p in network.parameters())


def test_patch_embedding(case, error):
    cfg, network, params, (latents, _, _) = case
    found = make_stem(cfg, models.stem_of(params)).embed_patches(latents)
    wanted = network.patch_embedding(channels_first(latents)).flatten(2).transpose(1, 2)
    assert error(found, wanted.detach()) < 2e-6


def test_timestep_and_text_embedding(case, error):
    cfg, network, params, (_, timestep, text) = case
    stem = make_stem(cfg, models.stem_of(params))
    batch, frames = timestep.shape
    flat = torch.tensor(np.asarray(timestep)).flatten()
    wanted = network.condition_embedder(
        flat, torch.tensor(np.asarray(text)), timestep_seq_len=frames
    )
    time, modulation, embedded, _ = (x if x is None else x.detach() for x in wanted)
    found_time, found_modulation = stem.embed_time(timestep)
    assert error(found_time, time) < 1e-5
    assert error(found_modulation, modulation.reshape(batch, frames, 6, -1)) < 1e-5
    assert error(stem.text_embedding(text), embedded) < 2e-6


def test_timestep_features():
    """Diffusers rounds frequencies to float32: 1e-7 of an angle of up to 1000 radians."""
    from diffusers.models.embeddings import Timesteps

    timestep = np.float32([0, 0.4, 1, 250, 625, 833.3333, 937.5, 1000])
    wanted = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.tensor(timestep))
    np.testing.assert_allclose(timestep_features(jnp.asarray(timestep), 256), wanted, atol=2e-4)


@pytest.mark.parametrize("size", [(128, 21, 30, 52), (16, 1, 7, 1), (10, 3, 5, 3)])
def test_rope(size, error):
    """Angles, their split over the axes and the interleaved pairs: the same rotated heads."""
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    head_dim, frames, rows, columns = size
    x = np.random.default_rng(0).standard_normal((1, frames * rows * columns, 2, head_dim))
    x = x.astype(np.float32)
    found = rotate(jnp.asarray(x), video_rope(0, frames, rows, columns, head_dim))
    video = torch.zeros(1, 1, frames, 2 * rows, 2 * columns)
    cos, sin = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(video)
    turned = torch.view_as_complex(torch.tensor(x).unflatten(-1, (-1, 2)))
    turned = turned * torch.complex(cos[..., ::2], sin[..., ::2])
    assert error(found, torch.view_as_real(turned).flatten(-2)) < 1e-6


@pytest.mark.parametrize("layer", [0, -1])
def test_one_layer(case, layer, error):
    cfg, network, params, (latents, _, _) = case
    frames, rows, columns = grid(cfg, latents)
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x, text = draw(2, frames * rows * columns, cfg.dim), draw(2, cfg.text_len, cfg.dim)
    modulation = draw(2, frames, 6, cfg.dim)
    tokens = torch.tensor(modulation).repeat_interleave(rows * columns, dim=1)
    rotary = network.rope(channels_first(latents))
    wanted = network.blocks[layer](torch.tensor(x), torch.tensor(text), tokens, rotary)

    weights = params["blocks"][str(layer % cfg.num_layers)]
    ours = make_layer(cfg, layer % cfg.num_layers, jax.tree.map(jnp.asarray, weights))
    conditions = Conditions(modulation, video_grid(0, frames, rows, columns, cfg.head_dim))
    state = ours.memory.init_state(2, Room(frames, rows * columns, frames))
    context = ours.cross_attn.encode(jnp.asarray(text))
    found, _, _ = ours.block(jnp.asarray(x), conditions, context, state, write=False)
    assert error(found, wanted.detach()) < 5e-6


@pytest.mark.parametrize("per", ["video", "frame"])
def test_network(case, per, error):
    cfg, network, params, (latents, timestep, text) = case
    if per == "video":
        timestep = jnp.broadcast_to(timestep[:, :1], timestep.shape)
    told = timestep[:, 0] if per == "video" else timestep
    wanted = channels_last(flow_of_diffusers(cfg, network, latents, told, text))
    found = flow_of_block(cfg, params, latents, timestep, text)
    assert error(found, wanted) < 1e-5
    clip_form, _ = models.apply_clip(params, cfg, latents[::-1], latents, timestep, text)
    assert error(clip_form, wanted) < 1e-5


def test_padding_of_the_text_is_attended(error):
    """Both networks see the zeros past a prompt, and see them alike."""
    cfg, size = CASES["deep"]
    cfg = dataclasses.replace(cfg, frames_per_block=size[0])
    network = random_wan(cfg)
    params = from_diffusers(tensors_of(network), cfg)
    latents, timestep, text = random_inputs(
        cfg, frames=size[0], rows=size[1], columns=size[2], words=2
    )
    flows = []
    for seen in (text, text[:, :2]):
        wanted = channels_last(flow_of_diffusers(cfg, network, latents, timestep, seen))
        flows.append(flow_of_block(cfg, params, latents, timestep, seen))
        assert error(flows[-1], wanted) < 1e-5
    assert error(*flows) > 1e-3


def test_gradients(case, error):
    """Of a random projection of the flow, in the latents, the text and every weight."""
    cfg, network, params, (latents, timestep, text) = case
    seen = torch.tensor(np.asarray(text), requires_grad=True)
    video = channels_first(latents).requires_grad_()
    tokens = per_token(timestep, grid(cfg, latents)[1] * grid(cfg, latents)[2])
    flow = network(video, tokens, seen).sample
    weight = np.random.default_rng(2).standard_normal(flow.shape).astype(np.float32)
    network.zero_grad()
    (flow * torch.tensor(weight)).sum().backward()
    by_name = {name: p.grad.numpy() for name, p in network.named_parameters()}

    def loss(params, latents, text):
        flow = flow_of_block(cfg, params, latents, timestep, text)
        return jnp.sum(flow * weight.transpose(0, 2, 3, 4, 1))

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, latents, text)
    wanted = (from_diffusers(by_name, cfg), channels_last(video.grad), seen.grad)
    errors = jax.tree.map(error, found, wanted)
    worst = max(jax.tree_util.tree_leaves_with_path(errors), key=lambda item: item[1])
    assert worst[1] < 1e-4, worst  # sums over all tokens, some of which cancel


def test_blocks_of_a_causal_clip(apply, error):
    """Diffusers under a mask: a block after clean ones, each of which sees those before it."""
    cfg = config(2, 16, frames_per_block=2)
    network = random_wan(cfg)
    params = from_diffusers(tensors_of(network), cfg)
    sizes = dict(frames=6, rows=3, columns=1)
    noisy, timestep, text = random_inputs(cfg, **sizes)
    clean, _, _ = random_inputs(cfg, **sizes, seed=1)
    timestep = jnp.repeat(timestep[:, ::2], 2, axis=1)
    wanted = []
    for start in range(0, 6, 2):
        latents = jnp.concatenate([clean[:, :start], noisy[:, start : start + 2]], axis=1)
        told = jnp.where(jnp.arange(start + 2) < start, 0, timestep[:, : start + 2])
        block = torch.arange((start + 2) * 3) // (2 * 3)
        for layer in network.blocks:
            layer.attn1.set_processor(MaskedSelfAttention(block[:, None] >= block))
        flow = flow_of_diffusers(cfg, network, latents, told, text)
        wanted.append(channels_last(flow)[:, start:])
    wanted = np.concatenate(wanted, axis=1)
    in_blocks, memory = [], models.init_memory(cfg, batch=2, frames=6, tokens_per_frame=3)
    for start in range(0, 6, 2):
        now = slice(start, start + 2)
        step = dict(memory=memory, position=jnp.int32(start))
        in_blocks.append(apply(params, cfg, noisy[:, now], timestep[:, now], text, **step)[0])
        _, memory = apply(
            params, cfg, clean[:, now], 0 * timestep[:, now], text, **step, write=True
        )
    assert error(jnp.concatenate(in_blocks, axis=1), wanted) < 1e-5
    at_once, _ = models.apply_clip(params, cfg, clean, noisy, timestep, text)
    assert error(at_once, wanted) < 1e-5
