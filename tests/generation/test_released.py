"""From released weights and a prompt to a video file."""

import dataclasses

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_line import assert_one_line
from tiny_release import MODEL, random_tree, write_release

from arl2_jax.codecs import load_wan_codec
from arl2_jax.config import SamplerConfig, to_config_dict
from arl2_jax.errors import UserError
from arl2_jax.generation import make_video as making
from arl2_jax.generation.generator import Generator
from arl2_jax.generation.release_paths import ReleasePaths
from arl2_jax.generation.released import Resolution, write_from_weights
from arl2_jax.generation.rollout import rollout
from arl2_jax.generation.video import write_video
from arl2_jax.models import param_shapes
from arl2_jax.weights import export_params, load_params, model_config
from arl2_jax.weights.folder import save_params

SAMPLER = SamplerConfig(timesteps=(1000.0, 500.0))
GUIDED = SamplerConfig(method="euler", steps=2, guidance=4.0)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return str(write_release(tmp_path_factory.mktemp("release")))


def write(release, out, **options):
    fixed = dict(
        prompt="a red sprite", frames=9, paths=ReleasePaths(), sampler=SAMPLER,
        resolution=Resolution(16, 32), frames_per_block=1,
    )  # fmt: skip
    write_from_weights(release, out=out, **(fixed | options))


def read(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_a_prompt_becomes_a_video(release, tmp_path):
    write(release, tmp_path / "a.mp4", paths=ReleasePaths(cache=str(tmp_path / "cache")))
    frames = read(tmp_path / "a.mp4")
    assert frames.shape == (9, 192, 384, 3)
    # The text, the cache and what was made are those of the parts, one by one.
    encoder = ReleasePaths().within(release).open_text_encoder()
    params = load_params(f"{release}/transformer", MODEL)
    [text] = encoder.encode(["a  red sprite"], MODEL.text_len, MODEL.text_dim)
    key = jax.random.key(0, impl="rbg")
    latents = rollout(params, MODEL, SAMPLER, text[None], key, blocks=3, shape=(2, 4, 4))
    pixels = np.asarray(load_wan_codec(release).decode(latents))[0]
    shown = frames[:, 6::12, 6::12].astype(float) / 127.5 - 1
    assert len(list((tmp_path / "cache").iterdir())) == 1
    # What is left is the loss of the video file: about a tenth on noise.
    assert np.abs(shown - pixels).mean() < 0.15 < np.abs(shown - pixels[::-1]).mean() + 0.15


def test_guidance_leads_away_from_the_negative_prompt(release, tmp_path):
    for name, negative in (("a", ""), ("b", ""), ("c", "two blue corgi")):
        write(release, tmp_path / f"{name}.mp4", sampler=GUIDED, frames=1, negative_prompt=negative)
    a, b, c = (read(tmp_path / f"{name}.mp4").astype(int) for name in "abc")
    assert np.array_equal(a, b) and np.abs(a - c).max() > 2


def test_a_condition_is_continued(release, tmp_path):
    clip = np.full((9, 16, 32, 3), 30, np.uint8)
    clip[:, :, 16:] = 200
    write_video(tmp_path / "clip.mp4", clip, 16.0)
    write(release, tmp_path / "a.mp4", frames=8, condition=str(tmp_path / "clip.mp4"))
    frames = read(tmp_path / "a.mp4")
    assert len(frames) == 1 + 8
    assert abs(frames[0][100, 20].astype(int) - 30).max() < 10


def test_a_continued_stream_decodes_like_the_whole(release):
    """The decoder must have seen the past."""
    codec, params = load_wan_codec(release), load_params(f"{release}/transformer", MODEL)
    cfg = dataclasses.replace(MODEL, frames_per_block=2)
    generators = [
        Generator(cfg, params, SAMPLER, latent_shape=(2, 4, 4), codec=c) for c in (codec, None)
    ]
    rng = np.random.default_rng(0)
    past = rng.standard_normal((1, 2, 2, 4, 4)).astype(np.float32)
    text = rng.standard_normal((8, 32)).astype(np.float32)
    options = {"key": jax.random.key(0, impl="rbg"), "frames": 4}
    shown, latents = (g.generate(text, past=past, **options) for g in generators)
    whole = jnp.concatenate([past, latents], axis=1)
    pixels = np.asarray(codec.decode(whole))[:, codec.pixel_frames(past.shape[1]) :]
    wanted = np.clip(np.rint((pixels + 1) * 127.5), 0, 255)
    assert shown.shape == wanted.shape == (1, 16, 16, 32, 3)
    # A last bit of the latents may round a color to its neighbor.
    assert np.abs(shown.astype(int) - wanted).max() <= 1


def test_every_layout_gives_the_same_latents(tmp_path):
    """Of a teacher and of a hybrid, as far as a layout has a place for it."""
    hybrid = dataclasses.replace(MODEL, hybrid_layers=(0,))
    text = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    key = jax.random.key(0, impl="rbg")
    for cfg, layouts in ((MODEL, ("wan", "diffusers", "arl2")), (hybrid, ("arl2",))):
        params = random_tree(param_shapes(cfg))
        kind = tmp_path / f"{len(cfg.hybrid_layers)}"
        save_params(kind / "own", params, to_config_dict(cfg))
        for layout in layouts:
            export_params(kind / layout, params, cfg, layout, shard_size=20_000)
        made = []
        for folder in ("own", *layouts):
            # What no layout but ours tells.
            found = model_config(
                kind / folder, frames_per_block=1, text_len=8, lora_rank=2, lora_alpha=32.0
            )
            assert found == dataclasses.replace(cfg, remat=found.remat)
            read = load_params(kind / folder, found)
            made.append(rollout(read, cfg, SAMPLER, text[None], key, blocks=2, shape=(2, 4, 4)))
        assert len(made) == len(layouts) + 1 and np.abs(made[0]).max() > 0.1
        for latents in made[1:]:
            np.testing.assert_array_equal(latents, made[0])


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"frames": 10}, ["frames=10", "9 or 13"]),
        ({"frames": 0}, ["frames=0", "1"]),
        ({"prompt": ""}, ["empty"]),
        ({"prompt": "corgi " * 1667}, ["1668", "8"]),
        ({"resolution": Resolution(17, 32)}, ["height=17", "16"]),
        ({"paths": ReleasePaths(vae="nowhere")}, ["nowhere"]),
        ({"paths": ReleasePaths(tokenizer="nowhere")}, ["nowhere", "tokenizer"]),
        ({"out": "file/a.mp4"}, ["file/a.mp4"]),
        ({"condition": "missing.mp4"}, ["missing.mp4"]),
    ],
)
def test_errors_come_before_compilation(release, changes, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(making, "Generator", None)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError) as error:
        write(release, **({"out": "a.mp4"} | changes))
    assert_one_line(error, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
