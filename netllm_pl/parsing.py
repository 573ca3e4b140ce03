"""Argument parsers whose errors are one or two lines that name the known classes and keys."""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from netllm_pl.errors import UserError
from netllm_pl.sources import CLASSES, files_first, find_mistake, fold_nulls, known_classes, origin, read_sources

LIMIT = 400
"""Characters of a message."""


class Parser(ArgumentParser):
    """jsonargparse's parser with short errors, full option names only, and a command line that wins over files."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviated option that works today is another one after the next release.
        super().__init__(*args, **({"allow_abbrev": False, "exit_on_error": False} | kwargs))

    def read(self, words: Sequence[str]) -> Namespace:
        """Parse a command line.

        Args:
            words: What the user typed, with the subcommand first if there is one.

        Raises:
            UserError: Something in it, or in a file it names, is wrong.
        """
        parser, command = self._chosen(words)
        options = fold_nulls(files_first(words[len(command) :]))
        read_sources(options)  # refuses files that jsonargparse would choke on
        try:
            return self.parse_args([*command, *options])
        except (argparse.ArgumentError, UserError) as error:
            cause = _raised(error)
            if isinstance(cause, UserError):
                raise cause from None
            mistake = find_mistake(options, [action.dest for action in parser._actions])
            raise mistake or UserError(explain(str(error), options)) from error

    def instantiate(self, *args: Any, **kwargs: Any) -> Namespace:
        """Build the configured classes; what their constructors raise comes out as they raised it."""
        try:
            built: Namespace = super().instantiate(*args, **kwargs)
        except Exception as error:
            cause = _raised(error)
            if cause is error:
                raise
            raise cause from None
        return built

    def _chosen(self, words: Sequence[str]) -> tuple[ArgumentParser, Sequence[str]]:
        """Return the parser of the subcommand that the first word names, and that word; or this parser."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and words and words[0] in action.choices:
                return action.choices[words[0]], words[:1]
        return self, ()


class LightningParser(Parser, LightningArgumentParser):
    """LightningCLI's parser with short errors."""


def explain(message: str, words: Sequence[str] = ()) -> str:
    """Shorten a complaint of jsonargparse to one line that names the key, its value, and what was expected.

    Args:
        message: The complaint.
        words: Command line behind the command: tells in which file the key is.
    """
    missing = re.match(r"the following arguments are required: (.+)", message)
    if missing:
        return _missing([name.strip().rpartition(".")[2] for name in missing[1].split(",")])
    strange = re.search(r"unrecognized arguments: (.+)", message)
    if strange:
        return _cut(f"unknown option {strange[1]}; --help lists the known ones")
    keys: list[str] = re.findall(r'Parser key "([^"]+)"', message)
    if not keys:
        return _cut(message)
    inner = message[message.rindex(f'Parser key "{keys[-1]}"') :].partition(":\n")[2]
    # Lines behind the value belong to unions further out.
    own, given, value = inner.partition("Given value: ")
    if not given or "Got value: " in own.split("Errors:")[0]:
        own, _, value = inner.partition(". Got value: ")
    expected = dict.fromkeys(re.findall(r"(?m)^[\s-]*Expected an? (.+?)(?:\. Got value.*)?$", own))
    what = " or ".join(_type(kind) for kind in expected)
    key = ".".join(keys)
    source = origin(key, words)
    key = f"{source}: {key}" if source else key
    strange = re.search(r"Expected a dot import path string: (\S+)", inner)
    if strange:
        return _cut(f"{key}: no class is called '{strange[1]}'; give the name of a known class or its full import path")
    unread = re.search(r"Unable to load config '([^']+)'", message)
    if unread:
        key = ".".join(dict.fromkeys(keys))  # the last one is named twice
        example = f", such as --{key}.name {unread[1]}" if key.endswith("backbone") else ""
        return _cut(f"{key} is '{unread[1]}'; expected a file that exists, or keys with values{example}")
    misfit = re.search(r"Problem with given class_path '(?:\w+\.)*(\w+)':\s+(.+)", inner)
    if misfit:
        return _cut(f"{key}: {misfit[1]} cannot be made of what is given: {misfit[2]}")
    if not what:
        return _cut(f"{key}: {inner or message.rpartition(': ')[2]}")
    return _cut(f"{key} is {_value(value)}; expected {what}")


def _missing(names: list[str]) -> str:
    options = ", ".join(f"--{name}" for name in names)
    classes = [f"--{key} {' | '.join(sorted(known_classes(key)))}" for key in CLASSES if key in names]
    if not classes:
        return f"missing: {options}; --help says what it means"
    return _cut(f"missing: {options}; give --config configs/<task>.yaml, or {', '.join(classes)}")


def _type(kind: str) -> str:
    choices = re.fullmatch(r"typing\.Literal\[(.+)\]", kind)
    if choices:
        return f"one of {choices[1]}"
    name = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)
    return {"NoneType": "null", "str": "text", "dict": "keys with values"}.get(name, name)


def _value(text: str) -> str:
    line = text.partition("\n")[0].strip()
    nested = re.fullmatch(r"NestedArg\(key=.+?, val=(.+)\)", line)
    line = nested[1].strip("'") if nested else line
    return f"'{line[:80]}'"


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LIMIT else f"{line[: LIMIT - 4]} ..."


def _raised(error: BaseException) -> BaseException:
    """Return what a constructor raised: jsonargparse wraps it once for every union around the class."""
    inner = error
    while inner.__cause__ is not None and not isinstance(inner, UserError):
        inner = inner.__cause__
        if isinstance(inner, UserError):
            return inner
    wrapped = error
    while wrapped.__cause__ is not None and str(wrapped).startswith(("Does not validate", "Problem with given")):
        wrapped = wrapped.__cause__
    return wrapped
