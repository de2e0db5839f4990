"""Errors that a user of megakda can cause, and catch.

Every message names the value received, the rule it breaks and the setting to change. Internal
invariants use ``assert``; anything a person can get wrong raises one of these.
"""


class MegakdaError(Exception):
    """Base of all errors that megakda raises on purpose. `exit_code` is the command line's."""

    exit_code = 1


class ConfigError(MegakdaError, ValueError):
    """A setting, or a combination of settings, that cannot work."""

    exit_code = 2


class DataError(MegakdaError):
    """A data set that is missing, torn, or made with another tokenizer than the one asked for."""

    exit_code = 3


class CheckpointError(MegakdaError):
    """A checkpoint that cannot be written, or cannot be loaded into this model."""

    exit_code = 4


class TrainingDiverged(MegakdaError):
    """Too many training steps in a row had a non-finite or exploding loss or gradient."""

    exit_code = 5


class RuntimeMismatch(MegakdaError, RuntimeError):
    """The installed torch, megatron-core or hardware is not what this code was written for."""

    exit_code = 6


class CommunicationError(MegakdaError, RuntimeError):
    """Ranks that should work together do not: one has died, does not answer, or disagrees."""

    exit_code = 7
