"""What moves between devices that share out the frame blocks of a clip."""

import collections
import re

import jax
import pytest

from arl2_jax import sharding
from arl2_jax.config import MeshConfig
from arl2_jax.models import apply_clip, without_delta


@pytest.mark.parametrize("kind", ["hybrid", "teacher"])
def test_layers_move_matrices_or_heads(cfg, params, make_clip, kind):
    """The layers of a run are one scanned body, so that each move stands once in the program."""
    model, weights = {
        "hybrid": (cfg, params),
        "teacher": (cfg.teacher(), without_delta(params)),
    }[kind]
    mesh = sharding.make_mesh(MeshConfig(data=4, context=2))
    weights = sharding.put(weights, sharding.tree_shardings(weights, mesh))
    clip = make_clip(model, blocks=4, batch=4)._asdict()
    text = sharding.put_batch({"text": clip.pop("text")}, mesh)
    by_frame = jax.NamedSharding(mesh, jax.P(sharding.CLIPS, sharding.BLOCKS))
    clip = {name: jax.device_put(x, by_frame) for name, x in clip.items()}
    with jax.set_mesh(mesh):
        run = jax.jit(apply_clip, static_argnums=1, out_shardings=(by_frame, None))
        hlo = run.lower(weights, model, **clip, **text).compile().as_text()
    moved = re.findall(r"= (.+) (all-[\w-]+|collective-permute|reduce-scatter)\(", hlo)
    found = collections.Counter(name for _, name in moved)
    found.pop("all-reduce", None)  # diagnostics are means over all tokens
    # q, k, v and the output of a softmax layer; B of one device for the next, which starts there.
    wanted = {"all-to-all": 4} | ({"collective-permute": 1} if kind == "hybrid" else {})
    assert found == wanted
    for shape, name in moved:
        if name == "collective-permute":
            assert shape.startswith("f32[1,2,16,16]"), shape
        elif name == "all-reduce":
            assert not re.search(r"\[\d+,\d", shape), shape
