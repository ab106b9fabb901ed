"""What `model` raises on purpose; every message names the value, the limit and the cure."""


class ModelError(Exception):
    """The base of all errors of this package that a user, a file or a checkpoint can cause."""


class CheckpointError(ModelError):
    """A checkpoint is absent, incomplete, damaged, or of a kind that is not read."""


class UnfitLanguageModelError(ModelError):
    """A language model lacks what generating with it needs; the message goes on behind its name."""


class DeviceUnavailableError(ModelError):
    """The device that is wanted is not there."""


class InvalidPixelsError(ModelError):
    """An image holds samples of which nothing says what they mean."""


class InvalidPromptError(ModelError):
    """A prompt cannot be given to the language model, for instance because it is too long."""


class InvalidParamsError(ModelError):
    """A generation parameter is out of its bounds, or contradicts another one."""


class TaskUnavailableError(ModelError):
    """The loaded checkpoint lacks the part that this task needs."""
