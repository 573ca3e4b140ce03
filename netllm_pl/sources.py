"""Where settings come from: config files and the command line, as trees; and which name in them is a mistake."""

import dataclasses
import inspect
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from netllm_pl.errors import UserError, unknown
from netllm_pl.plain_yaml import load_yaml

CLASSES = {"model": "task", "data": "data module"}
"""Settings that name a class, and what it is called."""

PARTS = ("class_path", "init_args", "dict_kwargs")


class Source(NamedTuple):
    """Settings from one place.

    Attributes:
        name: A file, or ``command line``.
        tree: What it sets, nested by key.
    """

    name: str
    tree: dict[str, Any]


def files_first(words: Sequence[str]) -> list[str]:
    """Move every ``--config FILE`` to the front: the command line wins over files wherever its options stand."""
    files: list[str] = []
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if word in ("-c", "--config"):
            files += [word, *([value] if (value := next(left, None)) is not None else [])]
        else:
            (files if word.startswith(("--config=", "-c=")) else rest).append(word)
    return [*files, *rest]


def fold_nulls(words: Sequence[str]) -> list[str]:
    """Write ``--model.backbone.lora null`` as ``--model.init_args.backbone={lora: null}``.

    jsonargparse 4.53 takes the former, inside a dataclass, for the path of a class.
    """
    text = [*words]
    for place, word in enumerate(words):
        key, _, value = word.partition("=")
        apart = not value and [*words, ""][place + 1] == "null"
        parts = [part for part in key.removeprefix("--").split(".") if part != "init_args"]
        if not word.startswith("--") or parts[0] not in CLASSES or len(parts) < 3 or not (apart or value == "null"):
            continue
        inner = ": {".join(parts[2:]) + ": null" + "}" * (len(parts) - 2)
        text[place] = f"--{parts[0]}.init_args.{parts[1]}={{{inner}"
        if apart:
            text[place + 1] = ""
    return [word for word, old in zip(text, words, strict=True) if word or not old]


def read_sources(words: Sequence[str]) -> list[Source]:
    """Read the config files and options of a command line, in the order in which they count.

    Raises:
        UserError: A file is missing, is no YAML, or holds no mapping.
    """
    found: list[Source] = []
    for option, value in _options(files_first(words)):
        if option in ("-c", "--config"):
            if value and not value.lstrip().startswith("{"):
                found.append(Source(value, read_yaml(Path(value))))
        elif option.startswith("--"):
            found.append(Source("command line", _nested(option[2:].removesuffix("+"), value)))
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a config file.

    Raises:
        UserError: It is missing, is no YAML, or holds no mapping.
    """
    if not path.is_file():
        beside = [str(file) for file in path.parent.glob("[!.]*.yaml")] if path.parent.is_dir() else []
        near = get_close_matches(str(path), beside, n=1)
        guess = f"did you mean {near[0]}?" if near else "give the path of a YAML file"
        raise UserError(f"config file {path} does not exist; {guess}")
    try:
        tree = load_yaml(path.read_text())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"
        raise UserError(f"{path}, {where}: broken YAML: {error.problem}; check brackets and indentation") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # of characters that YAML does not know, PyYAML says what they are in many lines
        reason = "" if isinstance(error, yaml.reader.ReaderError | UnicodeDecodeError) else f" ({error})"
        raise UserError(f"{path}: is no text in YAML{reason}; give a file such as configs/<task>.yaml") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds no settings; expected keys such as model:, data:, trainer:")
    return {str(key): value for key, value in tree.items()}


def find_mistake(words: Sequence[str], dests: Iterable[str]) -> UserError | None:
    """Look for a missing or broken file, a misspelt class, or a misspelt key.

    Args:
        words: Command line behind the command.
        dests: All keys that the command takes, with dots.
    """
    try:
        sources, known = read_sources(words), set(dests)
        classes: dict[str, type | None] = {}
        for source in sources:
            for key, value in source.tree.items():
                if key in CLASSES and f"{key}.help" in known:  # `evaluate` ignores the model: its parser knows no class
                    _check_class(source.name, key, value, classes)
                else:
                    _check_keys(source.name, key, value, known)
        for key, cls in classes.items():
            if cls is None:
                raise UserError(f"{key}.class_path is missing; known: {', '.join(sorted(known_classes(key)))}")
    except UserError as mistake:
        return mistake
    return None


def origin(key: str, words: Sequence[str]) -> str | None:
    """Return the file that sets a key, or ``command line``: the last one that does.

    Args:
        key: With dots, without ``init_args``.
        words: Command line behind the command.
    """
    parts = key.split(".")
    path = [parts[0], "init_args", *parts[1:]] if parts[0] in CLASSES and len(parts) > 1 else parts
    found = None
    for source in read_sources(words):
        tree: Any = source.tree
        for part in path:
            tree = tree.get(part, path) if isinstance(tree, Mapping) else path
        found = found if tree is path else source.name
    return found


def known_classes(key: str) -> dict[str, type]:
    """Classes that ``model`` or ``data`` can name."""
    from netllm_pl.data import NetDataModule
    from netllm_pl.discovery import concrete_subclasses
    from netllm_pl.task import NetTask

    return dict(concrete_subclasses(NetTask if key == "model" else NetDataModule))


def shortlist(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names, or only those near the given one if all would not fit on two lines."""
    names = sorted(known)
    return names if len(", ".join(names)) <= 200 else get_close_matches(name, names, n=5, cutoff=0.3)


