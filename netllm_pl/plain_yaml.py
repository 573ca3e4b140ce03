"""YAML as plain data: no tag makes an object, and no alias makes a few lines into gigabytes."""

from typing import Any

import yaml

LARGEST = 10**6
"""Values of a document, counted as often as they are named."""


def load_yaml(text: str) -> Any:
    """Read one YAML document of dicts, lists, texts, numbers and dates.

    Raises:
        yaml.YAMLError: It is no such document, asks for an object of Python, is nested too deep, holds itself, or names
            its parts until they are more than a million.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deep") from error
    except (ValueError, OverflowError) as error:  # a date or number that is none
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _weigh(node: yaml.Node, known: dict[int, int]) -> int:
    if id(node) not in known:
        known[id(node)] = LARGEST + 1  # what it is if it holds itself
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in pairs for part in pair]
        known[id(node)] = 1 + sum(_weigh(part, known) for part in parts)
    if known[id(node)] > LARGEST:
        raise yaml.YAMLError("an anchor that holds itself, or aliases that make it millions of values")
    return known[id(node)]
