"""From command line to dataclasses: Hydra composes the YAML files, `convert` checks every key, type and value once.

The only file that knows Hydra and OmegaConf. Nothing here imports a class named in a file, and nothing evaluates text:
of what Hydra and YAML can do, composable.py lets through only what a table of values needs.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastssl import composable, tuned
from fastssl.settings import Config
from shard_tools.remote import shown

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that the user wrote wrongly; the message names key, value and remedy."""


def config_dir() -> Path:
    """Where the YAML files are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    shipped = package / "configs"
    return shipped if shipped.is_dir() else package.parent / "configs"


def load(overrides: Sequence[str], name: str = "train") -> Config:
    """The checked `Config` of a training run, its open loader settings filled by tuned.py. Raises ConfigError."""
    return tuned.fill(convert(Config, compose(name, overrides)))


def compose(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The plain, resolved tree of `configs/<name>.yaml` after overrides such as "run.seed=1". Raises ConfigError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        composable.check_overrides(overrides, config_dir())
        composable.check_files(config_dir())
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            tree = hydra_compose(name, overrides=list(overrides))
            composable.check_tree(OmegaConf.to_container(tree, resolve=False))
            return OmegaConf.to_container(tree, resolve=True, throw_on_missing=False)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException, YAMLError, RecursionError) as error:
        raise ConfigError(_explain(name, overrides, error)) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def convert(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build the dataclass `cls` from a mapping, recursively.

    Numbers written as int become float where a float is wanted; lists become tuples. Anything else of the wrong type,
    an unknown key, a missing value, or a ValueError of the dataclass itself raises ConfigError with the full key.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(_unknown_key(_join(path, str(key)), [_join(path, k) for k in known]))
    arguments = {key: convert_value(hints[key], value, _join(path, key)) for key, value in values.items()}
    for key, f in known.items():
        if key not in arguments and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_join(path, key)} is missing; give it as {_join(path, key)}=VALUE")
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def run_command(run: Callable[[list[str]], int | None], help_text: str, argv: Sequence[str] | None = None) -> int:
    """What every fastssl command does around `run(overrides)`: --help, --version, errors as sentences, the exit code.

    What a user can mend is said in one sentence, without a traceback; of several ranks one says it (failing.py).
    """
    from fastssl import __version__

    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(a in ("-h", "--help") for a in arguments):
        print(help_text.strip())
        return 0
    if "--version" in arguments:
        print(__version__)
        return 0
    from fastssl import failing

    try:
        return run(arguments) or 0
    except BaseException as error:
        return failing.end(error)


def convert_value(hint: Any, value: Any, path: str) -> Any:
    """One value checked against a type such as int, Literal[...] or a dataclass. Raises ConfigError naming `path`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = [a for a in arguments if a is not type(None)]
        return convert_value(hint, value, path)
    if value == "???":
        raise ConfigError(f"{path} is missing; give it as {path}=VALUE")
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {value!r}, but must be a group of settings")
        return convert(typing.cast(type, hint), value, path)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {value!r}, but must be a group of settings")
        return {str(k): convert_value(arguments[1], v, _join(path, str(k))) for k, v in value.items()}
    if origin is tuple:
        return _sequence(arguments, value, path)
    if origin is typing.Literal:
        if value not in arguments:
            choices = ", ".join(str(a) for a in arguments)
            raise ConfigError(
                f"{path} is {value!r}, but must be one of {choices}{_did_you_mean(str(value), arguments)}"
            )
        return value
    return _scalar(hint, value, path)


def _sequence(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{path} is {value!r}, but must be a list such as [1, 2]")
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise ConfigError(f"{path} is {list(value)!r}, but must have {len(arguments)} entries")
    hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
    return tuple(convert_value(h, v, f"{path}[{i}]") for i, (h, v) in enumerate(zip(hints, value)))


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    raise ConfigError(f"{path} is {value!r}, but must be {names.get(hint, hint)}")


def _explain(name: str, overrides: Sequence[str], error: Exception) -> str:
    """Hydra's several-line message as one sentence, with the nearest existing key or group option."""
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if "=" not in override:
            return f"override {override!r} is not of the form key=value"
        if f"'{key}'" in str(error) and "Could not override" in str(error):
            return _unknown_key(key, _all_keys(name))
        if f"'{key}/{value}'" in str(error):
            options = sorted(p.stem for p in (config_dir() / key).glob("*.yaml"))
            return f"{key}={value} does not exist{_did_you_mean(value, options)}; choose one of {', '.join(options)}"
    return f"the settings cannot be composed: {first_line}"


def _all_keys(name: str) -> list[str]:
    keys: list[str] = []

    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for key, child in node.items():
                keys.append(_join(path, str(key)))
                walk(child, keys[-1])

    walk(compose(name, []), "")
    return keys


def _unknown_key(key: str, known: Sequence[str]) -> str:
    parent = key.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    hint = _did_you_mean(key, known)
    listing = (
        f"; {parent or 'the top level'} has {', '.join(k.rpartition('.')[2] for k in siblings)}" if siblings else ""
    )
    return f"unknown setting {key!r}{hint}{listing}"


def _did_you_mean(word: str, candidates: Sequence[Any]) -> str:
    near = difflib.get_close_matches(word, [str(c) for c in candidates], n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def plain(settings: Any) -> Any:
    """A dataclass tree as JSON has it: dicts, lists, numbers, text; URLs without credentials, as it will be kept."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        settings = dataclasses.asdict(settings)
    if isinstance(settings, Mapping):
        return {str(k): plain(v) for k, v in settings.items()}
    if isinstance(settings, list | tuple):
        return [plain(v) for v in settings]
    return shown(settings) if isinstance(settings, str) else settings


def to_yaml(settings: Any) -> str:
    """The tree as YAML text."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(plain(settings)))
