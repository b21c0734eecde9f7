"""Finds methods and pairs by name without importing them.

`list` reads a method file's literal `META = {...}` with `ast`; only a requested method is imported.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ctdbench.errors import UserError
from ctdbench.spec import BASELINE, PairSpec, check_name

if TYPE_CHECKING:
    from ctdbench.method import Method

Model = TypeVar("Model", bound=BaseModel)
GROUP = "ctdbench.methods"
_plugins: dict[str, Path] = {}


@dataclass(frozen=True)
class MethodInfo:
    """What `list` says of a method, and where its code is."""

    name: str
    file: Path | None
    meta: Mapping[str, Any]
    entry_point: metadata.EntryPoint | None = None


def shipped_methods() -> Path:
    """The folder of the methods that come with ctdbench."""
    return _package_dir("ctdbench_methods")


def methods() -> dict[str, MethodInfo]:
    """Every method by name: shipped files, entry points, `--plugin` files (before entry points)."""
    found = {_method_name(path): path for path in sorted(shipped_methods().glob("*.py"))}
    found.pop("--init--", None)
    infos = {name: MethodInfo(name, path, _meta(path)) for name, path in found.items()}
    for point in _entry_points():
        file = _module_file(point.module)
        meta = {"title": point.value, **(_meta(file) if file else {})}
        infos.setdefault(point.name, MethodInfo(point.name, file, meta, point))
    infos.update({name: MethodInfo(name, path, _meta(path)) for name, path in _plugins.items()})
    return infos


def add_plugin(path: Path) -> str:
    """Register a method file given on the command line; returns the method's name."""
    if not path.is_file():
        raise UserError(f"plugin {path} is no file")
    name = check_name(_method_name(path), "plugin")
    shipped = shipped_methods() / f"{name.replace('-', '_')}.py"
    # A method that is being written among the shipped ones is itself.
    if shipped.is_file() and not shipped.samefile(path):
        raise UserError(f"plugin {path}: there is a method {name} already", "rename the file")
    _plugins[name] = path
    return name


def load_method(name: str) -> type[Method]:
    """The method class called `name`; raises UserError for an unknown name or a broken plugin."""
    info = pick(name, methods(), "method")
    if BASELINE.fullmatch(name):
        raise UserError(f"method {name!r} has the name of a baseline", "give it another one")
    if name not in _plugins:
        _require_one(check_name(name, "method"), info)
    where: Path | str | None = info.file
    hint = "a method file ends in METHOD = YourClass"
    if info.entry_point:
        where = f"entry point {info.entry_point.value}"
        hint = "an entry point is PACKAGE.MODULE:CLASS, or a module with METHOD = YourClass"
    try:
        loaded = info.entry_point.load() if info.entry_point else _import(info).METHOD
    except (Exception, SystemExit) as error:
        raise UserError(
            f"method {name!r} ({where}) cannot be imported: {type(error).__name__}: {error}", hint
        ) from error
    found = getattr(loaded, "METHOD", loaded)
    if not (isinstance(found, type) and issubclass(getattr(found, "Options", int), BaseModel)):
        raise UserError(f"method {name!r} ({where}) is no subclass of ctdbench's Method", hint)
    return found


def _entry_points() -> Iterable[metadata.EntryPoint]:
    return metadata.entry_points(group=GROUP)


def _require_one(name: str, info: MethodInfo) -> None:
    """Raise UserError if several installed methods have the name: which one ran would be chance."""
    claims = {point.value for point in _entry_points() if point.name == name}
    if info.entry_point is None and claims:
        raise UserError(
            f"method {name!r} is ctdbench's own, and the entry point {min(claims)} claims its name",
            "uninstall that package, or rename its entry point",
        )
    if len(claims) > 1:
        raise UserError(
            f"method {name!r}: entry points {' and '.join(sorted(claims))} have that name",
            "uninstall one of the packages",
        )


def pair_files() -> dict[str, Path]:
    """Every shipped pair by name."""
    return {path.stem: path for path in sorted(_package_dir("ctdbench.pairs").glob("*.yaml"))}


def load_pair(name: str) -> PairSpec:
    """The pair called `name`, or the one in the YAML file of that path."""
    is_path = is_file_name(name)
    path = Path(name).expanduser() if is_path else pick(name, pair_files(), "pair")
    raw = read_yaml(path)
    if "name" not in raw:
        raw["name"] = check_name(path.stem, f"{path}: the file's name, which is the pair's,")
    return validate(PairSpec, raw, str(path) if is_path else f"pair {name}")


