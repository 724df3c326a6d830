"""YAML that may be anybody's: plain data alone, bounded in size, in depth and in what its aliases come to. Pure."""

from typing import Any

import yaml

MAX_CHARS = 4 * 1024 * 1024
MAX_VALUES = 200_000
"""What stands behind an alias counts as often as it is named: ten lines of aliases can name a billion values."""
MAX_DEPTH = 50


class TooMuch(yaml.YAMLError):
    """YAML that is well formed and beyond all reason."""


def load_yaml(text: str) -> Any:
    """The one document of a text. Raises yaml.YAMLError, also for tags of Python and for more than is bearable."""
    if len(text) > MAX_CHARS:
        raise TooMuch(f"more than {MAX_CHARS:,} characters")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 1)
        return loader.construct_document(node)
    except RecursionError:
        raise TooMuch(f"more than {MAX_DEPTH} levels") from None
    except (ValueError, OverflowError) as error:  # a date such as 2026-13-45, which the library does not look at
        raise TooMuch(str(error)) from None
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Values of a node, aliases followed; a node that contains itself is as deep as can be."""
    if depth > MAX_DEPTH:
        raise TooMuch(f"more than {MAX_DEPTH} levels")
    if id(node) not in known:
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inside = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inside = node.value
        count = 1 + sum(_count(one, known, depth + 1) for one in inside)
        if count > MAX_VALUES:
            raise TooMuch(f"more than {MAX_VALUES:,} values, aliases followed")
        known[id(node)] = count
    return known[id(node)]
