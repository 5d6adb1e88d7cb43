"""How well a layer's memory learns to retrieve tokens of an earlier block, by its start.

    python benchmarks/memory_retrieval.py --tokens=512 --head_dim=32 --heads=4 --steps=400
    python benchmarks/memory_retrieval.py --tokens=4680 --head_dim=128 --heads=12 --steps=1200

One layer, trained as in stage 1: q, k and v are given, the gates and the projections P learn.
Block 0 has marked tokens among its n; every later block has as many querying tokens, each with the
key of a marked token. The target is what softmax would retrieve: the value of the marked token, and
zero for all other tokens. The loss is the squared error of the querying tokens, or of all (--loss),
over the squared target. The error is measured at the querying tokens of fresh clips: reading zeros
gives 1.

Values of marked tokens are new in every clip, so that only memory has them. Where every block sees
only the block before it ("only the block before"), lags above 1 must stay at 1.

Settings that separate memories: as many marked tokens as a head has dimensions (--marked) fill a
state; --loss=all asks all other tokens to read nothing, which needs a gate that can close, and
--offset gives inputs the constant direction that normalized and modulated inputs have;
--correlation makes keys alike; --new_keys draws the keys of marked tokens for each clip,
so that P cannot learn them; --apart marks different tokens for each head, as heads that
attend to different things; --repeated makes a share of the tokens a still background; --rope
turns keys by frame.
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
from arl2_jax.nn.positions import given_rotations
from arl2_jax.nn.rope import Rope, axis_widths, rope_angles

_TOKENS = flags.DEFINE_integer("tokens", 512, "Tokens n of a block.")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 32, "Dimensions D of a head.")
_HEADS = flags.DEFINE_integer("heads", 4, "Heads.")
_BLOCKS = flags.DEFINE_integer("blocks", 17, "Blocks of a clip; lags go up to one less.")
_STEPS = flags.DEFINE_integer("steps", 400, "Optimizer steps.")
_RATE = flags.DEFINE_float("learning_rate", 1e-2, "Adam's learning rate.")
_GATE_RATE = flags.DEFINE_float(
    "gate_rate", 1.0, "Learning-rate factor of the projections to decay, strength and gate."
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of weights, markers and clips.")
_STARTS = flags.DEFINE_list("starts", [], "Names to run; by default all of them.")
_MARKED = flags.DEFINE_integer("marked", 8, "Marked tokens, and those that ask in a later block.")
_share = functools.partial(flags.DEFINE_float, default=0.0, lower_bound=0.0, upper_bound=1.0)
_CORRELATION = _share("correlation", help="Share of a direction that all keys have.")
_OFFSET = _share("offset", help="Share of a direction that all inputs x have.")
_NEW_KEYS = flags.DEFINE_bool("new_keys", False, "Draw the keys of marked tokens for each clip.")
_APART = flags.DEFINE_bool("apart", False, "Mark different tokens for each head.")
_REPEATED = _share("repeated", help="Share of tokens that are the same in all blocks.")
_ROPE = flags.DEFINE_bool("rope", False, "Rotate by frame as in three frames a block.")
_LOSS = flags.DEFINE_enum(
    "loss", "asking", ["asking", "all"], "Tokens that the loss counts; all others should read 0."
)
_DTYPE = flags.DEFINE_string("dtype", None, "Compute type; bfloat16 on GPUs, else float32.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")

# Share of a marked key's square that its fellow query has too; the rest is drawn for each token.
MATCH = 0.8
# Trained, as in stage 1.
TRAINED = ("a_proj", "b_proj", "gate_proj", "A_log", "dt_bias", "beta_bias", "phi_q", "phi_k",
           "phi_v")  # fmt: skip
GATES = ("a_proj", "b_proj", "gate_proj")
LAGS = (1, 2, 3, 4, 8, 16)
_TEST_CLIPS = 16


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
    "weak writes": Start({"write_load": 0.5}, (*_DECAY, "phi_v")),
    "weak writes and decay by block": Start({"write_load": 0.5}, ("phi_v",)),
    "by_block": Start(),
    "only the block before": Start({"span": "block"}),
    "load 0.05": Start({"write_load": 0.05}),
    "load 0.5": Start({"write_load": 0.5}),
    "load 0.5 and read gain 1": Start({"write_load": 0.5, "read_gain": 1.0}),
    "load 1": Start({"write_load": 1.0}),
    "strong writes": Start(published=("beta_bias",)),
    "read gain 0.1": Start({"read_gain": 0.1}),
    "read gain 1": Start({"read_gain": 1.0}),
    "decay in 2 to 200 blocks": Start({"time_constants": (2.0, 200.0)}),
    "decay in 8 to 200 blocks": Start({"time_constants": (8.0, 200.0)}),
    "decay in 0.5 to 20 blocks": Start({"time_constants": (0.5, 20.0)}),
    "decay in 20 to 2000 blocks": Start({"time_constants": (20.0, 2000.0)}),
    "no decay": Start({"decay": "none"}),
    "no delta": Start({"rule": "additive"}),
    "beta at most 1": Start({"beta_max": 1.0}),
}


def main(_):
    """Train every start with every seed, print a table and write it as JSON."""
    cfg, rows = _config(), {}
    unknown = [name for name in _STARTS.value if name not in STARTS]
    if unknown:
        raise app.UsageError(f"--starts has {unknown[0]!r}; known are {', '.join(STARTS)}")
    if (marked := _MARKED.value * (_HEADS.value if _APART.value else 1)) > _TOKENS.value:
        raise app.UsageError(f"{marked} marked tokens do not fit --tokens={_TOKENS.value}")
    lags = [lag for lag in LAGS if lag < _BLOCKS.value]
    print(f"{'relative error at lag':32}" + "".join(f"{lag:>7}" for lag in lags) + "  seconds")
    for name in _STARTS.value or STARTS:
        runs = [retrieval(cfg, STARTS[name], int(seed)) for seed in _SEEDS.value]
        errors = np.array([[run["error_by_lag"][lag - 1] for lag in lags] for run in runs])
        rows[name] = {
            "settings": _settings(cfg, STARTS[name]),
            "lags": lags,
            "mean": errors.mean(0).tolist(),
            "runs": runs,
        }
        spread = errors.max(0) - errors.min(0)
        print(f"{name:32}" + "".join(f"{e:7.3f}" for e in errors.mean(0))
              + f"  {sum(run['seconds'] for run in runs):.1f}"
              + f"  (spread {spread.max():.3f} over {len(runs)} seeds)"
              + f"  heads lost {[_lost_heads(run) for run in runs]}", flush=True)  # fmt: skip
        if _OUT.value:
            _write(rows)


def _lost_heads(run: dict[str, Any]) -> int:
    """Heads that bring back less than half."""
    return sum(error > 0.5 for error in run["error_by_head"])


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


def _settings(cfg: ModelConfig, start: Start) -> dict[str, Any]:
    """Return all settings of the start, independent of defaults."""
    delta = dataclasses.asdict(dataclasses.replace(cfg.delta, **start.delta))
    return {"memory_init": start.memory_init, "published": start.published, "delta": delta}


def retrieval(cfg: ModelConfig, start: Start, seed: int) -> dict[str, Any]:
    """Train one layer; return its error by lag over fresh clips and how long it took."""
    module_key, marker_key, train_key, test_key = jax.random.split(jax.random.key(seed), 4)
    delta = dataclasses.replace(cfg.delta, **start.delta)
    made = dataclasses.replace(cfg, memory_init=start.memory_init, delta=delta)
    params = initial_params(made, module_key)
    published = initial_params(dataclasses.replace(cfg, memory_init="published"), module_key)
    for name in start.published:
        params[name] = published.get(name, jnp.zeros_like(params[name]))
    trained = {name: params.pop(name) for name in TRAINED if name in params}
    programs = make_programs(dataclasses.replace(made, delta=_without_initial_values(delta)))
    markers = draw_markers(cfg, marker_key)

    state = programs.optimizer.init(trained)
    programs.test(trained, params, markers, test_key)  # compiles
    compiled = programs.step.lower(trained, state, params, markers, train_key).compile()
    began, losses = time.perf_counter(), []
    for i in range(_STEPS.value):
        key = jax.random.fold_in(train_key, i)
        trained, state, value = compiled(trained, state, params, markers, key)
        if i % max(_STEPS.value // 20, 1) == 0 or i == _STEPS.value - 1:
            losses.append(float(value))
    seconds = time.perf_counter() - began
    keys = (jax.random.fold_in(test_key, i) for i in range(_TEST_CLIPS))
    sums = jax.device_get([programs.test(trained, params, markers, key) for key in keys])
    error, target = (np.sum(x, axis=0) for x in zip(*sums, strict=True))
    over = lambda axis: (error[1:].sum(axis) / target[1:].sum(axis)).tolist()
    errors = {"error_by_lag": over(1), "error_by_head": over(0)}
    return {"seed": seed} | errors | {"seconds": seconds, "losses": losses}


def _without_initial_values(delta: GatedDeltaConfig) -> GatedDeltaConfig:
    """The settings that a compiled program depends on: starts that differ in values share one."""
    named = ("rule", "decay", "beta_max", "read", "span")
    return GatedDeltaConfig(**{name: getattr(delta, name) for name in named}, block_tokens=1)


class Programs(NamedTuple):
    """Compiled functions of a layer's training."""

    optimizer: optax.GradientTransformation
    step: Any
    test: Any


