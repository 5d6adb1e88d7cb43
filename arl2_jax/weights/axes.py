"""Maps between the axes of a file's tensor and ours, for whole tensors and for slices."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

Index = tuple[slice, ...]
# One axis is the product of its names; an axis of size 1 has none.
_Axes = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class AxisMap:
    """A pattern such as "(h o) i 1 -> h i o", with the size of every name.

    Attributes:
      file: the names in each axis of the file's tensor.
      ours: the names in each axis of our array.
      sizes: size of every name.
    """

    file: _Axes
    ours: _Axes
    sizes: Mapping[str, int]

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of the file's tensor."""
        return tuple(self._size(axis) for axis in self.file)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our array."""
        return tuple(self._size(axis) for axis in self.ours)

    @property
    def by_rows(self) -> bool:
        """Whether rows of the file's first axis can be filled separately."""
        return bool(self.file) and all(len(axis) == 1 for axis in self.file)

    def to_file_axes(self, ours: np.ndarray) -> np.ndarray:
        """Return a view of our array with one axis for each name, in the order of the file."""
        names = _names(self.ours)
        split = ours.reshape([self.sizes[name] for name in names])
        return split.transpose([names.index(name) for name in _names(self.file)])

    def slices(self, index: Index) -> tuple["AxisMap", Index, Index]:
        """Return what to read for a slice of our array.

        Args:
          index: one slice with bounds for each of our axes.

        Returns:
          (map of what is read, index of the file's tensor, index still to be applied to ours).
          Axes that are parts of a product, ours or the file's, are read whole.
        """
        sizes, file_index, rest = dict(self.sizes), [slice(0, size) for size in self.file_shape], []
        for axis, wanted in zip(self.ours, index, strict=True):
            if len(axis) == 1 and axis in self.file:
                file_index[self.file.index(axis)] = wanted
                sizes[axis[0]] = wanted.stop - wanted.start
                rest.append(slice(None))
            else:
                rest.append(wanted)
        return dataclasses.replace(self, sizes=sizes), tuple(file_index), tuple(rest)

    def _size(self, axis: tuple[str, ...]) -> int:
        return math.prod(self.sizes[name] for name in axis)


def fit_axes(
    pattern: str,
    file_shape: Sequence[int] | None,
    shape: Sequence[int] | None,
    sizes: Mapping[str, int],
) -> AxisMap | None:
    """Fit a pattern to shapes.

    Args:
      pattern: the file's axes and ours in einops' notation; "" if both are the same.
      file_shape: shape of the file's tensor, if known.
      shape: shape of our array, if known.
      sizes: sizes of names that no shape determines.

    Returns:
      The map; or None if the pattern does not fit the shapes.
    """
    if not pattern:
        names = " ".join(f"axis{i}" for i in range(len(file_shape or shape or ())))
        pattern = f"{names} -> {names}"
    sides = [_parse(side) for side in pattern.split("->")]
    known: dict[str, int] = {}
    axes = []
    for side, lengths in zip(sides, (file_shape, shape), strict=True):
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
    return AxisMap(sides[0], sides[1], known)


def _parse(side: str) -> _Axes:
    axes = re.findall(r"\([^)]*\)|\S+", side)
    return tuple(tuple(n for n in axis.strip("()").split() if n != "1") for axis in axes)


def _names(axes: _Axes) -> list[str]:
    return [name for axis in axes for name in axis]
