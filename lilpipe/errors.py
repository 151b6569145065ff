"""Exceptions: errors that the user must fix, and failures that are retryable.

The message of a ``LilpipeError`` names the field or file, what was got, what was expected and what to do. The command
line shows it without a traceback. It is never retried, since the same inputs give the same error. A ``StageFailure``,
and any other exception, counts as an infrastructure failure (or a bug) and is retried.
"""

from lilpipe.credentials import hide_credentials


class LilpipeError(Exception):
    """Base class of errors that the user must fix. Credentials in the message's addresses are hidden."""

    def __init__(self, message: str = "") -> None:
        super().__init__(hide_credentials(message))


class ConfigError(LilpipeError, ValueError):
    """A setting is unknown, invalid, or incompatible with another."""


class DataError(LilpipeError, ValueError):
    """Input data is missing, unreadable, or not enough."""


class ArtifactError(LilpipeError):
    """An artifact is missing, damaged, or of the wrong kind."""


class SchemaVersionError(LilpipeError):
    """The artifact was written by a newer version of lilpipe."""


class StoreError(LilpipeError):
    """The store cannot be read or written: permissions, full disk, or a path that is not a directory."""


class ClusterError(LilpipeError):
    """A cluster rejected, cancelled or lost the job in a way that a retry does not fix."""


class StageFailure(RuntimeError):
    """A stage's process failed in a retryable way: killed, out of memory, a lost worker, a bug."""

    def __init__(self, message: str = "") -> None:
        super().__init__(hide_credentials(message))


class Preempted(StageFailure):
    """The stage received SIGTERM and saved a checkpoint; a retry resumes from it."""


class HungCollective(StageFailure):
    """A collective exceeded ``launch.timeout_seconds`` because other workers did not reach it."""
