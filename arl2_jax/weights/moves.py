"""How the axes of a stored tensor become ours, for whole tensors and for slices of them."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

Index = tuple[slice, ...]
# One axis is the product of its names; an axis of size 1 has none.
_Axes = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Moves:
    """A pattern such as "(h o) i 1 -> h i o", with the size of every name.

    Attributes:
      stored: the names in each axis of the file's tensor.
      ours: the names in each axis of our array.
      sizes: size of every name.
    """

    stored: _Axes
    ours: _Axes
    sizes: Mapping[str, int]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the file's tensor."""
        return tuple(self._size(axis) for axis in self.stored)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our array."""
        return tuple(self._size(axis) for axis in self.ours)

    @property
    def by_rows(self) -> bool:
        """Whether rows of the file's first axis can be filled in one by one."""
        return bool(self.stored) and all(len(axis) == 1 for axis in self.stored)

    def as_stored(self, ours: np.ndarray) -> np.ndarray:
        """Our array with one axis for each name in the order of the file; a view of it."""
        names = _names(self.ours)
        apart = ours.reshape([self.sizes[name] for name in names])
        return apart.transpose([names.index(name) for name in _names(self.stored)])

    def slices(self, index: Index) -> tuple["Moves", Index, Index]:
        """What to read for a slice of our array.

        Args:
          index: one slice an axis of ours, with bounds.

        Returns:
          (moves of what is read, index of the file's tensor, index that is left to apply to ours).
          Axes that are parts of a product, here or there, are read whole.
        """
        sizes, stored, rest = dict(self.sizes), [slice(0, size) for size in self.stored_shape], []
        for axis, wanted in zip(self.ours, index, strict=True):
            if len(axis) == 1 and axis in self.stored:
                stored[self.stored.index(axis)] = wanted
                sizes[axis[0]] = wanted.stop - wanted.start
                rest.append(slice(None))
            else:
                rest.append(wanted)
        return dataclasses.replace(self, sizes=sizes), tuple(stored), tuple(rest)

    def _size(self, axis: tuple[str, ...]) -> int:
        return math.prod(self.sizes[name] for name in axis)


def fit_moves(
    pattern: str,
    stored_shape: Sequence[int] | None,
    shape: Sequence[int] | None,
    sizes: Mapping[str, int],
) -> Moves | None:
    """Fits a pattern to shapes.

    Args:
      pattern: the file's axes and ours in einops' notation; "" if both are the same.
      stored_shape: shape of the file's tensor, if known.
      shape: shape of our array, if known.
      sizes: sizes of names that a shape cannot tell.

    Returns:
      The moves; or None if the pattern does not fit the shapes.
    """
    if not pattern:
        names = " ".join(f"axis{i}" for i in range(len(stored_shape or shape or ())))
        pattern = f"{names} -> {names}"
    sides = [_parse(side) for side in pattern.split("->")]
    known: dict[str, int] = {}
    axes = []
    for side, lengths in zip(sides, (stored_shape, shape), strict=True):
        if lengths is not None:
            if len(side) != len(lengths):
                return None
            axes += zip(side, lengths, strict=True)
    # Products last: one name of each may be unknown until then.
    for axis, length in sorted(axes, key=lambda pair: len(pair[0]) != 1):
        missing = [name for name in axis if name not in known]
        if len(missing) > 1:
            known |= {name: sizes[name] for name in missing if name in sizes}
            missing = [name for name in missing if name not in known]
        rest = math.prod(known[name] for name in axis if name in known)
        if len(missing) == 1 and rest:
            known[missing[0]] = length // rest
            rest *= known[missing[0]]
        if rest != length:
            return None
    return Moves(sides[0], sides[1], known)


def _parse(side: str) -> _Axes:
    axes = re.findall(r"\([^)]*\)|\S+", side)
    return tuple(tuple(n for n in axis.strip("()").split() if n != "1") for axis in axes)


def _names(axes: _Axes) -> list[str]:
    return [name for axis in axes for name in axis]