def is_file_name(name: str) -> bool:
    """Whether a pair or task is stated by its YAML file."""
    return name.endswith((".yaml", ".yml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; raises UserError naming the file and line of a mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is no text in UTF-8: {error}") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of fields, not {type(raw).__name__}")
    if odd := [name for name in raw if not isinstance(name, str)]:
        raise UserError(f"{path}: {odd[0]!r} is no name of a field", "quote it")
    return raw


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML document; raises UserError naming `where` and the line of a mistake."""
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML lets through what numbers, dates and deep nesting raise
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark and mark.line else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{where}{line} is no valid YAML: {problem}") from error


def validate(model: type[Model], raw: Mapping[str, Any], where: str) -> Model:
    """`raw` as `model`; raises UserError with one line naming a field at fault.

    One that does not exist before all others: it may be a missing one, misspelt.
    """
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        found = error.errors(include_url=False)
        first = min(found, key=lambda one: one["type"] != "extra_forbidden")
        field = ".".join(str(part) for part in first["loc"])
        reason, hint = first["msg"].removeprefix("Value error, "), ""
        if first["type"] == "extra_forbidden":
            reason, hint = "no such field", _meant(first["loc"], found, model)
        elif first["type"] == "tuple_type":
            reason = "Input should be a list"
        raise UserError(
            f"{where}: {field}: {reason}" if field else f"{where}: {reason}", hint
        ) from error


def _meant(loc: tuple[int | str, ...], found: Sequence[Any], model: type[BaseModel]) -> str:
    """What a field that does not exist may have been; within a part, first one missing there."""
    lacking = [one["loc"] for one in found if one["type"] == "missing"]
    beside = [str(other[-1]) for other in lacking if len(loc) > 1 and other[:-1] == loc[:-1]]
    known = beside or _fields_of(model, loc[:-1])
    return suggestion(str(loc[-1]), known) if known else ""


def _fields_of(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the part at `loc`; [] for what has no names of its own."""
    for part in (part for part in loc if isinstance(part, str)):
        field = model.model_fields.get(part)
        found = next(_models_in(field.annotation), None) if field else None
        if found is None:
            return []
        model = found
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


Entry = TypeVar("Entry")


def pick(name: str, known: Mapping[str, Entry], kind: str) -> Entry:
    """The entry of that name; raises UserError with the nearest alternatives."""
    if name not in known:
        own = " (a method of your own needs --plugin FILE)" if kind == "method" else ""
        raise UserError(f"unknown {kind} {name!r}", suggestion(name, known) + own)
    return known[name]


def suggestion(name: str, known: Iterable[str]) -> str:
    """A hint with the nearest names, or with all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names)}"


def _package_dir(package: str) -> Path:
    return Path(str(resources.files(package)))


def _method_name(path: Path) -> str:
    return path.stem.replace("_", "-")


def _module_file(module: str) -> Path | None:
    """A module's Python file, found without importing it or its packages; None if not there."""
    name, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(name)
        for part in inner:
            name = f"{name}.{part}"
            places = spec.submodule_search_locations if spec else None
            spec = PathFinder.find_spec(name, list(places)) if places else None
    except (ImportError, ValueError):  # a broken finder, a module without a spec
        return None
    found = spec.origin if spec else None
    return Path(found) if found and found.endswith(".py") else None


def _meta(path: Path) -> Mapping[str, Any]:
    """The literal META of a method file; empty where there is none or the file does not parse."""
    try:
        return _literal_meta(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # as ast raises them
        return {}


def described(info: MethodInfo, option: str) -> str:
    """What a method's file says of an option: its default and description; "" without a file."""
    try:
        return _described(info.file.read_text(encoding="utf-8"), option) if info.file else ""
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # as ast raises them
        return ""


def _described(code: str, option: str) -> str:
    """Of `option: TYPE = Field(DEFAULT, description=TEXT)`."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.AnnAssign(ast.Name(name), value=ast.Call(args=[default], keywords=stated)) if (
                name == option
            ):
                told = {word.arg: ast.literal_eval(word.value) for word in stated}
                text = told.get("description", "")
                return f"{text} Default: {ast.literal_eval(default)}.".strip()
    return ""


@cache
def _literal_meta(code: str) -> Mapping[str, Any]:
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "META" for target in node.targets
        ):
            try:
                meta = ast.literal_eval(node.value)
            except ValueError:
                return {}
            return meta if isinstance(meta, dict) else {}
    return {}


def _import(info: MethodInfo) -> Any:
    path = info.file
    assert path is not None
    if info.name not in _plugins:
        return importlib.import_module(f"ctdbench_methods.{path.stem}")
    module_name = f"ctdbench_plugin_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    module_spec.loader.exec_module(module)
    return module