@functools.lru_cache
def make_programs(cfg: ModelConfig) -> Programs:
    """Make the training step and the test, both jitted."""
    make = lambda: GatedDelta(cfg.delta, cfg.attention, rngs=nnx.Rngs(0))
    graph = nnx.split(nnx.eval_shape(make))[0]
    optimizer = optax.partition(
        {"gates": optax.adam(_RATE.value * _GATE_RATE.value), "rest": optax.adam(_RATE.value)},
        lambda params: jax.tree_util.tree_map_with_path(_group, params),
    )

    def read(trained, params, markers, key):
        clip, target, asking = draw_clip(cfg, markers, key)
        memory = nnx.merge(graph, params | trained)
        rope = _rope(cfg) if _ROPE.value else None
        grid = given_rotations(rope, clip.x.shape[1], cfg.head_dim)
        value, gate = memory.read_clip(clip, grid, _BLOCKS.value, copies=1)
        by_block = lambda x: x.reshape(_BLOCKS.value, -1, *x.shape[2:])
        pick = lambda x: jnp.take_along_axis(by_block(x), asking[:, :, None, None], axis=1)
        return gate * value, target, pick

    def loss(trained, params, markers, key):
        value, target, pick = read(trained, params, markers, key)
        if _LOSS.value == "asking":
            value, target = pick(value), pick(target)
        return jnp.sum(jnp.square(value - target)) / jnp.sum(jnp.square(target))

    @jax.jit
    def step(trained, state, params, markers, key):
        value, gradient = jax.value_and_grad(loss)(trained, params, markers, key)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(trained, updates), state, value

    @jax.jit
    def test(trained, params, markers, key):
        value, target, pick = read(trained, params, markers, key)
        square = lambda x: jnp.sum(jnp.square(x), axis=(1, 3))  # [blocks, H]
        return square(pick(value - target)), square(pick(target))

    return Programs(optimizer, step, test)


