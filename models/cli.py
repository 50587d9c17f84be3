"""What the command lines share: arguments to a typed config, errors to one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from .. import BackendUnavailableError
from .processes import OtherProcessError

Config = TypeVar("Config")


def run_command(
    config_type: type[Config],
    command: Callable[[Config], object],
    arguments: Sequence[str] | None,
    program: str,
) -> int:
    """Parse the arguments and run the command.

    Data errors, settings that are not allowed, failures of files and backends that cannot run end
    as one line on stderr.

    Args:
        config_type: dataclass that the options are made from.
        command: does the work.
        arguments: of the command line; None takes those of this process.
        program: name for the help text, such as `python -m rdfkern.models.train`.

    Returns:
        The exit code: 0, 2 after an error, 130 after an interrupt.
    """
    try:
        command(tyro.cli(config_type, args=arguments, prog=program))
    except OtherProcessError:
        return 2
    except (ValueError, OSError, BackendUnavailableError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
