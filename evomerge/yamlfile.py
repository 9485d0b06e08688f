"""Strict YAML: a file becomes plain data, plain data a pydantic model, and every error one sentence.

Scalars follow YAML 1.2: `1e-5` is a number, `no` and `2026-01-01` are text, only `true` and `false` are
booleans. A key given twice is an error, and so is a key that the model does not know; the message names
the nearest one that it does.

Imports: `evomerge.errors` only.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, TypeAdapter, ValidationError

from evomerge.errors import ConfigError

Key = str | int
T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """Base of the models of our YAML files: unknown keys and non-finite numbers are errors, values frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 and without duplicate keys."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Here and not in the constructor: later `<<` has been flattened and overrides look like duplicates.
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"key `{key.value}` is given twice; remove one of them"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return node


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": (r"<<", ["<"]),
}
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), _first)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file `path`.

    Raises:
        ConfigError: no such file, not YAML, more than one document, a key given twice, or not a mapping.
    """
    data = _parsed(path, lambda text: yaml.load(text, Loader=_Loader))
    if not isinstance(data, dict):
        found = "empty" if data is None else f"a {_kind(data)}"
        raise ConfigError(
            f"{path}: the file is {found}, but it must be a mapping of keys to values; add keys"
        )
    return data


def load_documents(path: str | Path) -> list[Any]:
    """Every document in the YAML file `path`, whatever its type; None for an empty one.

    Raises:
        ConfigError: no such file, not YAML, or a key given twice.
    """
    return _parsed(path, lambda text: list(yaml.load_all(text, Loader=_Loader)))


def _parsed(path: str | Path, parse: Callable[[str], T]) -> T:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}); check the path") from error
    try:
        return parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_yaml_problem(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {error}; correct the file") from error


def validate(model_class: type[Model], data: Any, where: str | Path, path: Sequence[Key] = ()) -> Model:
    """`data` as an instance of `model_class`.

    Args:
        where: the file, with which every line of the message begins.
        path: keys that lead to `data` inside the file.

    Raises:
        ConfigError: one line for each problem: `file: key.path`, what was found, what is allowed.
    """
    try:
        return model_class.model_validate(data)
    except ValidationError as error:
        found = [(_data_path(item, data), item) for item in error.errors(include_url=False)]
        lines: dict[str, None] = {}  # an ordered set: branches of a union may say the same
        for keys, item in found:
            # `str | Section` given a mapping: what is wrong inside the section says more than "not a string"
            if not any(len(other) > len(keys) and other[: len(keys)] == keys for other, _ in found):
                lines[f"{where}: {_sentence(model_class, data, keys, item, path)}"] = None
        raise ConfigError("\n".join(lines)) from error


def suggestion(found: str, allowed: Iterable[str]) -> str:
    """`did you mean ...?` with the nearest of `allowed`, or all of them when none is near."""
    names = [str(name) for name in allowed]
    near = difflib.get_close_matches(found, names, n=1)
    return f"did you mean `{near[0]}`?" if near else f"allowed: {', '.join(names) or 'none'}"


def dotted(keys: Sequence[Key]) -> str:
    """`("tasks", "math", "stop", 1)` as `tasks.math.stop[1]`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.removeprefix(".")


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return f"not YAML: {' '.join(str(error).split())}; correct the file"
    if "given twice" in problem:
        return f"line {mark.line + 1}: {problem}"
    return f"line {mark.line + 1}: not YAML: {problem}; correct the line or the one before"


def _data_path(item: Any, data: Any) -> tuple[Key, ...]:
    """Where in `data` an error lies: pydantic's location without the names of union branches."""
    keys: list[Key] = []
    missing = item["type"] == "missing"
    for position, part in enumerate(item["loc"]):
        inside = isinstance(data, Mapping) and part in data
        inside = inside or (isinstance(data, list) and isinstance(part, int) and part < len(data))
        if inside:
            data = data[part]
            keys.append(part)
        elif missing and position == len(item["loc"]) - 1:
            keys.append(part)
    return tuple(keys)


def _sentence(
    model: type[BaseModel], data: Any, keys: tuple[Key, ...], item: Any, path: Sequence[Key]
) -> str:
    full, message = dotted([*path, *keys]), str(item["msg"])
    message = _translated(message).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"unknown key `{full}`; {suggestion(str(keys[-1]), _fields_at(model, keys[:-1]))}"
    if item["type"] == "missing":
        return f"`{full}` is missing; add it"
    if item["type"] == "invalid_key":
        return f"key `{keys[-1]}` in `{dotted([*path, *keys[:-1]]) or 'file'}` must be text; quote it"
    if item["type"] == "literal_error":
        hint = suggestion(str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]))
        return (
            f"unknown key `{full}`; {hint}"
            if "[key]" in item["loc"]
            else f"`{full}` is {_shown(item['input'])}; {hint}"
        )
    if item["type"] == "value_error":
        return f"`{full}`: {message}" if full else message
    message = re.sub(r"^(?:Input|String|Mapping|List) | after validation, not .*", "", message)
    return f"`{full or 'file'}` is {_shown(item['input'])}, but it {message}"


def _translated(message: str) -> str:
    """A message of pydantic with YAML's names of types."""
    for python, ours in (
        ("dictionary", "mapping"),
        ("Dictionary", "Mapping"),
        ("tuple", "list"),
        ("Tuple", "List"),
    ):
        message = message.replace(python, ours)
    return message


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {_kind(value)}"


def _kind(value: Any) -> str:
    names = {dict: "mapping", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def _fields_at(annotation: Any, keys: Sequence[Key]) -> list[str]:
    """Names of the fields of every model that `keys` may lead to, starting from `annotation`."""
    options = list(_options(annotation))
    for key in keys:
        options = [inner for option in options for step in _step(option, key) for inner in _options(step)]
    models = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
    return list(
        dict.fromkeys(field.alias or name for model in models for name, field in model.model_fields.items())
    )


def _options(annotation: Any) -> Iterator[Any]:
    """Members of a union, through `Annotated`; any other annotation stands for itself."""
    if get_origin(annotation) is Annotated:
        yield from _options(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _options(member)
    else:
        yield annotation


def _step(annotation: Any, key: Key) -> Iterator[Any]:
    """The annotation of `annotation[key]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from (f.annotation for name, f in annotation.model_fields.items() if key in (name, f.alias))
    elif get_args(annotation):
        arguments = [argument for argument in get_args(annotation) if argument is not Ellipsis]
        yield arguments[-1]


FileSize = Annotated[ByteSize, Field(ge=1_000_000)]  # a bare 5 is 5 bytes and most likely a mistake


def file_size(size: str | int, name: str) -> int:
    """The bytes of `500MB`, `5GB` or `2GiB`, or a number of bytes; `name` is what the user knows it by.

    Raises:
        ConfigError: it is not a size, or below 1 MB.
    """
    try:
        return int(TypeAdapter(FileSize).validate_python(size))
    except ValidationError as error:
        allowed = "a size of at least 1MB, such as 500MB, 5GB or 2GiB"
        raise ConfigError(f"{name} is {size!r}; it can be {allowed}") from error