def _group(path, _) -> str:
    """Which learning rate a parameter has."""
    return "gates" if path[0].key in GATES else "rest"


def initial_params(cfg: ModelConfig, key) -> dict[str, jax.Array]:
    """A fresh memory's parameters."""
    make = lambda: GatedDelta(cfg.delta, cfg.attention, rngs=nnx.Rngs(key))
    return jax.jit(lambda: nnx.to_pure_dict(nnx.split(make())[1]))()


class Markers(NamedTuple):
    """Directions that stay the same over all clips, entries of unit variance."""

    key: jax.Array  # of each marked token, [marked, C]
    marked: jax.Array  # in x of a marked token, [C]
    asks: jax.Array  # in x of an asking token, [C]
    common: jax.Array  # in all keys and queries, [C]
    offset: jax.Array  # in all x, [C]


def draw_markers(cfg: ModelConfig, key) -> Markers:
    """Draw the directions of one seed."""
    rows = jax.random.normal(key, (_MARKED.value + 3, cfg.dim))
    offset = jax.random.normal(jax.random.fold_in(key, 0), (cfg.dim,))
    return Markers(rows[: _MARKED.value], *rows[_MARKED.value :], offset)


def draw_clip(cfg: ModelConfig, markers: Markers, key):
    """A clip of one video: projections, targets [1, T, H, D], and indices of asking tokens."""
    blocks, n, dtype = _BLOCKS.value, _TOKENS.value, jnp.dtype(cfg.dtype)
    place_key, *noise_keys = jax.random.split(key, 5)
    x, q, k, v = (
        jax.random.normal(jax.random.clone(noise_key), (blocks, n, cfg.dim), dtype)
        for noise_key in noise_keys
    )
    still = jnp.arange(n)[:, None] < _REPEATED.value * n
    x, q, k, v = (jnp.where(still, y[:1], y) for y in (x, q, k, v))
    q, k = (_share_of(y, _CORRELATION.value, markers.common) for y in (q, k))
    x, q, k, target, places = _mark(cfg, markers, key, place_key, (x, q, k, v))
    x = _share_of(x, _OFFSET.value, markers.offset)
    flat = lambda y: y.reshape(1, blocks * n, *y.shape[2:])
    heads = lambda y: flat(y).reshape(1, blocks * n, cfg.num_heads, cfg.head_dim)
    scale = jnp.ones(cfg.dim)
    clip = Projections(flat(x), flat(q), flat(k), heads(q), heads(k), heads(v), scale, scale)
    return clip, heads(target).astype(jnp.float32), places


