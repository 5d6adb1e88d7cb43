"""Facts about parameters other than their shape, declared in the file that makes them.

Shardings, optimizers and casts look them up by path: the moments of an optimizer, averages and
checkpoints have only the path of their parameter.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

from arl2_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ParameterFacts:
    """Facts about a parameter.

    Attributes:
      axes: mesh axes of its last dimensions, or None. "fsdp" divides a parameter for storage,
        "tensor" for computation: heads and FFN columns.
      decay: whether weight decay pulls it towards its initial value. Decay has another meaning for
        a step size, the scale of a norm or a modulation.
      keep_float32: whether it stays float32 where matrices have the compute type: it is small, and
        controls the network or the state.
      matrix: whether it maps activations to activations inside a layer, which Muon is made for.
      low_rank: whether it is a factor of a low-rank update. Stage 1 does not train it, and weights
        may lack it.
    """

    axes: tuple[str | None, ...]
    decay: bool = True
    keep_float32: bool = False
    matrix: bool = False
    low_rank: bool = False


# Ends of paths, as regular expressions.
_FACTS: dict[str, ParameterFacts] = {}


def declare(facts: Mapping[str, ParameterFacts]) -> None:
    """Declare facts about parameters.

    Args:
      facts: by the end of their path in whole names, a regular expression such as
        `self_attn/[qkv]/kernel`. A memory's parameters are under `delta/`.

    Raises:
      ValueError: the same expression was declared with other facts.
    """
    for end, new in facts.items():
        if _FACTS.setdefault(end, new) != new:
            raise ValueError(f"parameters {end!r} are declared twice: {_FACTS[end]} and {new}")
    facts_of.cache_clear()


@functools.cache
def facts_of(path: str) -> ParameterFacts:
    """Return the facts of a parameter.

    Args:
      path: `blocks/0/self_attn/q/kernel`, or any longer path that ends with `/` and this path.

    Raises:
      ConfigError: none or several were declared.
    """
    found = [end for end in _FACTS if re.search(f"(^|/)({end})$", path)]
    if len(found) == 1:
        return _FACTS[found[0]]
    problem = f"has several facts, {found}" if found else "has no facts"
    raise ConfigError(
        f"the parameter {path} {problem}",
        remedy="declare them once in the file that makes it, see arl2_jax.parameters",
    )
