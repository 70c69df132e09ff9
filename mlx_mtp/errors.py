"""The errors a user can meet. Every message says what we got, what we expected and what to do.

MtpError
├── ConfigError             a setting in a config.json is missing, unknown or unsupported
├── CheckpointError         a folder or a file of a checkpoint is not what its config promises
├── PairError               target and drafter do not belong together
├── MemoryBudgetError       the device cannot hold what was asked for
└── RequestError            a prompt or a generation setting cannot be served
    └── QueueFullError      too many requests wait already

The commands print them as one line and exit with 2; anything else is a bug and shows its traceback.
"""


class MtpError(Exception):
    """Base of all errors that a user can cause and fix."""


class ConfigError(MtpError):
    """A setting in a config.json is missing, unknown or unsupported."""


class CheckpointError(MtpError):
    """A folder or a file of a checkpoint is not what its config promises."""


class PairError(MtpError):
    """Target and drafter do not belong together."""


class MemoryBudgetError(MtpError):
    """The device cannot hold what was asked for."""


class RequestError(MtpError):
    """A prompt or a generation setting cannot be served."""


class QueueFullError(RequestError):
    """Too many requests wait already: the same one can be served later."""
