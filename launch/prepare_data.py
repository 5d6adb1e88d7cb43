"""Store latents and text embeddings for training; a second start resumes where the first stopped.

Clips that the teacher generates, one for each line of a text file:

    python launch/prepare_data.py --prompts=prompts.txt --weights=FOLDER --out=data/latents

Clips cut from videos; the text in a.txt next to a.mp4, or else its name, is the caption:

    python launch/prepare_data.py --videos=FOLDER --release=FOLDER --out=data/latents

A summary of any folder of stored latents (the format: docs/latents.md):

    python launch/prepare_data.py --check=data/latents
"""

from typing import Any

from absl import flags

import command_line

_PROMPTS = flags.DEFINE_string("prompts", None, "Text file, one prompt per line.")
_VIDEOS = flags.DEFINE_string("videos", None, "Folder of video files.")
_CHECK = flags.DEFINE_string("check", None, "Folder of stored latents to summarize.")
_OUT = flags.DEFINE_string("out", None, "Folder to write, with --prompts and --videos.")
_LATENT_FRAMES = flags.DEFINE_integer("latent_frames", 21, "Latent frames of a clip.")
_resolution = command_line.resolution_flags()
_STORED = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Type of the stored arrays."
)
_PER_SHARD = flags.DEFINE_integer("records_per_shard", 64, "Clips in a file.")
_paths = command_line.release_flags()
# With --videos:
_FPS = flags.DEFINE_float("fps", 16.0, "Frames a second at which videos are sampled.")
_TEXT_LEN = flags.DEFINE_integer("text_len", 512, "Text slots of a clip, with --videos.")
# With --prompts:
_WEIGHTS = flags.DEFINE_string("weights", None, "The teacher, with --prompts.")
_ENTRY = command_line.entry_flag()
_BLOCK = flags.DEFINE_integer(
    "frames_per_block", None, "Latent frames denoised together, where the weights do not say: 3."
)
_NEGATIVE = flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")
_sampler = command_line.sampler_flags()


def main():
    """Write a folder of stored latents, or print a summary of one."""
    # Imported late: a mistyped flag should not wait for jax.
    from arl2_jax import preparation

    if _CHECK.value:
        print(preparation.describe(_CHECK.value))
        return
    clips: dict[str, Any] = dict(frames=_LATENT_FRAMES.value, resolution=_resolution())
    stored: dict[str, Any] = dict(dtype=_STORED.value, records_per_shard=_PER_SHARD.value)
    if _VIDEOS.value:
        count = preparation.store_videos(
            _VIDEOS.value,
            _OUT.value,
            _paths(),
            fps=_FPS.value,
            text_len=_TEXT_LEN.value,
            **clips,
            **stored,
        )
    else:
        count = preparation.store_rollouts(
            str(_PROMPTS.value),
            _OUT.value,
            _paths(),
            weights=_WEIGHTS.value,
            sampler=_sampler(),
            frames_per_block=_BLOCK.value,
            entry=_ENTRY.value,
            negative_prompt=_NEGATIVE.value,
            seed=_SEED.value,
            **clips,
            **stored,
        )
    print(f"{count} clips: {_OUT.value}")


if __name__ == "__main__":
    command_line.run(
        main,
        one_of=["prompts", "videos", "check"],
        names=command_line.SAMPLER_NAMES
        | command_line.MODEL_NAMES
        | {"frames": "latent_frames", "data.path": "videos", "data.fps": "fps"},
    )
