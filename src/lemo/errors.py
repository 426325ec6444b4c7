"""Every error that lemo raises on purpose. One class per kind of mistake, one clear message each."""

from __future__ import annotations


class LemoError(Exception):
    """Base of all errors a user can cause and mend. The command line prints the message and exits with 2."""


class ConfigError(LemoError):
    """A recipe, ratio or option is wrong; the message names the key."""


class DataError(LemoError):
    """A file or row cannot be used; the message names the file and the row."""


class LabelsError(LemoError):
    """A training forward reached the model without labels or another statement of which rows are supervised."""


class PlanError(LemoError):
    """A plan cannot be read, does not belong to this model, or would harm it."""


class UnsupportedModelError(LemoError):
    """A model or layer cannot skip rows; the message says which and why."""


class BackendError(LemoError):
    """A backend was asked for by name and cannot run here; the message says why."""


class MergeError(LemoError):
    """A merged model does not compute what its adapter model computes; the message says by how much."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
