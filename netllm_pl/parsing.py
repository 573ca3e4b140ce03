"""Argument parsers whose errors are one or two lines that name the known classes and keys."""

from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

from netllm_pl.errors import UserError


class _Helpful:
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the parser's complaint as a UserError instead of printing the usage."""
        raise UserError(explain(message)) from ex


class Parser(_Helpful, ArgumentParser):  # type: ignore[misc]  # narrows error() to raising
    """jsonargparse's parser with short errors."""


class LightningParser(_Helpful, LightningArgumentParser):  # type: ignore[misc]  # narrows error() to raising
    """LightningCLI's parser with short errors."""


def explain(message: str) -> str:
    """Shorten a complaint of jsonargparse."""
    return message


