"""The errors that `model` raises; every message names the value, the limit and the cure."""


class ModelError(Exception):
    """The base of all errors of this package that a user, a file or a checkpoint can cause."""


class CheckpointError(ModelError):
    """A checkpoint is absent, incomplete, damaged or of an unsupported kind."""


class UnfitLanguageModelError(ModelError):
    """A language model lacks something that generation needs; the message continues its name."""


class DeviceUnavailableError(ModelError):
    """The requested device is absent."""


class DeviceLostError(ModelError):
    """The device computes nothing any more; only a new process can use it."""


class UnknownImageFormatError(ModelError):
    """A file is of no image format that is read."""


class InvalidImageFileError(ModelError):
    """An image file is damaged, exceeds a limit, or holds samples of unknown range."""


class InvalidPromptError(ModelError):
    """A prompt does not fit the language model, for instance because it is too long."""


class InvalidParamsError(ModelError):
    """A generation parameter is out of its bounds, or contradicts another one."""


class NonFiniteError(ModelError):
    """The model computed a score that is no finite number."""

    def __init__(self, subject: str) -> None:
        super().__init__(
            f"{subject}: the model gave a score that is not finite; check the weights, or use float32"
        )


class TaskUnavailableError(ModelError):
    """The loaded checkpoint lacks the component that a task needs."""
