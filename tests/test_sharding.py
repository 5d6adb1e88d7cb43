"""Every parameter has a layout, and mistakes are found before anything is compiled."""

import contextlib
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from arl2_jax import sharding
from arl2_jax.config import MeshConfig, ModelConfig, PhaseConfig
from arl2_jax.errors import ConfigError
from arl2_jax.models import param_shapes
from arl2_jax.training.optimizer import make_optimizer, path_name
from arl2_jax.training.step import TrainState

MODELS = {
    "wan1p3b": ModelConfig.wan1p3b(hybrid_layers=tuple(range(22))),
    "wan14b": ModelConfig.wan14b(),
    "tiny": ModelConfig.tiny(),
}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(2, 2, 2))


@pytest.mark.parametrize("name", MODELS)
def test_every_array_of_a_training_state_has_a_layout(mesh, name):
    params = param_shapes(MODELS[name])
    optimizer = jax.eval_shape(make_optimizer(PhaseConfig(), params).init, params)
    state = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params, optimizer, params,
        jax.eval_shape(lambda: jax.random.key(0)),
    )  # fmt: skip
    layout = sharding.tree_shardings(state, mesh)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(layout), strict=True):
        place.shard_shape(leaf.shape)  # raises if an axis does not divide it
    for own in (layout.opt_state[1].mu, layout.opt_state[1].nu, layout.ema):
        assert own == layout.params


def test_moments_of_muon_lie_where_their_parameters_do(mesh):
    params = param_shapes(MODELS["tiny"])
    state = jax.eval_shape(make_optimizer(PhaseConfig(optimizer="muon"), params).init, params)
    named = lambda tree: {
        path_name(path): place
        for path, place in jax.tree_util.tree_leaves_with_path(sharding.tree_shardings(tree, mesh))
    }
    wanted, moments = named(params), 0
    for name, place in named(state).items():
        parameter = re.search(r"\b(mu|nu)/(.*)", name)
        if parameter:
            moments += 1
            assert place == wanted[parameter[2]], name
    # One moment for Muon's matrices, two for all else.
    assert len(wanted) < moments < 2 * len(wanted)


def test_large_parameters_are_shared_out(mesh):
    """All that is left whole on each device is small."""
    params = param_shapes(MODELS["wan1p3b"])
    layout = sharding.tree_shardings(params, mesh)
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(layout), strict=True):
        if math.prod(leaf.shape) > 1e5:
            assert math.prod(place.shard_shape(leaf.shape)) < math.prod(leaf.shape)
    q = layout["blocks"]["0"]["self_attn"]["q"]["kernel"].spec
    o = layout["blocks"]["0"]["self_attn"]["o"]["kernel"].spec
    assert (q, o) == (P("fsdp", "tensor"), P("tensor", "fsdp"))


def test_axis_that_does_not_divide_is_left_out(mesh):
    assert sharding.param_spec("blocks/0/ffn/fc1/kernel", (5, 8), mesh) == P(None, "tensor")
    assert sharding.param_spec("blocks/0/delta/phi_q", (3, 8, 8), mesh) == P(None, None, None)


def test_leading_axes_of_a_stack_are_whole(mesh):
    spec = sharding.param_spec("mu/blocks/0/self_attn/q/kernel", (7, 8, 8), mesh)
    assert spec == P(None, "fsdp", "tensor")


def test_unmatched_parameter_is_named(mesh):
    with pytest.raises(ConfigError, match="the parameter blocks/0/new has no facts"):
        sharding.tree_shardings({"blocks": {"0": {"new": jnp.zeros((2, 2))}}}, mesh)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((-1,), (8, 1, 1, 1)), ((2, -1, 2), (2, 2, 2, 1)), ((1, 2, 2, -1), (1, 2, 2, 2))],
)
def test_mesh_takes_all_devices(sizes, shape):
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == ("data", "fsdp", "tensor", "context")


@pytest.mark.parametrize("sizes", [(3,), (-1, 3), (2, 2), (8, 1, 1, 2), (-1, 1, 16)])
def test_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ConfigError, match=r"train\.mesh=.* 8 devices") as caught:
        sharding.make_mesh(MeshConfig(*sizes))
    assert "\n" not in str(caught.value)


