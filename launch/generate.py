"""Generate a video, with released weights or with a model of a finished run.

    python launch/generate.py --weights=FOLDER --prompt="a corgi surfing" --out=video.mp4
    python launch/generate.py --run=runs/tiny-synthetic --model=stage2 \
        --prompt="one sprite on a navy background" --frames=40 --out=video.mp4

--weights: a folder of a Wan2.1 release (original or Diffusers), or the transformer alone (a folder,
a .safetensors or .pt file); then --release names a folder with text encoder, tokenizer and VAE, or
--text_encoder, --tokenizer and --vae each of them. A causal few-step model needs no more. Others
are sampled with, for example, --method=euler --steps=50 --guidance=6 --shift=8, and a model that
was never made causal takes the whole video as one block: --frames_per_block=21.

With --condition=clip.mp4 the beginning of that video comes first and is continued. The video may be
longer than any training clip. If it is more than ten times as long, the states of hybrid layers may
fill up and remember less; --leak=0.02 is meant to prevent that.
"""

from typing import Any

from absl import flags

import command_line

_WEIGHTS = flags.DEFINE_string("weights", None, "Released weights: a folder or a file.")
_ENTRY = command_line.entry_flag()
_RUN = flags.DEFINE_string("run", None, "Folder of a finished run.")
_MODEL = flags.DEFINE_enum(
    "model",
    "stage2",
    ["teacher", "stage1", "stage2", "control", "control_local"],
    "Which of the run's models.",
)
_PROMPT = flags.DEFINE_string("prompt", "", "Words that describe the video.")
_NEGATIVE = flags.DEFINE_string("negative_prompt", "", "What guidance leads away from.")
_FRAMES = flags.DEFINE_integer("frames", None, "Frames to generate, whole blocks.")
_OUT = flags.DEFINE_string("out", "video.mp4", "File to write.")
_CONDITION = flags.DEFINE_string("condition", None, "Video file to continue.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")
_BLOCK = flags.DEFINE_integer(
    "frames_per_block", None, "Latent frames denoised together, where the weights do not say: 3."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Compute type; float32 on CPUs, else bfloat16."
)
_LEAK = flags.DEFINE_float(
    "leak", None, "Share of a hybrid layer's state that every block loses; by default the model's."
)
_paths, _sampler = command_line.release_flags(), command_line.sampler_flags()
_resolution = command_line.resolution_flags()


def main():
    """Generate the video that the flags describe."""
    # Imported late: a mistyped flag should not wait for jax.
    from arl2_jax.generation.finished_run import write_from_run
    from arl2_jax.generation.released import write_from_weights

    common: dict[str, Any] = dict(
        prompt=_PROMPT.value,
        negative_prompt=_NEGATIVE.value,
        frames=_FRAMES.value,
        out=_OUT.value,
        paths=_paths(),
        condition=_CONDITION.value,
        leak=_LEAK.value,
        seed=_SEED.value,
    )
    if _RUN.value:
        write_from_run(_RUN.value, _MODEL.value, **common)
    else:
        write_from_weights(
            str(_WEIGHTS.value),
            sampler=_sampler(),
            resolution=_resolution(),
            frames_per_block=_BLOCK.value,
            entry=_ENTRY.value,
            dtype=_DTYPE.value,
            **common,
        )
    print(f"video: {_OUT.value}")


if __name__ == "__main__":
    command_line.run(
        main,
        one_of=["weights", "run"],
        names=command_line.SAMPLER_NAMES | command_line.MODEL_NAMES,
    )