def _mark(cfg: ModelConfig, markers: Markers, key, place_key, tokens):
    """Marks tokens of block 0 and lets later ones ask: x, q, k, the targets and the places."""
    x, q, k, v = tokens
    blocks, n, _ = x.shape
    # Without --apart one group of marked tokens serves all heads; its features are all of them.
    groups = cfg.num_heads if _APART.value else 1
    owner = jnp.repeat(jnp.arange(groups), _MARKED.value)
    own = jnp.arange(cfg.dim) // (cfg.dim // groups) == owner[:, None]
    draw = lambda key: jax.random.permutation(key, n)[: len(owner)]
    places = jax.vmap(draw)(jax.random.split(place_key, blocks))  # marked in block 0, else asking
    keys = markers.key
    if _NEW_KEYS.value:
        keys = jax.random.normal(jax.random.fold_in(key, 0), keys.shape)
    keys = jnp.tile(keys, (groups, 1))
    by_group = lambda direction: jnp.stack([jnp.roll(direction, i) for i in range(groups)])[owner]
    mix = lambda y, direction: _share_of(y, MATCH, direction)
    put = lambda y, at, direction: y.at[at].set(jnp.where(own, mix(y[at], direction), y[at]))
    first, later = (0, places[0]), (jnp.arange(1, blocks)[:, None], places[1:])
    k, q = put(k, first, keys), put(q, later, keys)
    x = x.at[first].set(mix(x[first], by_group(markers.marked)))
    x = x.at[later].set(mix(x[later], by_group(markers.asks)))
    target = jnp.zeros_like(v).at[later].set(jnp.where(own, v[first], 0))
    return x, q, k, target, places


def _share_of(y, share: float, direction):
    """Vectors of unit variance that have a share of their square from a common direction."""
    return share**0.5 * direction.astype(y.dtype) + (1 - share) ** 0.5 * y


def _rope(cfg: ModelConfig) -> Rope:
    """Rotation by time alone, three frames a block, of as many features as in Wan."""
    frame = 3 * jnp.arange(_TOKENS.value) // _TOKENS.value
    frame = (3 * jnp.arange(_BLOCKS.value)[:, None] + frame).reshape(-1)
    width = axis_widths(cfg.head_dim)[0]
    still = (cfg.head_dim - width) // 2
    angles = jnp.pad(rope_angles(frame, width), ((0, 0), (0, still)))
    return Rope(jnp.cos(angles), jnp.sin(angles))


def _write(rows: dict[str, Any]) -> None:
    names = ("tokens", "head_dim", "heads", "blocks", "steps", "learning_rate", "gate_rate",
             "marked", "new_keys", "apart", "correlation", "offset", "repeated", "loss",
             "rope")  # fmt: skip
    shapes = {name: flags.FLAGS[name].value for name in names}
    result = {
        "what": "relative squared error of what a layer's memory brings back, by lag in blocks",
        "timed": "wall time of the training steps, compilation apart",
        "shapes": shapes | {"dtype": _config().dtype, "test_clips": _TEST_CLIPS},
        **describe_device(),
        "starts": rows,
    }
    Path(_OUT.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
