"""Where a Pallas kernel may be called."""

import jax
from jax.sharding import AxisType


def unsupported_mesh_reason() -> str | None:
    """Return why a Pallas call is not allowed under the current mesh, or None.

    XLA cannot partition a Pallas call over mesh axes that are not manual.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    names = [name for name, size, kind in axes if size > 1 and kind != AxisType.Manual]
    if names:
        return f"is not split over mesh axes by XLA; call it in jax.shard_map over {names}"
    return None
