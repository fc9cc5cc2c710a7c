"""YAML that means what people write: the plain values of YAML 1.2, and no key lost.

PyYAML follows YAML 1.1, which reads 0100 as 64, 1:30 as 90, `no` as false and 3e-4 as text, and keeps the last of
two equal keys. Here such a value stays the text that it is, and two equal keys are an error.
"""

import re
from typing import Any

import yaml

from duollm.errors import UserError

_PLAIN = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9](?:_?[0-9])*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9](?:_?[0-9])*)(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+))"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}


class _Loader(yaml.SafeLoader):
    """A loader without YAML 1.1's surprises."""

    yaml_implicit_resolvers: Any = {}  # noqa: RUF012 - PyYAML's own, copied by add_implicit_resolver

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        lines: dict[str, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # else PyYAML refuses it
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in lines:
                where = f"line {line}" if line == lines[key] else f"lines {lines[key]} and {line}"
                raise UserError(f"{key!r} is given twice, in {where}; keep one of them")
            lines[key] = line
        return super().construct_mapping(node, deep)

    def _whole_number(self, node: Any) -> int:
        return int(self.construct_scalar(node).replace("_", ""))

    def _text(self, node: Any) -> str:
        text = str(self.construct_scalar(node))
        if "\0" in text or text != text.encode("utf-8", "ignore").decode("utf-8"):
            raise UserError(f"{text!r} holds a character that no file can be named or written with")
        return text


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text."""


for _name, (_pattern, _first) in _PLAIN.items():
    _resolver = (f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), ["", *_first])
    _Loader.add_implicit_resolver(*_resolver)
    _Dumper.add_implicit_resolver(*_resolver)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader._whole_number)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader._text)


def load(text: str) -> Any:
    """Read one YAML value.

    Raises:
        UserError: it is no YAML, a key stands twice, or it is nested too deeply; one line.
    """
    try:
        return yaml.load(text, _Loader)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"not readable as YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError("lists or sections are nested too deeply") from None


def load_argument(text: str) -> Any:
    """Read a YAML value from the command line, where `#` starts no comment.

    Raises:
        UserError: as `load`, or something follows the value, or a list ends with an empty item.
    """
    if re.search(r",\s*\]\s*$", text):
        raise UserError("its last item is empty (an unset shell variable?)")
    value = load(text)
    node = yaml.compose(text, _Loader)
    end = node.end_mark.index if node else 0
    if text[end:].strip():
        raise UserError(f"{text[end:].strip()!r} follows the value; leave it out")
    return value


def dump(value: Any) -> str:
    """Write a value that `load`, and YAML 1.1 too, reads back as it is."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
