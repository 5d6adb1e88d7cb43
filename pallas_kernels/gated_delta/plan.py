"""The static part of a call."""

import dataclasses
from typing import Any

from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static arguments of a call, passed to every implementation.

    Attributes:
        block_size: Tokens of a block.
        chunk_size: Tokens turned into one matrix product at most; None leaves it to the
            implementation.
        operand: Dtype of matrix operands: the keys', or the state's with precision "high".
        state: Dtype of states, gates and sums.
        interpret: Parameters of Pallas's interpreter, to run a kernel on a CPU; False compiles it.
    """

    block_size: int
    chunk_size: int | None
    operand: DTypeLike
    state: DTypeLike
    interpret: Any = False
