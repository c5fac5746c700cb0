"""The errors a user can cause. Each says what was given, what is accepted and what to do.

``tell`` is for warnings, which stop nothing.
"""

import functools
import os
import sys


class FmbsegError(Exception):
    """Base of all errors that are the input's fault and not the program's."""


class ImageError(FmbsegError):
    """An image or a mask cannot be used."""


class ParameterError(FmbsegError):
    """A parameter is unknown, of the wrong type or out of range."""


class WeightsError(FmbsegError):
    """Weights are missing, damaged or cannot be fetched."""


class DataError(FmbsegError):
    """A data set, a folder or a record is missing or not in the expected layout."""


class TrainingError(FmbsegError):
    """A training ended in a module that cannot be used."""


class WorkerLost(FmbsegError):
    """A worker process was ended from outside."""


class StorageError(FmbsegError):
    """A file or folder cannot be written: the disk is full, or the place does not allow it."""


@functools.cache
def tell(sentence: str) -> None:
    """Print a warning on standard error, once a process; under torchrun only the first process prints."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr)
