"""Errors that the user can fix, by kind."""

from typing import Any, Self


class UserError(ValueError):
    """An error that the user can fix, in one line: "FIELD=VALUE PROBLEM; REMEDY".

    Attributes:
      problem: what is wrong, in words that follow the field if there is one.
      field: the setting or argument at fault, such as "model.dim" or "overwrite"; or None.
      value: its value; None if there is none to show.
      remedy: what to do, or None. It names settings and arguments by `field=`, never flags.
    """

    def __init__(
        self,
        problem: str,
        *,
        field: str | None = None,
        value: Any = None,
        remedy: str | None = None,
    ):
        super().__init__(problem)
        self.problem, self.field, self.value, self.remedy = problem, field, value, remedy

    def __str__(self) -> str:
        subject = self.field or ""
        if self.field and self.value is not None:
            subject += f"={self.value}"
        line = f"{subject} {self.problem}" if subject else self.problem
        return f"{line}; {self.remedy}" if self.remedy else line

    def within(self, group: str) -> Self:
        """Return the same error, its field inside a group such as "model.memories[0]."."""
        field = self.field and f"{group}{self.field}"
        return type(self)(self.problem, field=field, value=self.value, remedy=self.remedy)


class ConfigError(UserError):
    """An invalid setting or argument."""


class WeightsError(UserError):
    """Weights that are missing, cannot be read, or belong to another model."""


class StorageError(UserError):
    """A file or folder that cannot be read or written."""


class DataError(UserError):
    """Videos, stored latents, manifests or prompts that are missing or damaged."""
