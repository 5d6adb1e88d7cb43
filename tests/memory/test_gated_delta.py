"""A hybrid attention layer against its equations, token by token, in float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arl2_jax.models.wan import make_layer
from arl2_jax.nn.positions import video_grid

BLOCKS, ROWS, COLUMNS = 4, 2, 3


def rope(x, first, frames):
    """Rotates interleaved pairs by the position of each token along time, row and column."""
    width = x.shape[-1]
    spatial = 2 * (width // 6)
    grid = np.stack(np.meshgrid(
        first + np.arange(frames), np.arange(ROWS), np.arange(COLUMNS), indexing="ij"
    ), axis=-1).reshape(-1, 3)  # fmt: skip
    angles = np.concatenate(
        [
            np.outer(grid[:, axis], 10000.0 ** (-np.arange(0, size, 2) / size))
            for axis, size in enumerate((width - 2 * spatial, spatial, spatial))
        ],
        axis=1,
    )
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def softplus(x):
    return np.logaddexp(0, x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Reference:
    """The equations of the layer, for one video."""

    def __init__(self, cfg, attention, delta):
        self.cfg = cfg
        self.attention, self.delta = jax.tree.map(
            lambda x: np.asarray(x, np.float64), (attention, delta)
        )
        self.state = np.zeros((cfg.num_heads, cfg.head_dim, cfg.head_dim))

    def heads(self, x):
        return x.reshape(len(x), self.cfg.num_heads, self.cfg.head_dim)

    def linear(self, name, x):
        return x @ self.attention[name]["kernel"] + self.attention[name]["bias"]

    def norm(self, name, x):
        mean = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean + self.cfg.eps) * self.attention[name]["scale"]

    def lora(self, name, x):
        low = self.delta[f"lora_{name}"]
        return x @ low["a"] @ low["b"] * self.cfg.lora_alpha / self.cfg.lora_rank

    def memory_heads(self, name, x):
        return np.einsum("nhd,hde->nhe", self.heads(x), self.delta[f"phi_{name}"])

    def block(self, x, first, *, write):
        """Output of a block, which is remembered if `write`."""
        frames = len(x) // (ROWS * COLUMNS)
        unit = lambda y: y / np.sqrt(np.sum(y * y, axis=-1, keepdims=True))
        q_raw, k_raw, v_raw = (self.linear(name, x) for name in "qkv")
        q = rope(self.heads(self.norm("norm_q", q_raw)), first, frames)
        k = rope(self.heads(self.norm("norm_k", k_raw)), first, frames)
        scores = np.exp(np.einsum("nhd,mhd->hnm", q, k) / np.sqrt(self.cfg.head_dim))
        weights = scores / scores.sum(-1, keepdims=True)
        local = np.einsum("hnm,mhd->nhd", weights, self.heads(v_raw))
        qm = self.memory_heads("q", self.norm("norm_q", q_raw + self.lora("q", x)))
        km = self.memory_heads("k", self.norm("norm_k", k_raw + self.lora("k", x)))
        vm = self.memory_heads("v", v_raw + self.lora("v", x))
        qm, km = (unit(rope(y, first, frames)) for y in (qm, km))
        read = np.einsum("nhk,hkv->nhv", qm, self.state) / np.sqrt(self.cfg.head_dim)
        gate = sigmoid(x @ self.delta["gate_proj"]["kernel"])[..., None]
        out = self.linear("o", (local + gate * read).reshape(len(x), -1))
        if write:
            steps = softplus(x @ self.delta["a_proj"]["kernel"] + self.delta["dt_bias"])
            decay = np.exp(-np.exp(self.delta["A_log"]) * steps)
            beta = 2 * sigmoid(x @ self.delta["b_proj"]["kernel"])
            for a, b, k, v in zip(decay, beta, km, vm, strict=True):
                for h in range(self.cfg.num_heads):
                    S = a[h] * self.state[h]
                    self.state[h] = S + b[h] * np.outer(k[h], v[h] - S.T @ k[h])
        return out


@pytest.mark.parametrize(("heads", "width"), [(2, 16), (3, 10)])
def test_layer_is_its_equations(cfg, make_params, error, heads, width):
    cfg = dataclasses.replace(cfg, dim=heads * width, num_heads=heads, hybrid_layers=(0,))
    weights = make_params(cfg)["blocks"]["0"]
    layer = make_layer(cfg, 0, weights)
    rng = np.random.default_rng(1)
    shape = (BLOCKS, 1, cfg.frames_per_block * ROWS * COLUMNS, cfg.dim)
    clean, noisy = rng.standard_normal((2, *shape), np.float32)

    @jax.jit
    def step(x, state, first):
        p = layer.self_attn.project(x)
        grid = video_grid(first, cfg.frames_per_block, ROWS, COLUMNS, cfg.head_dim)
        out, aux = layer.memory.attend(p, state, grid)
        return layer.self_attn.output(out), layer.memory.write(p, aux, state, grid)

    reference = Reference(cfg, weights["self_attn"], weights["delta"])
    state = layer.memory.init_state(1)
    for i in range(BLOCKS):
        first = 1000 + i * cfg.frames_per_block
        # float32 products and sums of up to dim terms against float64.
        found, _ = step(noisy[i], state, jnp.int32(first))
        assert error(found[0], reference.block(noisy[i, 0], first, write=False)) < 2e-6
        found, state = step(clean[i], state, jnp.int32(first))
        assert error(found[0], reference.block(clean[i, 0], first, write=True)) < 2e-6
        assert error(state[0], reference.state) < 2e-6


def test_initial_values(cfg):
    many = dataclasses.replace(cfg, dim=6 * 512, num_heads=512, ffn_dim=1)
    from arl2_jax.memory import GatedDelta

    graph_and_state = jax.jit(
        lambda: nnx.to_pure_dict(
            nnx.split(GatedDelta(many.delta, many.attention, rngs=nnx.Rngs(0)))[1]
        )
    )
    delta = jax.device_get(graph_and_state())
    rates, steps = np.exp(delta["A_log"]), softplus(delta["dt_bias"])
    assert 0 < rates.min() < 1 < 15 < rates.max() <= 16
    np.testing.assert_allclose(rates.mean(), 8, rtol=0.1)  # uniform; 512 draws
    assert 0.99e-3 < steps.min() < 2e-3 < 5e-2 < steps.max() < 1.01e-1
    np.testing.assert_allclose(np.exp(np.log(steps).mean()), 1e-2, rtol=0.2)  # log-uniform
    for name in "qkv":
        np.testing.assert_array_equal(delta[f"phi_{name}"], np.tile(np.eye(6), (512, 1, 1)))
        assert not np.any(delta[f"lora_{name}"]["b"])
        bound = many.dim**-0.5
        assert 0.9 * bound < np.abs(delta[f"lora_{name}"]["a"]).max() <= bound
    bound = 2**-2.5 * np.sqrt(6 / (many.dim + many.num_heads))
    for name in ("a_proj", "b_proj", "gate_proj"):
        assert 0.9 * bound < np.abs(delta[name]["kernel"]).max() <= bound
        assert set(delta[name]) == {"kernel"}  # no bias
