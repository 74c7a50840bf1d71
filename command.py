"""How the commands read their arguments, and how they refuse what a user got wrong."""

import multiprocessing
import sys
from collections.abc import Callable
from typing import NoReturn

from transformers import HfArgumentParser


class InputError(ValueError):
    """A user's mistake: where it is, what was got, what is wanted, what to do."""


def parse_arguments(arguments_class: type, argv: list[str] | None = None):
    """An `arguments_class`, a dataclass, from `argv`, or else from the command line.

    InputError for an unknown flag, and for values that the dataclass itself refuses.
    """
    parser = HfArgumentParser(arguments_class)
    parser.error = refuse  # one line, in place of argparse's page of usage
    try:
        args, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except (ValueError, ImportError) as error:
        raise InputError(str(error)) from error
    if unknown:
        raise InputError(f"unknown arguments {' '.join(unknown)}: --help lists the known ones")
    return args


def refuse(message: str) -> NoReturn:
    raise InputError(f"{message}; see --help")


def run_command(main: Callable[[], None]) -> None:
    """Call a command's `main`: an InputError is printed as one line, and ends it with status 1.

    Everything else keeps its traceback: whoever changes the code must see where it broke.
    """
    sys.excepthook = report_exception
    sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are not UTF-8
    try:
        main()
    except InputError as error:
        # a data worker's traceback may stand before the message
        message = str(error).split("InputError: ")[-1].strip()
        raise SystemExit(f"error: {message}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped by Ctrl-C") from None


def report_exception(kind: type, error: BaseException, traceback) -> None:
    """sys.excepthook: a data worker is silent when the main process has gone in their midst.

    Its thread that hands over batches would print a traceback behind "stopped by Ctrl-C".
    """
    in_worker = multiprocessing.parent_process() is not None
    if in_worker and isinstance(error, (EOFError, ConnectionError)):
        return
    sys.__excepthook__(kind, error, traceback)
