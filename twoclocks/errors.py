"""Errors of ours, each with the exit code a command ends with.

    TwoclocksError          2   what the user can mend: one line saying what was wrong, where, and how to go on
    ├── ExperimentError     2   an experiment or request file that cannot be used
    ├── RunFolderError      2   a run folder that cannot be read
    └── TargetError         3   the server is not reachable or not ready

A failure of the server under test is data (a record with a status and an error kind), never an exception.
"""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def plain(text: object) -> str:
    """Text of a server made harmless: control characters, which could steer a terminal, are replaced."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))


class TwoclocksError(Exception):
    exit_code = 2


class ExperimentError(TwoclocksError):
    pass


class RunFolderError(TwoclocksError):
    pass


class TargetError(TwoclocksError):
    exit_code = 3
