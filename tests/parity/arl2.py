"""A converted layer in PyTorch, token by token, under ARL2's own names and shapes.

It follows the published equations (arXiv 2605.16579) and shares nothing with ours; float64.
"""

import torch
from torch.nn import functional as F


class HybridLayer:
    """One layer: calling it gives the tokens after a block, `write` the state after it.

    x is [B, n, C], the modulation of each token [B, n, 6, C], embedded text [B, L, C], the complex
    rotary factors [n, D / 2], and the state [B, H, D, D] with keys in its rows.

    Args:
      tensors: weights of a model by name, float32 arrays.
      index: which of its layers.
      heads: attention heads H.
      alpha: low-rank updates are scaled by alpha / rank.
    """

    def __init__(self, tensors, index, *, heads, alpha, eps=1e-6):
        start = f"blocks.{index}."
        own = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
        self.weights = {name: torch.tensor(x, dtype=torch.float64) for name, x in own.items()}
        self.heads, self.alpha, self.eps = heads, alpha, eps

    def __call__(self, x, modulation, text, turns, state):
        _, _, gate, shift, scale, ffn_gate = self.modulation(modulation)
        x = x + gate * self.self_attention(self.attention_input(x, modulation), turns, state)
        x = x + self.cross_attention(self.layer_norm(x, "norm3"), text)
        h = self.layer_norm(x) * (1 + scale) + shift
        h = F.gelu(self.linear("ffn.0.linear", h) + self.lora("ffn.0.lora_", h), approximate="tanh")
        h = self.linear("ffn.2.linear", h) + self.lora("ffn.2.lora_", h)
        return x + ffn_gate * h

    def write(self, x, modulation, turns, state):
        x = self.attention_input(x, modulation)
        _, k, v = self.memory_projections(x, turns)
        a_log, dt_bias = self.weights["self_attn.A_log"], self.weights["self_attn.dt_bias"]
        g = -torch.exp(a_log) * F.softplus(self.linear("self_attn.a_proj", x) + dt_bias)
        a, b = torch.exp(g), 2 * torch.sigmoid(self.linear("self_attn.b_proj", x))  # [B, n, H]
        for t in range(x.shape[1]):
            state = a[:, t, :, None, None] * state
            known = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
            change = b[:, t, :, None] * (v[:, t] - known)
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], change)
        return state

    def self_attention(self, x, turns, state):
        q, k, v = (self.linear(f"self_attn.{letter}", x) for letter in "qkv")
        q, k = self.rms_norm(q, "self_attn.norm_q"), self.rms_norm(k, "self_attn.norm_k")
        intra = attend(rotate(self.split(q), turns), rotate(self.split(k), turns), self.split(v))
        qm, _, _ = self.memory_projections(x, turns)
        inter = torch.einsum("bnhk,bhkv->bnhv", qm, state) / qm.shape[-1] ** 0.5
        gate = torch.sigmoid(self.linear("self_attn.gate_proj", x))[..., None]
        return self.linear("self_attn.o", (intra + gate * inter).flatten(2))

    def memory_projections(self, x, turns):
        q, k, v = (
            self.linear(f"self_attn.{letter}", x) + self.lora(f"self_attn.lora_{letter}_", x)
            for letter in "qkv"
        )
        q, k = self.rms_norm(q, "self_attn.norm_q"), self.rms_norm(k, "self_attn.norm_k")
        q, k, v = self.phi("q", q), self.phi("k", k), self.phi("v", v)
        return unit(rotate(q, turns)), unit(rotate(k, turns)), v

    def cross_attention(self, x, text):
        q = self.rms_norm(self.linear("cross_attn.q", x), "cross_attn.norm_q")
        k = self.rms_norm(self.linear("cross_attn.k", text), "cross_attn.norm_k")
        out = attend(self.split(q), self.split(k), self.split(self.linear("cross_attn.v", text)))
        return self.linear("cross_attn.o", out.flatten(2))

    def attention_input(self, x, modulation):
        shift, scale = self.modulation(modulation)[:2]
        return self.layer_norm(x) * (1 + scale) + shift

    def modulation(self, modulation):
        return (self.weights["modulation"] + modulation).unbind(2)

    def linear(self, name, x):
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def lora(self, name, x):
        a, b = self.weights[f"{name}A"], self.weights[f"{name}B"]
        return x @ a @ b * (self.alpha / a.shape[1])

    def phi(self, letter, x):
        """The projection per head, a convolution of width 1 in as many groups as heads."""
        weight = self.weights[f"self_attn.phi_{letter}.weight"]
        return self.split(F.conv1d(x.mT, weight, groups=self.heads).mT)

    def rms_norm(self, x, name):
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.eps)

    def layer_norm(self, x, name=""):
        affine = [self.weights.get(f"{name}.{part}") for part in ("weight", "bias")]
        return F.layer_norm(x, x.shape[-1:], *affine, self.eps)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1))


def attend(q, k, v):
    """Softmax attention of [B, n, H, D]."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def unit(x):
    """Vectors of length 1."""
    return x / x.norm(dim=-1, keepdim=True)


def rotate(x, turns):
    """Turns the interleaved pairs of every head."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2)


def rotary_factors(first, frames, rows, columns, width):
    """exp(i angle) of frame, row and column: 22, 21 and 21 pairs of a head of 128."""
    spatial = 2 * (width // 6)
    places = (range(first, first + frames), range(rows), range(columns))
    grids = torch.meshgrid(*(torch.tensor([*p]).double() for p in places), indexing="ij")
    angles = [
        grid.flatten()[:, None] * 10000.0 ** (-torch.arange(0, d, 2).double() / d)
        for grid, d in zip(grids, (width - 2 * spatial, spatial, spatial), strict=True)
    ]
    angles = torch.cat(angles, dim=1)
    return torch.polar(torch.ones_like(angles), angles)