def _options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Split a command line into options and their values."""
    place = 0
    while place < len(words):
        word, _, value = words[place].partition("=")
        place += 1
        if "=" in words[place - 1] or not word.startswith("-"):
            yield word, value
        elif place < len(words) and not words[place].startswith("--"):
            place += 1
            yield word, words[place - 1]
        else:
            yield word, None


def _nested(key: str, value: str | None) -> dict[str, Any]:
    try:
        tree: Any = None if value is None else load_yaml(value)
    except yaml.YAMLError:
        tree = value
    parts = key.split(".")
    if parts[0] in CLASSES and len(parts) > 1 and parts[1] not in (*PARTS, "help"):
        parts.insert(1, "init_args")  # the command line may leave it out
    for part in reversed(parts):
        tree = {part: tree}
    return dict(tree)


def _check_keys(source: str, key: str, value: Any, known: set[str]) -> None:
    """Check a key, and those below it, against keys with dots."""
    parent, _, name = key.rpartition(".")
    above = f"{parent}." if parent else ""
    level = {dest.removeprefix(above).split(".")[0] for dest in known if dest.startswith(above)}
    if name not in level:
        raise _unknown_key(source, parent, name, level - {"help", "config", "print_config"})
    if isinstance(value, Mapping) and any(dest.startswith(f"{key}.") for dest in known):
        for inner, part in value.items():
            _check_keys(source, f"{key}.{inner}", part, known)


def _check_class(source: str, key: str, value: Any, classes: dict[str, type | None]) -> None:
    """Check the class that a source names, and the arguments it gives to the class named so far."""
    if isinstance(value, str):
        if Path(value).suffix in (".yaml", ".yml"):
            return _check_class(value, key, read_yaml(Path(value)), classes)
        value = {"class_path": value}
    if not isinstance(value, Mapping):
        return None
    for part in value:
        if part not in (*PARTS, "help"):
            raise _unknown_key(source, key, str(part), PARTS)
    classes.setdefault(key, None)
    name = value.get("class_path")
    if name is not None:
        known = known_classes(key)
        short = str(name).rpartition(".")[2]
        if short not in known and short == name:
            mistake = unknown(CLASSES[key], short, shortlist(short, known))
            raise UserError(f"{source}: {key}.class_path: {mistake}")
        classes[key] = known.get(short, object)
    cls, arguments = classes[key], value.get("init_args")
    if cls not in (None, object) and isinstance(arguments, Mapping):
        _check_arguments(source, key, cls, arguments)
    return None


def _check_arguments(source: str, path: str, cls: Any, arguments: Mapping[str, Any]) -> None:
    names = list(inspect.signature(cls).parameters)
    hints = typing.get_type_hints(cls.__init__)
    for name, value in arguments.items():
        if name not in names:
            raise _unknown_key(source, path, str(name), names)
        kinds = (hints.get(name), *typing.get_args(hints.get(name)))
        config = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if config is None:
            continue
        where = source
        if isinstance(value, str) and Path(value).suffix in (".yaml", ".yml"):
            where, value = value, read_yaml(_beside(source, value))
        if isinstance(value, Mapping):
            _check_arguments(where, f"{path}.{name}", config, value)


def _beside(source: str, value: str) -> Path:
    """A file inside a file is relative to that file."""
    return Path(value) if source == "command line" else Path(source).parent / value


def _unknown_key(source: str, parent: str, name: str, known: Iterable[str]) -> UserError:
    where = f" of {parent}" if parent else ""
    return UserError(f"{source}: {unknown(f'key{where}', name, shortlist(name, known))}")
