"""Layouts of weights: tables from the names in a file to the paths of our tree, and back."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from arl2_jax.errors import WeightsError

_PLACEHOLDER = re.compile(r"\{([^}]*)\}")
_NONE: Mapping[str, str] = MappingProxyType({})
# Axes of a linear layer's weight.
LINEAR = "o i -> i o"
# Wan2.1's patch, which the shape of a flattened patch kernel does not determine.
_PATCH: Mapping[str, int] = MappingProxyType({"t": 1, "h": 2, "w": 2})


@dataclasses.dataclass(frozen=True)
class Rule:
    """A map between names of tensors in a file and paths of parameters, in both directions.

        Rule("blocks.{i}.{self|cross}_attn.{qkvo}.weight",
             "blocks/{i}/{self|cross}_attn/{qkvo}/kernel", "o i -> i o")

    Attributes:
      source: template of the name in the file. A placeholder stands for digits ({i}, {j}), for one
        of some words ({self|cross}) or for one of some letters ({qkvo}).
      path: template of the path in our tree, with the same placeholders.
      axes: the file's axes and ours in einops' notation; "" if they are the same.
    """

    source: str
    path: str
    axes: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A table of rules.

    Attributes:
      name: what the layout is called in messages.
      rules: if several match one parameter, the first one names it in files that we write.
      aliases: second name of a tied tensor -> its first name.
      sizes: sizes of names in `Rule.axes` that no shape determines: they are part of a product.
    """

    name: str
    rules: tuple[Rule, ...]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=lambda: _NONE)
    sizes: Mapping[str, int] = dataclasses.field(default_factory=lambda: _PATCH)

    def to_path(self, name: str) -> tuple[str, str] | None:
        """Return (path, axes) of a tensor in a file, or None if it is unknown."""
        name = self.aliases.get(name, name)
        for rule in self.rules:
            path = _translate(name, rule.source, rule.path)
            if path is not None:
                return path, rule.axes
        return None

    def to_source(self, path: str) -> tuple[str, str] | None:
        """Return (name in a file, axes) of a parameter, or None if the layout does not have it."""
        for rule in self.rules:
            name = _translate(path, rule.path, rule.source)
            if name is not None:
                return name, rule.axes
        return None


def linear_rules(source: str, path: str) -> tuple[Rule, Rule]:
    """Return the rules of a linear layer with bias; its weight is [out, in] in the file."""
    return (
        Rule(f"{source}.weight", f"{path}/kernel", LINEAR),
        Rule(f"{source}.bias", f"{path}/bias"),
    )


def detect_layout(names: Iterable[str], layouts: Sequence[Layout], where: object) -> Layout:
    """Return the layout that knows most of the names; among equals the first.

    Args:
      names: names of tensors, without wrapper prefixes.
      layouts: the candidates.
      where: the file, for the message.

    Raises:
      WeightsError: no layout knows any of the names.
    """
    names = list(names)
    known = [sum(layout.to_path(name) is not None for name in names) for layout in layouts]
    if not any(known):
        some = ", ".join(sorted(names)[:3]) or "none"
        raise WeightsError(
            f"{where} has tensors of no known layout ({some}, ...); known are "
            f"{', '.join(layout.name for layout in layouts)}",
            remedy="name other weights",
        )
    return layouts[known.index(max(known))]


def _translate(text: str, template: str, other: str) -> str | None:
    match = _pattern(template).fullmatch(text)
    if match is None:
        return None
    values = dict(zip(_PLACEHOLDER.findall(template), match.groups(), strict=True))
    return _PLACEHOLDER.sub(lambda found: values[found[1]], other)


@functools.cache
def _pattern(template: str) -> re.Pattern:
    parts = _PLACEHOLDER.split(template)
    texts = [f"({_expression(part)})" if k % 2 else re.escape(part) for k, part in enumerate(parts)]
    return re.compile("".join(texts))


def _expression(placeholder: str) -> str:
    if placeholder in ("i", "j"):
        return r"\d+"
    return placeholder if "|" in placeholder else f"[{placeholder}]"
