"""Interpolations in a config: marks text from resolvers such as oc.env, so that its resolved value is
not written to files.

References such as `${run.name}` are followed. Calls such as `${oc.env:TOKEN}`, and anything else, are not:
such text keeps its source.
"""

from __future__ import annotations

import re
from typing import Any

from omegaconf import AnyNode, DictConfig, ListConfig, Node, StringNode, ValueNode

from hybridtrain.config import words

_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
_REFERENCE = re.compile(r"\$\{\s*([\w.\[\]]+)\s*\}")  # ${run.name}, ${run[name]}, but not ${oc.env:TOKEN}
_MOST_DEPTH = 64
"""Depth to which references are followed."""


class Interpolated(str):
    """A resolved string with its interpolation as `source`, which is written to files instead, since it
    may be a secret.
    """

    source: str

    def __new__(cls, value: str, source: str) -> Interpolated:
        made = super().__new__(cls, value)
        made.source = source
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.source


def marked(value: Any, node: Any, root: DictConfig) -> Any:
    """`value`, with strings that come from a resolver such as oc.env, directly or through
    other options, as Interpolated.
    """
    if isinstance(value, dict | list) and node is not None and node._is_interpolation():
        node = node._maybe_dereference_node()
    if isinstance(value, dict) and isinstance(node, DictConfig):
        return {key: marked(item, node._get_node(key), root) for key, item in value.items()}
    if isinstance(value, list) and isinstance(node, ListConfig):
        return [marked(item, node._get_node(index), root) for index, item in enumerate(value)]
    source = node._value() if isinstance(node, Node) else None
    if isinstance(value, str) and isinstance(source, str) and _from_resolver(source, root, depth=0):
        return Interpolated(value, source)
    return value


def _from_resolver(source: str, root: DictConfig, *, depth: int) -> bool:
    """Whether `source`, or anything that it refers to, calls a resolver.

    All but plain references count as calls.
    """
    begun, references = len(_INTERPOLATION.findall(source)), _REFERENCE.findall(source)
    if begun > len(references) or depth > _MOST_DEPTH:
        return True  # a call, or nested references, which are not followed
    return begun > 0 and any(
        name.startswith(".") or _reaches(_target(root, name), root, depth=depth + 1) for name in references
    )


def _target(root: DictConfig, name: str) -> Any:
    """The node that a reference such as run.name or run[name] points to; None if there is none."""
    node: Any = root
    for key in re.findall(r"[^.\[\]]+", name):
        if isinstance(node, DictConfig | ListConfig) and node._is_interpolation():
            node = node._maybe_dereference_node()
        if isinstance(node, DictConfig):
            node = node._get_node(key)
        elif isinstance(node, ListConfig) and key.isdecimal():
            node = node._get_node(int(key))
        else:
            return None
    return node


def _reaches(node: Any, root: DictConfig, *, depth: int) -> bool:
    if depth > _MOST_DEPTH:
        return True
    if isinstance(node, DictConfig | ListConfig) and not node._is_interpolation():
        places = list(node) if isinstance(node, DictConfig) else range(len(node))
        return any(_reaches(node._get_node(place), root, depth=depth + 1) for place in places)
    source = node._value() if isinstance(node, Node) else None
    return isinstance(source, str) and _from_resolver(source, root, depth=depth)


def keep_calls(node: Any, root: DictConfig) -> None:
    """Replace values that call a resolver, directly or through references, by their source text.

    Raises ValueError if such a value is not a string.
    """
    for place in list(node) if isinstance(node, DictConfig) else range(len(node)):
        child = node._get_node(place)
        source = child._value() if isinstance(child, Node) else None
        if isinstance(child, DictConfig | ListConfig) and not child._is_interpolation():
            if not child._is_none() and not child._is_missing():
                keep_calls(child, root)
        elif (
            isinstance(source, str)
            and _INTERPOLATION.search(source)
            and _from_resolver(source, root, depth=0)
        ):
            if isinstance(child, DictConfig | ListConfig) or (
                isinstance(child, ValueNode) and not isinstance(child, StringNode | AnyNode)
            ):
                raise ValueError(
                    f"has {child._get_full_key(None)}={source}, "
                    "which is not looked up for a run that is only read"
                )
            child._set_value(words.escaped(source))
