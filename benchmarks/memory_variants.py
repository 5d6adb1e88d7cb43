"""Prototypes of memories that might keep more, each a memory for `memory_retrieval.py`.

python benchmarks/memory_variants.py --variants=base,pool_2 --conditions=standard,marked_32
"""

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import memory_retrieval as bench
import numpy as np
import optax
from absl import app, flags
from device_time import describe_device
from flax import nnx
from memory_retrieval import Start

from arl2_jax.memory import GatedDelta
from arl2_jax.memory.gated_delta import _unit
from arl2_jax.memory.recurrence import Writes, _additive
from arl2_jax.nn.rope import THETA, Rope, axis_widths, rotate

_VARIANTS = flags.DEFINE_list("variants", [], "Names; by default all of them.")
_CONDITIONS = flags.DEFINE_list("conditions", [], "Names; by default the five main ones.")
_RESULTS = flags.DEFINE_string("results", None, "JSON file to add to.")

LOAD = 0.15


def states_before(settings, w, state, blocks, chunk=32):
    """The package's states by fewer and larger operations, which compile in a third of the time."""
    batch, heads = w.k.shape[0], w.k.shape[2]
    if settings.rule == "additive":
        split = Writes(*(x.reshape(batch, blocks, -1, *x.shape[2:]) for x in w))
        after = _additive(split, state)
        return jnp.concatenate([state[:, None], after], axis=1)[:, :-1]
    fold = lambda x: jnp.moveaxis(x.reshape(batch, -1, chunk, *x.shape[2:]), 3, 1)
    k, v, g, beta = map(fold, w)
    total = jnp.cumsum(g, axis=-1)
    lower = jnp.tril(jnp.ones((chunk, chunk)), -1)
    ratio = jnp.exp(jnp.where(lower > 0, total[..., :, None] - total[..., None, :], 0.0))
    overlap = lower * beta[..., None] * ratio * jnp.einsum("...ik,...jk->...ij", k, k)
    right = jnp.concatenate([jnp.exp(total)[..., None] * k, v], axis=-1) * beta[..., None]
    # (I + L)^-1 = (I - L) (I + L^2) (I + L^4) ...; L is nilpotent.
    power, inverse = -overlap, jnp.eye(chunk) - overlap
    for _ in range(4):
        power = power @ power
        inverse = inverse + inverse @ power
    solved = inverse @ right
    left = jnp.exp(total[..., -1:] - total)[..., None] * k
    moves = jnp.einsum("...ik,...ij->...kj", left, solved)
    erased, added = moves[..., : k.shape[-1]], moves[..., k.shape[-1] :]
    kept = jnp.exp(total[..., -1])

    def step(state, inputs):
        kept, erased, added = inputs
        return kept[..., None, None] * state - erased @ state + added, state

    lead = lambda x: jnp.moveaxis(x, 2, 0)
    last, before = jax.lax.scan(step, state, (lead(kept), lead(erased), lead(added)))
    before = jnp.concatenate([before, last[None]])[:: len(before) // blocks]
    return jnp.moveaxis(before, 0, 1)[:, : blocks if blocks > 1 else None]


def state_after(settings, w, state):
    """The state after one block."""
    return states_before(settings, w, state, 1)[:, -1]


class Variant(GatedDelta):
    """A gated delta memory with one or more of the changes that `VARIANTS` names."""

    def __init__(self, cfg, *, rngs, pool=1, chosen=False, compete=False, novelty=None, slow=0,
                 features=None, wide=1, mesa=False, read_norm=None, gate_bias=None):  # fmt: skip
        super().__init__(cfg, rngs=rngs)
        heads = cfg.num_heads
        self.pool, self.chosen, self.compete, self.novelty = pool, chosen, compete, novelty
        self.slow, self.features, self.wide, self.mesa = slow, features, wide, mesa
        if compete:
            self.log_load = nnx.Param(jnp.full(heads, jnp.log(LOAD)))
        if mesa:
            self.log_ridge = nnx.Param(jnp.full(heads, jnp.log(LOAD)))
        self.norm = read_norm is not None
        if self.norm:
            self.read_scale = nnx.Param(jnp.full(heads, read_norm))
        if gate_bias is not None:
            self.gate_bias = nnx.Param(jnp.full(heads, gate_bias))

    def keys_of(self, x, rope):
        """Rotated, widened, of unit length, through the feature map."""
        if rope is not None and self.slow:
            pairs = axis_widths(self.head_dim)[0] // 2
            rate = THETA ** (-jnp.arange(pairs) / pairs)
            keep = rate < 2 * jnp.pi / self.slow
            keep = jnp.pad(keep, (0, rope.cos.shape[-1] - pairs), constant_values=True)
            rope = Rope(jnp.where(keep, rope.cos, 1.0), jnp.where(keep, rope.sin, 0.0))
        x = rotate(x, rope)
        if self.wide > 1:
            x = jnp.concatenate([jnp.roll(x, -i, axis=2) for i in range(self.wide)], axis=-1)
        x = _unit(x)
        if self.features == "relu":
            return jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
        if self.features == "products":
            return _unit(x * jnp.roll(x, 1, axis=-1) * 30)
        if self.features == "square":
            return _unit(x * jnp.abs(x) * 30)
        if self.features == "dpfp":
            x = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
            return _unit(x * jnp.roll(x, 1, axis=-1) * 30)
        return x

    def raw_writes(self, p, blocks):
        """Writes of all tokens, pooled and weighed."""
        plain = super().writes(p)
        _, k, v = self._memory_heads(p)
        k, g, beta = self.keys_of(k, p.rope), plain.g, plain.beta
        logit = self.b_proj(p.x)
        batch, time, heads = logit.shape
        if self.compete:
            by_block = logit.reshape(batch, blocks, -1, heads)
            load = jnp.exp(self.log_load[...]) * self.head_dim
            strong = load * jax.nn.softmax(by_block, axis=2)
            # At most 1, with a slope everywhere.
            beta = -jnp.expm1(-strong).reshape(logit.shape)
        if self.pool > 1:
            group = lambda x: x.reshape(batch, time // self.pool, self.pool, *x.shape[2:])
            if self.chosen:
                weights = jax.nn.softmax(group(logit), axis=2)
                level = jax.nn.logsumexp(group(logit), axis=2) - jnp.log(self.pool)
                beta = self.settings.beta_max * jax.nn.sigmoid(level + self.beta_bias[...])
            else:
                weights = jnp.full((batch, time // self.pool, self.pool, heads), 1 / self.pool)
                beta = jnp.mean(group(beta), axis=2)
            mean = lambda x: jnp.einsum("bnphd,bnph->bnhd", group(x), weights)
            k, v, g = _unit(mean(k)), mean(v), jnp.sum(group(g), axis=2)
        return Writes(k, v, g, beta)

    def states_of(self, p, blocks):
        """States before all blocks."""
        w = self.raw_writes(p, blocks)
        batch, heads, width = w.k.shape[0], w.k.shape[2], w.k.shape[3]
        if self.mesa:
            both = w._replace(v=jnp.concatenate([w.v, w.k], axis=-1))
            split = Writes(*(x.reshape(batch, blocks, -1, *x.shape[2:]) for x in both))
            empty = jnp.zeros((batch, heads, width, split.v.shape[-1]), jnp.float32)
            after = _additive(split, empty)
            states = jnp.concatenate([empty[:, None], after], axis=1)[:, :-1]
            value, gram = states[..., : w.v.shape[-1]], states[..., w.v.shape[-1] :]
            ridge = jnp.exp(self.log_ridge[...])[:, None, None]
            factor = jax.scipy.linalg.cho_factor(gram + ridge * jnp.eye(width))
            return ridge * jax.scipy.linalg.cho_solve(factor, value)
        empty = jnp.zeros((batch, heads, width, w.v.shape[-1]), jnp.float32)
        if not self.novelty:
            return states_before(self.settings, w, empty, blocks)

        def block(state, inputs):
            k, v, g, beta = inputs
            held = jnp.einsum("bhkv,bnhk->bnhv", state, k)
            size = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=-1) + 1e-6)
            if "norm" in self.novelty:
                new = size(v - held) / size(v)
            else:
                new = 1 - jax.nn.relu(jnp.sum(v * held, axis=-1) / (size(v) * size(held)))
            if "stopped" in self.novelty:
                new = jax.lax.stop_gradient(new)
            beta = beta * jnp.clip(new, 0, 1)
            after = state_after(self.settings, Writes(k, v, g, beta), state)
            return after, state

        split = (x.reshape(batch, blocks, -1, *x.shape[2:]).swapaxes(0, 1) for x in w)
        return jax.lax.scan(block, empty, tuple(split))[1].swapaxes(0, 1)

    def read_clip(self, p, blocks, copies):
        """As the base does."""
        states = self.states_of(p, blocks)
        q = self.keys_of(self._memory_heads(p)[0], p.rope)
        q = q.reshape(len(q), blocks, -1, *q.shape[2:])
        read = jnp.einsum("bmhkv,bmnhk->bmnhv", states, q) * self.head_dim**-0.5
        read = read.reshape(p.v.shape)
        if self.norm:
            size = jnp.mean(jnp.square(read), axis=-1, keepdims=True)
            read = self.read_scale[...][:, None] * read * jax.lax.rsqrt(size + 1e-6)
        logit = self.gate_proj(p.x)
        if hasattr(self, "gate_bias"):
            logit = logit + self.gate_bias[...]
        return read, jax.nn.sigmoid(logit)[..., None]


bench.TRAINED = (*bench.TRAINED, "log_load", "log_ridge", "read_scale", "gate_bias")


def _variant(delta=None, **changes) -> Start:
    return Start(delta or {}, memory=functools.partial(Variant, **changes))


VARIANTS = {
    "base": _variant(),
    "pool_2": _variant({"write_load": 2 * LOAD}, pool=2),
    "pool_4": _variant({"write_load": 4 * LOAD}, pool=4),
    "pool_4_chosen": _variant({"write_load": 4 * LOAD}, pool=4, chosen=True),
    "compete": _variant(compete=True),
    "novelty_norm": _variant(novelty="norm stopped"),
    "novelty_cosine": _variant(novelty="cosine stopped"),
    "novelty_cosine_open": _variant(novelty="cosine"),
    "slow_40": _variant(slow=40),
    "features_relu": _variant(features="relu"),
    "features_products": _variant(features="products"),
    "features_square": _variant(features="square"),
    "features_dpfp": _variant(features="dpfp"),
    "wide_2": _variant(wide=2),
    "mesa": _variant(mesa=True),
    "read_norm": _variant(read_norm=0.3),
    "gate_bias_0": _variant(gate_bias=0.0),
    "gate_bias_-2": _variant(gate_bias=-2.0),
    "compete_gate_bias_-2": _variant(compete=True, gate_bias=-2.0),
    "no_delta": _variant({"rule": "additive"}),
}
DEFAULTS = {"marked": 8, "new_keys": False, "apart": False, "correlation": 0.0, "offset": 0.0, "repeated": 0.0, "rope": False,
            "loss": "asking"}  # fmt: skip
TEST_CLIPS = 24
CONDITIONS = {
    "standard": {},
    "apart": {"apart": True, "new_keys": True},
    "new_keys": {"new_keys": True},
    "new_keys_32": {"new_keys": True, "marked": 32},
    "marked_32": {"marked": 32},
    "loss_all": {"loss": "all"},
    "correlation_0.5": {"correlation": 0.5},
    "rope": {"rope": True},
    "loss_all_new_keys": {"loss": "all", "new_keys": True},
    "loss_all_apart": {"loss": "all", "new_keys": True, "apart": True},
    "loss_all_offset": {"loss": "all", "offset": 0.5},
    "repeated_0.9": {"repeated": 0.9},
    "marked_64": {"marked": 64},
}


def draw_clips(cfg, seed: int, condition: str, count: int) -> list:
    """The benchmark's clips with what a loss needs: rotation always given, masks of tokens."""
    for name, value in (DEFAULTS | CONDITIONS[condition]).items():
        flags.FLAGS[name].value = value
    _, marker_key, train_key, _ = jax.random.split(jax.random.key(seed), 4)
    markers = bench.draw_markers(cfg, marker_key)
    blocks, tokens = flags.FLAGS.blocks, flags.FLAGS.tokens

    @jax.jit
    def draw(key):
        clip, target, asking = bench.draw_clip(cfg, markers, key)
        if clip.rope is None:
            still = jnp.zeros((blocks * tokens, cfg.head_dim // 2))
            clip = clip._replace(rope=Rope(still + 1, still))
        mask = jnp.zeros((blocks, tokens)).at[jnp.arange(blocks)[:, None], asking].set(1)
        counted = jnp.ones_like(mask) if flags.FLAGS.loss == "all" else mask
        return clip, target, mask, counted

    return [draw(jax.random.fold_in(train_key, i)) for i in range(count)]


@functools.cache
def make_step(cfg, memory):
    """Compiles the training step, which is the same under all conditions."""
    graph = nnx.split(nnx.eval_shape(lambda: memory(cfg, rngs=nnx.Rngs(0))))[0]
    blocks = flags.FLAGS.blocks
    optimizer = optax.adam(flags.FLAGS.learning_rate)

    def loss(trained, params, drawn):
        clip, target, mask, counted = drawn
        read, gate = nnx.merge(graph, params | trained).read_clip(clip, blocks, copies=1)
        square = lambda x: jnp.sum(jnp.square(x), axis=(0, 2, 3)).reshape(blocks, -1)
        error, wanted = square(gate * read - target), square(target)
        asked = jnp.sum(mask * error, axis=1)[1:], jnp.sum(mask * wanted, axis=1)[1:]
        return jnp.sum(counted * error) / jnp.sum(wanted), asked

    @jax.jit
    def step(trained, state, params, drawn):
        (value, asked), gradient = jax.value_and_grad(loss, has_aux=True)(trained, params, drawn)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(trained, updates), state, value, asked

    return optimizer, step


_COMPILED = {}


def compiled(step, *arguments):
    """Compiles a step once for all conditions."""
    if step not in _COMPILED:
        _COMPILED[step] = step.lower(*arguments).compile()
    return _COMPILED[step]


def retrieval(cfg, start: Start, seed: int, clips: list) -> dict[str, Any]:
    """Trains one layer; the error is that of the last fresh clips before each is learned from."""
    module_key = jax.random.split(jax.random.key(seed), 4)[0]
    made = dataclasses.replace(
        cfg, memory_init="by_block", delta=dataclasses.replace(cfg.delta, **start.delta)
    )
    params = jax.tree.map(np.asarray, bench.initial_params(made, module_key, start.memory))
    trained = {name: params.pop(name) for name in bench.TRAINED if name in params}
    optimizer, step = make_step(
        dataclasses.replace(
            cfg, memory_init="by_block", delta=dataclasses.replace(cfg.delta, rule=made.delta.rule)
        ),
        start.memory,
    )
    # Through NumPy: arrays of weak types would be compiled for again.
    state = jax.tree.map(np.asarray, optimizer.init(trained))
    step = compiled(step, trained, state, params, clips[0])
    sums, losses = [], []
    for i, drawn in enumerate(clips):
        trained, state, value, asked = step(trained, state, params, drawn)
        if i >= len(clips) - TEST_CLIPS:
            sums.append(asked)
        if i % max(len(clips) // 10, 1) == 0 or i == len(clips) - 1:
            losses.append(float(value))
    error, wanted = (np.sum(x, axis=0) for x in zip(*jax.device_get(sums), strict=True))
    names = ("log_load", "log_ridge", "read_scale", "gate_bias", "beta_bias")
    learned = {n: np.asarray(trained[n]).tolist() for n in names if n in trained}
    return {"seed": seed, "error_by_lag": (error / wanted).tolist(), "losses": losses,
            "learned": learned}  # fmt: skip


def main(_):
    """Runs every variant under every condition and adds what it finds to the file."""
    path = Path(_RESULTS.value)
    found = json.loads(path.read_text()) if path.exists() else describe_device() | {"runs": []}
    cfg = bench._config()
    for condition in _CONDITIONS.value or list(CONDITIONS)[:5]:
        for seed in map(int, flags.FLAGS.seeds):
            done = {r["variant"] for r in found["runs"]
                    if (r["condition"], r["seed"]) == (condition, seed)}  # fmt: skip
            names = [name for name in _VARIANTS.value or VARIANTS if name not in done]
            clips = draw_clips(cfg, seed, condition, flags.FLAGS.steps) if names else []
            for name in names:
                began = time.perf_counter(), time.process_time()
                run = retrieval(cfg, VARIANTS[name], seed, clips)
                wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
                errors = " ".join(f"{e:.3f}" for e in run["error_by_lag"])
                print(f"{condition:16} {name:20} {seed}  {errors}  {run['losses'][-1]:.3f} "
                      f"{wall:.0f} s, {cpu:.0f} s of CPU", flush=True)  # fmt: skip
                found["runs"].append({"variant": name, "condition": condition, **run})
                path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
