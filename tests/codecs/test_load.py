import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from data_sizes import make_data, tiny_model
from one_line import assert_one_line
from tiny_release import VAE, write_release

from arl2_jax.codecs import Codec, SpaceToDepth, WanCodec, load_wan_codec, make_codec, vae_weights
from arl2_jax.config import Config
from arl2_jax.errors import ConfigError, WeightsError


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return write_release(tmp_path_factory.mktemp("codecs") / "release")


@pytest.mark.parametrize("codec", [SpaceToDepth, WanCodec])
def test_codecs_keep_to_the_interface(codec):
    members = [name for name in vars(Codec) if not name.startswith("_")]
    assert {"encode", "decode", "init_state", "decode_block", "channels"} <= {*members}
    for name in members:
        declared = getattr(Codec, name)
        if not isinstance(declared, property):
            wanted, got = inspect.signature(declared), inspect.signature(getattr(codec, name))
            kinds = lambda s: [(p.name, p.kind, p.default) for p in s.parameters.values()]
            assert kinds(got) == kinds(wanted), name
        elif codec is WanCodec:
            assert isinstance(getattr(codec, name), property), name
        else:
            assert name in {field.name for field in dataclasses.fields(codec)}, name


def test_too_few_channels_name_both_fields():
    with pytest.raises(ConfigError, match=r"data\.codec_factor=4 .*model\.in_dim=16"):
        make_codec(Config(tiny_model(in_dim=16, out_dim=16), data=make_data()))


def test_make_codec_takes_factor_and_channels_from_the_config():
    config = Config(tiny_model(), data=make_data())
    assert make_codec(config) == SpaceToDepth(4, 48)
    unequal = dataclasses.replace(config, model=tiny_model(out_dim=16))
    with pytest.raises(ConfigError, match=r"model\.out_dim"):
        make_codec(unequal)


def wan_config(vae, **changes):
    fields = {"source": "latents", "path": "somewhere", "codec": "wan_vae", "vae": vae}
    data = make_data(**fields | {"codec_factor": VAE.spatial_factor, "height": 16, "width": 32})
    channels = {"in_dim": VAE.z_dim, "out_dim": VAE.z_dim} | changes
    return Config(tiny_model(**channels), data=data)


def test_wan_without_weights_is_no_codec():
    assert make_codec(wan_config("")) is None


def test_wan_with_weights_fits_the_model_or_says_so(release):
    codec = make_codec(wan_config(str(release)))
    assert isinstance(codec, WanCodec) and codec.channels == VAE.z_dim
    other = wan_config(str(release), in_dim=16, out_dim=16)
    with pytest.raises(ConfigError) as error:
        make_codec(other)
    assert_one_line(error, f"model.in_dim=16 must be {VAE.z_dim}", str(release))


def test_weights_are_those_of_the_release_or_the_path_itself(release, tmp_path):
    assert vae_weights(str(release)) == str(release / "vae")
    assert vae_weights(str(release / "vae")) == str(release / "vae")
    assert vae_weights(str(tmp_path)) == str(tmp_path)


def test_type_of_the_convolutions_is_that_of_the_device_unless_given(release):
    whole, half = load_wan_codec(str(release)), load_wan_codec(str(release), "bfloat16")
    assert (whole.cfg.dtype, half.cfg.dtype) == ("float32", "bfloat16")
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 2, 2, VAE.z_dim)))
    error = np.abs(whole.decode(latents) - half.decode(latents)).max()
    assert 0 < error < 0.1


@pytest.mark.parametrize("content", [None, b"no weights"])
def test_unreadable_weights_are_one_line(tmp_path, content):
    file = tmp_path / "vae.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        load_wan_codec(str(file))
    assert_one_line(error, str(file))
