"""The front door: looks at the first word and imports only what that command needs."""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from netllm_pl.errors import Terminated, UserError, explained, unknown
from netllm_pl.progress import set_quiet

USAGE = """usage: python -m netllm_pl COMMAND [options]     (each command has --help)
       --quiet prints errors and where the result is, and nothing else; --debug shows tracebacks

train and run, configured by YAML and --key value
  fit        train a task or a learned baseline, then print its table
  validate   metrics of a checkpoint on the validation split
  test       metrics of a checkpoint on the test split
  predict    write the predictions of a checkpoint on the test split
compare, collect and take away
  evaluate   run baselines and checkpoints on the same test windows or episodes; one table with intervals
  compare    one table and one picture of several runs
  collect    run policies in a task's simulator and write an experience pool, or convert a published one
  benchmark  measure training, decisions and simulators beside what the machine can do
  study      answer a question that takes many runs, such as the paper's tables: train, evaluate, report
  export     write a checkpoint as a PEFT adapter folder, encoder and head
  fetch      bring a public data set or a small language model

example: python -m netllm_pl fit --config configs/viewport_prediction.yaml
"""


def _lightning(command: str, args: list[str]) -> None:
    from netllm_pl.run import run

    run([command, *args])


def _own(command: str, args: list[str]) -> None:
    from netllm_pl import commands

    getattr(commands, command)(args)


COMMANDS: dict[str, Callable[[str, list[str]], None]] = {
    **dict.fromkeys(("fit", "validate", "test", "predict"), _lightning),
    **dict.fromkeys(("evaluate", "compare", "collect", "benchmark", "study", "export", "fetch"), _own),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: Words of the command line; those of the process by default.

    Raises:
        SystemExit: with 2 after a mistake of the user, 130 after Ctrl-C, 143 after SIGTERM, 1 after any other failure;
            each prints one or two lines.
    """
    words = list(sys.argv[1:] if args is None else args)
    debug, quiet = "--debug" in words, "--quiet" in words
    words = [word for word in words if word not in ("--debug", "--quiet")]
    # With busy neighbours, OpenMP threads that spin while they wait slow small operations down by a factor of 100.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if words[0] == "--version":
        from netllm_pl import __version__

        print(__version__)
        return
    try:
        if words[0] not in COMMANDS:
            raise unknown("command", words[0], COMMANDS)
        with _terminable(), _silence(quiet):
            COMMANDS[words[0]](words[0], words[1:])
    except UserError as error:
        if debug:
            raise
        _fail(f"error: {error}", 2)
    except KeyboardInterrupt as stop:
        _fail(str(stop) or "interrupted", 128 + signal.SIGINT)
    except Terminated as stop:
        _fail(str(stop) or "terminated", 128 + signal.SIGTERM)
    except Exception as error:
        if debug:
            raise
        cure = explained(error)
        if cure is not None:
            _fail(f"error: {cure}", 2)
        first = (str(error).strip() or "no message").split("\n")[0]
        _fail(f"error: {type(error).__name__}: {first} (run again with --debug for the traceback)", 1)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does: nothing half-written stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


@contextmanager
def _silence(quiet: bool) -> Iterator[None]:
    """Let nothing but errors and results through, if quiet."""
    set_quiet(quiet)
    if not quiet:
        yield
        return
    try:
        with warnings.catch_warnings(action="ignore"):
            logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(logging.NOTSET)
        set_quiet(False)


def _fail(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(code)
