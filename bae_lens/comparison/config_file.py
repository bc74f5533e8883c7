"""A comparison's config file: YAML that is read within limits, and the dictionaries that it describes."""

import reprlib
from collections import Counter
from collections.abc import Hashable
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from bae_lens.comparison.dictionaries import DictionarySpec, PretrainedSpec, as_given

CONFIG_BYTES = 2**18  # of a config file; fifty dictionaries, described in full, take a tenth


def read_specs(path: Path) -> tuple[dict[str, Any], dict[str, DictionarySpec | PretrainedSpec]]:
    """A comparison's config file in YAML: its settings, and the `dictionaries` under their names.

    Raises ValueError for a file that is no mapping or larger than `CONFIG_BYTES`, for two dictionaries of one name, for
    unknown keys, and for aliases, with which a few lines can stand for more values than fit in memory.
    """
    with path.open("rb") as file:
        text = file.read(CONFIG_BYTES + 1)
    if len(text) > CONFIG_BYTES:
        raise ValueError(f"{path} has more than {CONFIG_BYTES} bytes, which no config file needs; choose another")
    try:
        content = yaml.load(text.decode(), _PlainYaml)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML that can be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(content).__name__}")
    dictionaries = content.pop("dictionaries", None) or {}
    if not isinstance(dictionaries, dict):
        raise ValueError(
            f"{path}: dictionaries must be a mapping from names to descriptions, got {reprlib.repr(dictionaries)}"
        )
    for name in dictionaries:
        if not isinstance(name, str):
            raise ValueError(f"{path}: the name of a dictionary must be text, got {name!r}; put it in quotes")
    return content, {name: _spec(path, name, spec) for name, spec in dictionaries.items()}


def _spec(path: Path, name: str, content: Any) -> DictionarySpec | PretrainedSpec:
    is_pretrained = isinstance(content, dict) and "pretrained" in content
    kind, needed = (PretrainedSpec, "pretrained") if is_pretrained else (DictionarySpec, "architecture")
    known = {spec_field.name for spec_field in fields(kind)}
    if not isinstance(content, dict) or not {needed} <= content.keys() <= known:
        raise ValueError(f"{path}: dictionary {name!r} takes {', '.join(sorted(known))}, got {reprlib.repr(content)}")
    return as_given(kind, content, f"{path}: dictionary {name!r}")


class _PlainYaml(yaml.SafeLoader):
    """YAML in which a key that comes twice and an alias are errors: neither replaces or multiplies in silence."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "aliases are not read; write the value out", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = (self.construct_object(key, deep=True) for key, _ in node.value)
        for key, count in Counter(key for key in keys if isinstance(key, Hashable)).items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)
