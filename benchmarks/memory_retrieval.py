"""How well a layer's memory learns to bring back tokens of an earlier block, by its start.

    python benchmarks/memory_retrieval.py --tokens=512 --head_dim=32 --heads=4 --steps=400
    python benchmarks/memory_retrieval.py --tokens=4680 --head_dim=128 --heads=12 --steps=1200

One layer, trained as in stage 1: q, k and v are given, the gates and the projections P learn.
Block 0 has eight marked tokens among its n; every later block has eight that ask for them, by
a key that fits one of the marked tokens. What softmax would bring back is the value of that token,
and nothing for all others. The loss is the squared error over all tokens over the squared target.
The error is taken at the asking tokens of fresh clips: 1 is that of reading nothing.

Values of marked tokens are new in every clip, so that only memory can tell them. With the memory
emptied before every block but the first (`control`), the same training must stay at 1.
"""

import dataclasses
import functools
import json
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from device_time import describe_device
from flax import nnx

from arl2_jax.config import GatedDeltaConfig, ModelConfig
from arl2_jax.memory import GatedDelta, Projections
from arl2_jax.nn.rope import Rope, axis_widths, rope_angles

_TOKENS = flags.DEFINE_integer("tokens", 512, "Tokens n of a block.")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 32, "Dimensions D of a head.")
_HEADS = flags.DEFINE_integer("heads", 4, "Heads.")
_BLOCKS = flags.DEFINE_integer("blocks", 17, "Blocks of a clip; lags go up to one less.")
_STEPS = flags.DEFINE_integer("steps", 400, "Optimizer steps.")
_RATE = flags.DEFINE_float("learning_rate", 1e-2, "Adam's learning rate.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of weights, markers and clips.")
_STARTS = flags.DEFINE_list("starts", [], "Names to run; by default all of them.")
_CORRELATION = flags.DEFINE_float("correlation", 0.0, "Share of a direction that all keys have.")
_ROPE = flags.DEFINE_bool("rope", False, "Rotate by frame as in three frames a block.")
_DTYPE = flags.DEFINE_string("dtype", None, "Compute type; bfloat16 on GPUs, else float32.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")

MARKED = 8
# Share of a marked key's square that its fellow query has too; the rest is drawn for each token.
MATCH = 0.8
# Trained, as in stage 1.
TRAINED = ("a_proj", "b_proj", "gate_proj", "A_log", "dt_bias", "beta_bias", "phi_q", "phi_k",
           "phi_v")  # fmt: skip
LAGS = (1, 2, 3, 4, 8, 16)


class Start(NamedTuple):
    """A start of the memory.

    Attributes:
      delta: settings that differ from the defaults.
      published: parameters that are put back to their published start.
      memory_init: of the rest.
    """

    delta: Mapping[str, Any] = types.MappingProxyType({})
    published: tuple[str, ...] = ()
    memory_init: str = "by_block"


_DECAY = ("A_log", "dt_bias")
STARTS = {
    "published": Start(memory_init="published"),
    "weak writes": Start(published=(*_DECAY, "phi_v")),
    "weak writes and decay by block": Start(published=("phi_v",)),
    "by_block": Start(),
    "only the block before": Start({"span": "block"}),
    "load 0.05": Start({"write_load": 0.05}),
    "load 0.15": Start({"write_load": 0.15}),
    "load 1": Start({"write_load": 1.0}),
    "strong writes": Start(published=("beta_bias",)),
    "decay in 0.5 to 20 blocks": Start({"time_constants": (0.5, 20.0)}),
    "decay in 20 to 2000 blocks": Start({"time_constants": (20.0, 2000.0)}),
    "no decay": Start({"decay": "none"}),
    "no delta": Start({"rule": "additive"}),
    "beta at most 1": Start({"beta_max": 1.0}),
    "read gain 0.3": Start({"read_gain": 0.3}),
    "read gain 3": Start({"read_gain": 3.0}),
    "load 0.15 and P_v = I": Start({"write_load": 0.15}, ("phi_v",)),
    "load 1 and P_v = I": Start({"write_load": 1.0}, ("phi_v",)),
}


