"""Summary of a folder of stored latents."""

import textwrap
from pathlib import Path

from arl2_jax.data.latents import check_latents
from arl2_jax.errors import DataError

# Most faults to show; a folder damaged as a whole has one in every record.
_SHOWN = 20


def describe(path: str | Path) -> str:
    """Read every clip of a folder of stored latents and return a summary of a few lines.

    Raises:
      DataError: the folder has faults; the first ones are listed, a line each.
    """
    check = check_latents(path)
    if check.problems:
        shown = "\n".join(f"  {problem}" for problem in check.problems[:_SHOWN])
        more = f"\n  and {len(check.problems) - _SHOWN} more" * (len(check.problems) > _SHOWN)
        raise DataError(
            f"{path} has {len(check.problems)} faults",
            remedy=f"write these shards again:\n{shown}{more}",
        )
    manifest = check.manifest
    shape, text = ("x".join(map(str, s)) for s in (manifest.latent_shape, manifest.text_shape))
    size = sum(shard.bytes for shard in manifest.shards)
    numbers = lambda values: " ".join(f"{value:.2f}" for value in values)
    return textwrap.dedent(f"""\
        {path}: {manifest.count} clips in {len(manifest.shards)} shards, {size / 1e6:.1f} MB; good
        latents     {shape} {manifest.dtype}, codec {manifest.codec["name"]}
        mean        {numbers(check.mean)}
        std         {numbers(check.std)}
        text        {text}, {check.text_rows:.1f} rows used on average
        source      {dict(manifest.source)}""")
