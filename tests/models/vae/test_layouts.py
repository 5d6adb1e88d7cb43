"""Names and shapes of the published layouts, by shape evaluation."""

import numpy as np
import pytest
from flax import traverse_util
from vae_files import DIFFUSERS, GOLDEN, ORIGINAL, published_shapes

from arl2_jax.config import VAEConfig
from arl2_jax.models.vae import vae_shapes
from arl2_jax.weights.layout import detect_layout
from arl2_jax.weights.layouts.vae import layouts
from arl2_jax.weights.read import match
from arl2_jax.weights.tensors import FileTensor


@pytest.mark.parametrize("cfg", [VAEConfig(), GOLDEN], ids=["released", "odd"])
@pytest.mark.parametrize("names", [ORIGINAL, DIFFUSERS], ids=["original", "diffusers"])
def test_every_name_and_shape_has_its_place(cfg, names):
    published = published_shapes(cfg, names)
    tensors = {
        name: FileTensor(shape, np.dtype("float32"), read_slice=lambda index: np.empty(0))
        for name, shape in published.items()
    }
    layout = detect_layout(published, layouts(cfg), "a file")
    targets = traverse_util.flatten_dict(vae_shapes(cfg), sep="/")
    assert set(match(tensors, layout, targets, where="a file")) == set(targets)
    assert {layout.to_source(path)[0] for path in targets} == set(published)