def main(_):
    """Trains every start with every seed, prints a table and writes it as JSON."""
    cfg, rows = _config(), {}
    unknown = [name for name in _STARTS.value if name not in STARTS]
    if unknown:
        raise app.UsageError(f"--starts has {unknown[0]!r}; known are {', '.join(STARTS)}")
    lags = [lag for lag in LAGS if lag < _BLOCKS.value]
    print(f"{'relative error at lag':32}" + "".join(f"{lag:>7}" for lag in lags) + "  seconds")
    for name in _STARTS.value or STARTS:
        runs = [retrieval(cfg, STARTS[name], int(seed)) for seed in _SEEDS.value]
        errors = np.array([[run["error_by_lag"][lag - 1] for lag in lags] for run in runs])
        rows[name] = {"runs": runs, "mean": errors.mean(0).tolist(), "lags": lags}
        spread = errors.max(0) - errors.min(0)
        print(f"{name:32}" + "".join(f"{e:7.3f}" for e in errors.mean(0))
              + f"  {sum(run['seconds'] for run in runs):.1f}"
              + f"  (spread {spread.max():.3f} over {len(runs)} seeds)", flush=True)  # fmt: skip
        if _OUT.value:
            _write(rows)


def _config() -> ModelConfig:
    dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    width = _HEADS.value * _HEAD_DIM.value
    delta = GatedDeltaConfig(block_tokens=_TOKENS.value)
    return ModelConfig(
        dim=width,
        ffn_dim=width,
        num_heads=_HEADS.value,
        num_layers=1,
        lora_rank=1,
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        delta=delta,
    )


