"""The tables of names: invertible, and complete for the models that are published."""

import jax
import numpy as np
import pytest
from flax import traverse_util
from one_line import assert_one_line
from wan_names import original_kinds

from arl2_jax.config import ModelConfig, UMT5Config, VAEConfig
from arl2_jax.errors import WeightsError
from arl2_jax.models import param_shapes
from arl2_jax.models.umt5 import umt5_shapes
from arl2_jax.models.vae import vae_shapes
from arl2_jax.weights.layout import Layout, Rule, detect_layout
from arl2_jax.weights.layouts import umt5, vae
from arl2_jax.weights.layouts.diffusers import DIFFUSERS
from arl2_jax.weights.layouts.transformer import LAYOUTS
from arl2_jax.weights.layouts.wan import ARL2, WAN
from arl2_jax.weights.read import export_tensors, match
from arl2_jax.weights.tensors import FileTensor

HYBRID = ModelConfig.wan1p3b(hybrid_layers=tuple(range(22)))
MODELS = {"1.3B": ModelConfig.wan1p3b(), "14B": ModelConfig.wan14b(), "hybrid 1.3B": HYBRID}
# Part of an original name -> what Diffusers calls it.
RENAMED = (
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    ("modulation", "scale_shift_table"),
    ("self_attn", "attn1"),
    ("cross_attn", "attn2"),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".o.", ".to_out.0."),
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def unread(kinds):
    """Tensors that fail if anybody reads them."""
    return {
        name: FileTensor(tuple(shape), np.dtype(np.float32), lambda index: 1 / 0)
        for name, shape in kinds.items()
    }


def in_diffusers(name):
    for original, theirs in RENAMED:
        if original in name:
            name = name.replace(original, theirs)
    return name


def assert_bijective(layout, shapes):
    """Every parameter has one name in the file, whose parameter it is again."""
    tensors = export_tensors(flat(shapes), layout)
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    for tensor, path in zip(tensors, flat(shapes), strict=True):
        assert layout.to_path(tensor.name)[0] == path
    found = match(
        unread({tensor.name: tensor.axes.file_shape for tensor in tensors}),
        layout,
        flat(shapes),
        where="",
    )
    assert found.keys() == flat(shapes).keys()


@pytest.mark.parametrize("name", MODELS)
def test_the_published_names_and_shapes_are_all_matched(name):
    cfg = MODELS[name]
    tensors = unread({name: kind[0] for name, kind in original_kinds(cfg).items()})
    layout = detect_layout(tensors, LAYOUTS, "")
    assert layout is (ARL2 if cfg.hybrid_layers else WAN)
    sources = match(tensors, layout, flat(param_shapes(cfg)), where="")
    assert {source.name for source in sources.values()} == tensors.keys()
    if not cfg.hybrid_layers:
        theirs = {in_diffusers(name): tensor for name, tensor in tensors.items()}
        assert detect_layout(theirs, LAYOUTS, "") is DIFFUSERS
        renamed = match(theirs, DIFFUSERS, flat(param_shapes(cfg)), where="")
        assert {p: s.name for p, s in renamed.items()} == {
            p: in_diffusers(s.name) for p, s in sources.items()
        }


@pytest.mark.parametrize(
    "layout, shapes",
    [(WAN, MODELS["14B"]), (DIFFUSERS, MODELS["1.3B"]), (ARL2, HYBRID)],
    ids=lambda x: getattr(x, "name", ""),
)
def test_the_tables_of_transformers_are_invertible(layout, shapes):
    assert_bijective(layout, param_shapes(shapes))


@pytest.mark.parametrize("cfg", [UMT5Config(), UMT5Config.tiny()], ids=["XXL", "tiny"])
@pytest.mark.parametrize("layout", umt5.LAYOUTS, ids=lambda layout: layout.name)
def test_the_tables_of_the_text_encoder_are_invertible(layout, cfg):
    assert_bijective(layout, umt5_shapes(cfg))


@pytest.mark.parametrize("cfg", [VAEConfig(), VAEConfig.tiny()], ids=["Wan", "tiny"])
def test_the_tables_of_the_vae_are_invertible(cfg):
    for layout in vae.layouts(cfg):
        assert_bijective(layout, vae_shapes(cfg))


def test_the_model_of_1p3b_is_of_the_published_size():
    kinds = original_kinds(MODELS["1.3B"]).values()
    assert sum(int(np.prod(shape)) for shape, *_ in kinds) == 1_418_996_800


def test_placeholders():
    layout = Layout("x", (Rule("b.{i}.{a|bc}_{qk}.w", "{a|bc}/{i}/{qk}", "o i -> i o"),))
    assert layout.to_path("b.12.bc_k.w") == ("bc/12/k", "o i -> i o")
    assert layout.to_source("a/0/q") == ("b.0.a_q.w", "o i -> i o")
    for name in ("b.12.bc_v.w", "b.x.a_q.w", "b.1.ab_q.w", "xb.1.a_q.w", "b.1.a_q.w2", "b.1.a_q-w"):
        assert layout.to_path(name) is None


def test_foreign_tensors_are_one_line():
    with pytest.raises(WeightsError) as error:
        detect_layout(["unet.conv_in.weight"], LAYOUTS, "file.pt")
    assert_one_line(error, "file.pt", "unet.conv_in.weight", "Wan2.1, ARL2, Diffusers")


def test_a_parameter_without_a_place_is_one_line():
    with pytest.raises(WeightsError) as error:
        export_tensors(
            flat({"blocks": {"0": {"delta": {"A_log": jax.ShapeDtypeStruct((2,), "float32")}}}}),
            WAN,
        )
    assert_one_line(error, "blocks/0/delta/A_log", "Wan2.1")
