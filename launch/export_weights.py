"""Write weights in the layout of another program, as safetensors with config.json.

    python launch/export_weights.py --run=runs/wan1p3b --model=stage2 --out=arl2
    python launch/export_weights.py --weights=weights/wan1p3b --layout=diffusers --out=transformer

The layouts of Wan2.1 and Diffusers cannot represent hybrid layers. With --lora=merged the low-rank
updates of the FFN are added to its kernels; those of q, k and v act on the memory alone and stay
separate. A memory that was initialised by block has a bias that ARL2's files do not have:
--extras=write adds it as b_proj.bias.
"""

from absl import flags

import command_line

_WEIGHTS = flags.DEFINE_string("weights", None, "File or folder of the weights, in any layout.")
_RUN = flags.DEFINE_string("run", None, "Folder of a finished run.")
_MODEL = flags.DEFINE_enum(
    "model",
    "stage2",
    ["teacher", "stage1", "stage2", "control", "control_local"],
    "Which of the run's models.",
)
_ENTRY = command_line.entry_flag()
_LAYOUT = flags.DEFINE_enum("layout", "arl2", ["arl2", "wan", "diffusers"], "Layout to write.")
_LORA = flags.DEFINE_enum("lora", "apart", ["apart", "merged"], "Low-rank updates of the FFN.")
_EXTRAS = flags.DEFINE_enum(
    "extras",
    "refuse",
    ["refuse", "write"],
    "What to do with parts of a memory that ARL2's files cannot represent.",
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the matrices.")
_OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the folder if it is there.")


def main():
    """Write the folder that the flags name."""
    # Imported late: a mistyped flag should not wait for jax.
    from arl2_jax.weights.transfer import export_weights

    export_weights(
        _WEIGHTS.value or f"{_RUN.value}/{_MODEL.value}/weights",
        _OUT.value,
        layout=_LAYOUT.value,
        lora=_LORA.value,
        extras=_EXTRAS.value,
        entry=_ENTRY.value,
        dtype=_DTYPE.value,
        overwrite=_OVERWRITE.value,
    )
    print(f"weights: {_OUT.value}")


if __name__ == "__main__":
    command_line.run(main, one_of=["weights", "run"])
