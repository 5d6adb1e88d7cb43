"""Times generation from prompt to pixels at the shapes of Wan2.1 1.3B, with random weights.

    python benchmarks/text_to_video.py --out=benchmarks/results/text_to_video_h200.json

Timed: the text encoder (weights already on the device), each block of the network (four denoising
passes and the clean one), and the decoding of the block by the VAE; without compilation. --small
tries the script itself on a CPU.
"""

import importlib.metadata
import json
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import arl2_jax as arl2
from arl2_jax.codecs import WanCodec
from arl2_jax.config import ModelConfig, SamplerConfig, UMT5Config, VAEConfig
from arl2_jax.models.umt5 import encode_tokens, init_umt5
from arl2_jax.models.vae import init_vae

_OUT = flags.DEFINE_string("out", "", "JSON file to write.")
_BLOCKS = flags.DEFINE_integer("blocks", 7, "Blocks of a video.")
_SMALL = flags.DEFINE_bool("small", False, "Tiny sizes.")
_HYBRID = flags.DEFINE_list("hybrid", ["0", "22", "30"], "Numbers of converted layers.")


def seconds(call, repeat: int = 5) -> list[float]:
    """Return the wall seconds of calls, waiting for results, after a first that compiles."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return found


def time_text(cfg: UMT5Config) -> dict:
    """A prompt of 64 and one of 512 tokens through the text encoder."""
    params = init_umt5(cfg, jax.random.key(0))
    found = {}
    for length in (min(64, cfg.text_len), cfg.text_len):
        tokens = jnp.ones((1, length), jnp.int32)
        call = lambda t=tokens, n=length: encode_tokens(params, cfg, t, jnp.array([n]))
        found[f"tokens_{length}"] = summary(seconds(call))
    jax.tree.map(lambda x: x.delete(), params)
    return found


def time_video(cfg: ModelConfig, codec: WanCodec, rows: int, columns: int, blocks: int) -> dict:
    """Each block's network passes and decoding, over one video; the second of two runs."""
    sampler = SamplerConfig()
    params = arl2.init_params(cfg, jax.random.key(0))
    generator = arl2.Generator(cfg, params, sampler, latent_shape=(rows, columns, cfg.in_dim))
    del params
    text = jnp.zeros((cfg.text_len, cfg.text_dim)).at[0].set(1.0)
    key = jax.random.key(1, impl="rbg")
    for _ in range(2):
        state, network, decoding, finite = codec.init_state(1, rows, columns), [], [], True
        stream = generator.stream(text, key=key, frames=blocks * cfg.frames_per_block)
        for i in range(blocks):
            start = time.perf_counter()
            latents = jax.block_until_ready(next(stream))
            network.append(time.perf_counter() - start)
            start = time.perf_counter()
            pixels, state = codec.decode_block(latents, state, first=i == 0)
            finite &= bool(jnp.isfinite(pixels).all())
            decoding.append(time.perf_counter() - start)
    stats = jax.local_devices()[0].memory_stats() or {}
    frames, later = codec.pixel_frames(blocks * cfg.frames_per_block), slice(1, None)
    return {
        "finite": finite,
        "network_seconds": network,
        "decode_seconds": decoding,
        "network_block": summary(network[later]),
        "decode_block": summary(decoding[later]),
        "pixel_frames": frames,
        "frames_per_second": frames / (sum(network) + sum(decoding)),
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def summary(values: list[float]) -> dict:
    """Median and range."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def main(_):
    """Run all and write the JSON."""
    small = _SMALL.value
    text = UMT5Config.tiny() if small else UMT5Config()
    vae = VAEConfig.tiny() if small else VAEConfig()
    model = (
        ModelConfig.tiny(in_dim=4, out_dim=4, hybrid_layers=(), frames_per_block=3)
        if small
        else ModelConfig.wan1p3b()
    )
    rows, columns = (4, 6) if small else (60, 104)
    device = jax.devices()[0]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "what": "a prompt's way to pixels, random weights, one video of "
        f"{_BLOCKS.value} blocks of {model.frames_per_block} latent frames, few-step sampler",
        "timed": "wall time with results waited for; compilation apart; blocks of the second of "
        "two runs, text the later five of six calls",
        "shapes": {"latents": [rows, columns, model.in_dim], "dtype": model.dtype},
        "device": {"platform": device.platform, "kind": device.device_kind},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "text_encoder": time_text(text),
    }
    codec = WanCodec(init_vae(vae, jax.random.key(2)), vae)
    for count in [] if small else map(int, _HYBRID.value):
        cfg = ModelConfig.wan1p3b(hybrid_layers=tuple(range(count)))
        result[f"hybrid_{count}"] = time_video(cfg, codec, rows, columns, _BLOCKS.value)
    if small:
        result["softmax"] = time_video(model, codec, rows, columns, _BLOCKS.value)
    print(json.dumps(result, indent=2))
    if _OUT.value:
        with open(_OUT.value, "w") as file:
            file.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
