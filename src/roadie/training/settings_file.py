"""YAML files of settings, read with YAML's safe loader."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from roadie.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also takes 1e-3 for a number (YAML 1.1 wants 1.0e-3), and refuses a key that is said twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node; PyYAML would silently take the last of two values."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        double = sorted({str(key) for key in keys if keys.count(key) > 1})
        if double:
            raise ConfigError(
                f"got {', '.join(double)} twice in the mapping at line {node.start_mark.line + 1}; wanted it once"
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def read_yaml(path: Path) -> Any:
    """What a YAML file says; raises `ConfigError`, naming the file, where it is no YAML in UTF-8."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (ConfigError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
