"""The errors that a user can mend, and those that another try may mend.

The message of a ``LilpipeError`` names the field or file, what was got, what was expected, what to do. It is shown at
the command line without a trace-back, and is never retried: running the same thing again cannot help. A
``StageFailure``, and any other exception, is taken for a failure of infrastructure (or a bug) and is retried.
"""


class LilpipeError(Exception):
    """Base of every error whose remedy lies with the user."""


class ConfigError(LilpipeError, ValueError):
    """A setting is unknown, impossible, or does not fit another."""


class DataError(LilpipeError, ValueError):
    """Input data is missing, unreadable, or too little for what was asked."""


class ArtifactError(LilpipeError):
    """An artifact is missing, damaged, or of another kind than the stage needs."""


class SchemaVersionError(LilpipeError):
    """A newer version of lilpipe wrote the artifact."""


class StoreError(LilpipeError):
    """The store cannot be read or written: permissions, a full disk, a path that is no directory."""


class ClusterError(LilpipeError):
    """A cluster refused, cancelled or lost the work, in a way that another try does not mend."""


class StageFailure(RuntimeError):
    """A stage's process ended in a way that another try may mend: killed, out of memory, a lost peer, a bug."""


class Preempted(StageFailure):
    """The stage was told to end (SIGTERM), has saved, and goes on from there in the next try."""


class HungCollective(StageFailure):
    """A worker waited in a collective for longer than ``launch.timeout_seconds`` for others that did not come."""
