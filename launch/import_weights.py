"""Read a transformer's weights in any layout and write a folder that every command reads.

    python launch/import_weights.py --weights=Wan2.1-T2V-1.3B --out=weights/wan1p3b
    python launch/import_weights.py --weights=causal_forcing.pt --out=weights/hybrid \
        --hybrid_layers=0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21

A layer that becomes hybrid here, and was not in the file, gets ARL2's published initial values.
"""

from absl import flags

import command_line

_WEIGHTS = flags.DEFINE_string("weights", None, "File or folder of the weights.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
_HYBRID = flags.DEFINE_list("hybrid_layers", None, "Layers to be hybrid; by default the file's.")
_ENTRY = command_line.entry_flag()
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the matrices.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the folder if it is there.")


def main():
    """Write the folder that the flags name."""
    # Imported late: a mistyped flag should not wait for jax.
    from arl2_jax.errors import ConfigError
    from arl2_jax.weights.transfer import import_weights

    try:
        layers = None if _HYBRID.value is None else [int(layer) for layer in _HYBRID.value]
    except ValueError:
        raise ConfigError(
            "must be whole numbers, such as 0,1,2",
            field="hybrid_layers",
            value=",".join(_HYBRID.value or ()),
        ) from None
    done = import_weights(
        _WEIGHTS.value,
        _OUT.value,
        hybrid_layers=layers,
        entry=_ENTRY.value,
        dtype=_DTYPE.value,
        overwrite=_OVERWRITE.value,
    )
    print(f"layout      {done.layout}")
    print(f"tensors     {done.tensors}")
    print(f"parameters  {done.parameters:,}")
    speed = done.bytes_read / done.read_seconds / 1e9
    print(
        f"read        {done.bytes_read / 1e9:.2f} GB in {done.read_seconds:.1f} s, {speed:.2f} GB/s"
    )
    print(f"written     {_OUT.value} in {done.write_seconds:.1f} s")


if __name__ == "__main__":
    command_line.run(main, names=command_line.MODEL_NAMES)