def retrieval(cfg: ModelConfig, start: Start, seed: int) -> dict[str, Any]:
    """Trains one layer; returns its error by lag over fresh clips and how long it took."""
    key = jax.random.key(seed)
    module_key, marker_key, train_key, test_key = jax.random.split(key, 4)
    made = dataclasses.replace(
        cfg,
        memory_init=start.memory_init,
        delta=dataclasses.replace(cfg.delta, **start.delta),
    )
    graph, params = _init(made, module_key)
    published = _init(dataclasses.replace(cfg, memory_init="published"), module_key)[1]
    for name in start.published:
        params[name] = published.get(name, jnp.zeros_like(params[name]))
    trained = {name: params.pop(name) for name in TRAINED if name in params}
    markers = _markers(cfg, marker_key)
    optimizer = optax.adam(_RATE.value)

    def read(trained, key):
        clip, target, asking = _clip(cfg, markers, key)
        module = nnx.merge(graph, params | trained)
        value, gate = module.read_clip(clip, _BLOCKS.value, copies=1)
        by_block = lambda x: x.reshape(1, _BLOCKS.value, -1, *x.shape[2:])
        error = by_block(gate * value - target)
        return error, by_block(target), asking

    def loss(trained, key):
        error, target, _ = read(trained, key)
        return jnp.sum(jnp.square(error)) / jnp.sum(jnp.square(target))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, state, key):
        value, gradient = jax.value_and_grad(loss)(trained, key)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(trained, updates), state, value

    @jax.jit
    def test(trained, key):
        error, target, asking = read(trained, key)
        pick = lambda x: jnp.take_along_axis(x, asking[None, :, :, None, None], axis=2)
        return tuple(jnp.sum(jnp.square(pick(x)), axis=(0, 2, 3, 4)) for x in (error, target))

    state = optimizer.init(trained)
    compiled = step.lower(trained, state, train_key).compile()
    began, losses = time.perf_counter(), []
    for i in range(_STEPS.value):
        trained, state, value = compiled(trained, state, jax.random.fold_in(train_key, i))
        if i % max(_STEPS.value // 20, 1) == 0 or i == _STEPS.value - 1:
            losses.append(float(value))
    seconds = time.perf_counter() - began
    sums = [test(trained, jax.random.fold_in(test_key, i)) for i in range(16)]
    error, target = (np.sum(x, axis=0) for x in zip(*jax.device_get(sums), strict=True))
    by_lag = (error[1:] / target[1:]).tolist()
    return {"seed": seed, "error_by_lag": by_lag, "seconds": seconds, "losses": losses}


def _init(cfg: ModelConfig, key):
    make = lambda: GatedDelta(cfg, rngs=nnx.Rngs(key))
    graph = nnx.split(nnx.eval_shape(make))[0]
    return graph, jax.jit(lambda: nnx.to_pure_dict(nnx.split(make())[1]))()


class Markers(NamedTuple):
    """Directions that stay the same over all clips, entries of unit variance."""

    key: jax.Array  # of each marked token, [8, C]
    marked: jax.Array  # in x of a marked token, [C]
    asks: jax.Array  # in x of an asking token, [C]
    common: jax.Array  # in all keys and queries, [C]


def _markers(cfg: ModelConfig, key) -> Markers:
    rows = jax.random.normal(key, (MARKED + 3, cfg.dim))
    return Markers(rows[:MARKED], *rows[MARKED:])


def _clip(cfg: ModelConfig, markers: Markers, key):
    """A clip of one video: projections, targets [1, T, H, D], and asking tokens [blocks, 8]."""
    blocks, n, dtype = _BLOCKS.value, _TOKENS.value, jnp.dtype(cfg.dtype)
    place_key, *noise_keys = jax.random.split(key, 5)
    x, q, k, v = (
        jax.random.normal(jax.random.clone(noise_key), (blocks, n, cfg.dim), dtype)
        for noise_key in noise_keys
    )
    shared = jnp.sqrt(jnp.asarray(_CORRELATION.value, dtype))
    alone = jnp.sqrt(jnp.asarray(1 - _CORRELATION.value, dtype))
    q, k = (shared * markers.common.astype(dtype) + alone * y for y in (q, k))
    draw = lambda key: jax.random.permutation(key, n)[:MARKED]
    places = jax.vmap(draw)(jax.random.split(place_key, blocks))  # marked in block 0, else asking
    rows = jnp.arange(blocks)[:, None]
    mix = lambda y, direction: (MATCH**0.5 * direction + (1 - MATCH) ** 0.5 * y).astype(dtype)
    k = k.at[0, places[0]].set(mix(k[0, places[0]], markers.key))
    q = q.at[rows[1:], places[1:]].set(mix(q[rows[1:], places[1:]], markers.key))
    x = x.at[0, places[0]].set(mix(x[0, places[0]], markers.marked))
    x = x.at[rows[1:], places[1:]].set(mix(x[rows[1:], places[1:]], markers.asks))
    target = jnp.zeros_like(v).at[rows[1:], places[1:]].set(v[0, places[0]])
    flat = lambda y: y.reshape(1, blocks * n, *y.shape[2:])
    heads = lambda y: flat(y).reshape(1, blocks * n, cfg.num_heads, cfg.head_dim)
    scale = jnp.ones(cfg.dim)
    clip = Projections(flat(x), flat(q), flat(k), heads(q), heads(k), heads(v), scale, scale,
                       _rope(cfg) if _ROPE.value else None)  # fmt: skip
    return clip, heads(target).astype(jnp.float32), places


def _rope(cfg: ModelConfig) -> Rope:
    """Rotation by time alone, three frames a block, of as many features as in Wan."""
    frame = 3 * jnp.arange(_TOKENS.value) // _TOKENS.value
    frame = (3 * jnp.arange(_BLOCKS.value)[:, None] + frame).reshape(-1)
    width = axis_widths(cfg.head_dim)[0]
    still = (cfg.head_dim - width) // 2
    angles = jnp.pad(rope_angles(frame, width), ((0, 0), (0, still)))
    return Rope(jnp.cos(angles), jnp.sin(angles))


def _write(rows: dict[str, Any]) -> None:
    shapes = {name: flags.FLAGS[name].value for name in
              ("tokens", "head_dim", "heads", "blocks", "steps", "learning_rate", "correlation",
               "rope")}  # fmt: skip
    result = {
        "what": "relative squared error of what a layer's memory brings back, by lag in blocks",
        "timed": "wall time of the training steps, compilation apart",
        "shapes": shapes | {"dtype": _config().dtype, "marked": MARKED, "test_clips": 16},
        **describe_device(),
        "starts": rows,
    }
    Path(_OUT.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
