"""Measure what the linear memory of a model keeps, by layer and head.

    python launch/inspect_memory.py --weights=runs/wan1p3b/stage2/weights --data=latents
    python launch/inspect_memory.py --run=runs/wan1p3b --model=stage1 --out=stage1.json
    python launch/inspect_memory.py --weights=weights/wan1p3b --hybrid_layers=0-21

Weights without hybrid layers are measured as they would be at the start of a conversion. Without
--data the clips are standard normal latents of --latent_shape, without text. All measures are
written to --out, with a picture next to it; a table and a warning about layers that forget a block
are printed.
"""

from absl import flags

import command_line

_WEIGHTS = flags.DEFINE_string("weights", None, "File or folder of the weights, in any layout.")
_RUN = flags.DEFINE_string("run", None, "Folder of a finished run.")
_MODEL = flags.DEFINE_enum("model", "stage2", ["stage1", "stage2"], "Which of the run's models.")
_ENTRY = command_line.entry_flag()
_layers = command_line.layers_flag()
_BLOCK = flags.DEFINE_integer(
    "frames_per_block", None, "Latent frames of a block, where the weights do not say: 3."
)
_DATA = flags.DEFINE_string("data", None, "Folder of stored latents; random ones by default.")
_latent_shape = command_line.latent_shape_flag()
_CLIPS = flags.DEFINE_integer("clips", 1, "Clips to measure on.")
_BLOCKS = flags.DEFINE_integer(
    "blocks", None, "Blocks of each clip; all of stored ones by default, 4 of random ones."
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Compute type; float32 on CPUs, else bfloat16."
)
_OUT = flags.DEFINE_string("out", "memory.json", "File to write; the picture ends in .png.")


def main():
    """Print the table, and write the file and the picture."""
    layers, shape = _layers(), _latent_shape()
    # Imported late: a mistyped flag should not wait for jax.
    from arl2_jax.evaluation.inspect_memory import ClipChoice, inspect_memory
    from arl2_jax.evaluation.retention import retention_table
    from arl2_jax.training.retention import forgotten

    measures = inspect_memory(
        _WEIGHTS.value or f"{_RUN.value}/{_MODEL.value}/weights",
        ClipChoice(_DATA.value, _CLIPS.value, _BLOCKS.value, shape),
        _OUT.value,
        hybrid_layers=layers,
        frames_per_block=_BLOCK.value,
        entry=_ENTRY.value,
        dtype=_DTYPE.value,
        seed=_SEED.value,
    )
    print(retention_table(measures))
    if text := forgotten(measures):
        print(f"warning: {text}")
    print(f"measures: {_OUT.value}; picture: {_OUT.value.removesuffix('.json')}.png")


if __name__ == "__main__":
    command_line.run(
        main,
        one_of=["weights", "run"],
        names=command_line.MODEL_NAMES,
        save_memory="lower --blocks or --clips",
    )