def test_batches_are_whole_clips_on_every_device(mesh):
    sharding.check_batch(mesh, 16, 4, "stage1")
    with pytest.raises(ConfigError, match=r"stage1\.batch_size=12 .* stage1\.accumulation=2"):
        sharding.check_batch(mesh, 12, 2, "stage1")
    batch = sharding.put_batch({"text": np.arange(8.0)}, mesh)["text"]
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2,)}
    np.testing.assert_array_equal(batch, np.arange(8.0))


def test_frame_blocks_of_a_clip_are_shared_out():
    mesh = sharding.make_mesh(MeshConfig(data=2, context=4))
    sharding.check_blocks(mesh, 8)
    with pytest.raises(
        ConfigError, match=r"train\.mesh\.context=4 must divide the 6 frame"
    ) as error:
        sharding.check_blocks(mesh, 6)
    assert "\n" not in str(error.value)
    latents, text = np.arange(64.0).reshape(2, 8, 4), np.ones((2, 3))
    batch = sharding.put_batch({"latents": latents, "text": text}, mesh)
    assert {shard.data.shape for shard in batch["latents"].addressable_shards} == {(1, 2, 4)}
    assert {shard.data.shape for shard in batch["text"].addressable_shards} == {(1, 3)}
    np.testing.assert_array_equal(batch["latents"], latents)


def test_a_clip_stays_with_one_process(monkeypatch):
    """Of two processes with four devices each, neither could give the other a part of its clips."""
    devices = np.array([types.SimpleNamespace(process_index=i // 4) for i in range(8)])
    make = lambda sizes, *_, **__: types.SimpleNamespace(devices=devices.reshape(sizes))
    monkeypatch.setattr(jax, "make_mesh", make)
    sharding.make_mesh(MeshConfig(data=2, context=4))
    with pytest.raises(ConfigError, match="puts a clip on devices of several processes"):
        sharding.make_mesh(MeshConfig(data=1, tensor=2, context=4))


SUM = (P(sharding.CLIPS, sharding.BLOCKS), P(None, sharding.BLOCKS)), P(sharding.CLIPS)


def sizes_on_a_device(mesh, *shapes):
    """What `per_device` gives to a function of two arrays."""
    seen = []

    def function(x, y):
        seen.append((x.shape, y.shape))
        return x[:, 0]

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        jax.eval_shape(sharding.per_device(function, *SUM), *map(jnp.zeros, shapes))
    return seen[-1]


def test_axes_that_do_not_divide_an_array_are_left_out_for_all():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    assert sizes_on_a_device(None, (8, 6), (3, 6)) == ((8, 6), (3, 6))
    assert sizes_on_a_device(mesh, (8, 6), (3, 6)) == ((2, 3), (3, 3))
    assert sizes_on_a_device(mesh, (8, 6), (3, 5)) == ((2, 6), (3, 5))
    assert sizes_on_a_device(mesh, (6, 6), (3, 6)) == ((3, 3), (3, 3))
    assert sizes_on_a_device(mesh, (5, 6), (3, 6)) == ((5, 3), (3, 3))


def test_meshes_of_others_are_left_alone():
    """A module may stand in a program with a mesh of its own, or in its shard_map."""
    other = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    assert sizes_on_a_device(other, (8, 6), (3, 6)) == ((8, 6), (3, 6))
    mesh = sharding.make_mesh(MeshConfig(data=8))
    inside = lambda x: x + sizes_on_a_device(None, (8, 6), (3, 6))[0][0]
    mapped = jax.shard_map(inside, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(mapped(jnp.zeros(8)), np.full(8, 8.0))


def test_table_has_a_line_for_each_kind_of_parameter(mesh):
    params = param_shapes(MODELS["wan1p3b"])
    lines = sharding.sharding_table(params, mesh).splitlines()
    (row,) = [line.split() for line in lines if line.startswith("blocks/*/self_attn/q/kernel")]
    # 1536 x 1536 float32 over two axes of two devices.
    assert row[1:4] == ["1536x1536", "30", f"{30 * 1536 * 1536 * 4 / 4 / 1e6:.2f}"]
    (delta,) = [line.split() for line in lines if line.startswith("blocks/*/delta/A_log")]
    assert delta[2] == "22"
    assert len(lines) == len({line.split()[0] for line in lines}) < 70
