"""Settings classes as absl flags: defined here, and read here."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from absl import flags

from prelnroberta.errors import InputError

Settings = TypeVar("Settings")


def declare(settings: type) -> None:
    """Defines the flags of a program's settings class in absl's global flags."""
    _define(settings, flags.FLAGS)
    for name in _names(settings):
        # --help shows the flags that belong to the program's own file.
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def read(settings: type[Settings]) -> Settings:
    """The settings that the parsed command line gives."""
    return _read(settings, flags.FLAGS)


def parsed(settings: Settings, name: str, text: str) -> Any:
    """The value of one flag that is written as text.

    Raises:
        InputError: there is no such flag, or the text is no value of it.
    """
    values = flags.FlagValues()
    _define(type(settings), values)
    if name not in _names(type(settings)):
        raise InputError(f"there is no flag --{name}")
    try:
        values[name].parse(text)
    except flags.IllegalFlagValueError as error:
        raise InputError(str(error)) from None
    return _value(values, name, get_type_hints(type(settings))[name])


def flagfile(settings: Any) -> str:
    """The settings as a flagfile, a line a flag, without what belongs to one launch."""
    values = flags.FlagValues()
    _define(type(settings), values)
    lines = []
    for field in dataclasses.fields(settings):
        if field.metadata["on_resume"] == "unsaved":
            continue
        value = getattr(settings, field.name)
        values[field.name].value = list(value) if isinstance(value, tuple) else value
        lines += values[field.name].serialize().splitlines()
    return "".join(f"{line}\n" for line in lines if line)


def _names(settings: type) -> set[str]:
    return {field.name for field in dataclasses.fields(settings)}


def _define(settings: type, values: flags.FlagValues) -> None:
    hints = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        required = field.default is dataclasses.MISSING
        default = None if required else field.default
        if isinstance(default, tuple):
            default = list(default)
        define, options = _definition(hints[field.name], field.metadata)
        define(
            field.name,
            default,
            help=field.metadata["help"],
            flag_values=values,
            required=required,
            **options,
        )


def _definition(hint: Any, metadata: Any) -> tuple[Any, dict[str, Any]]:
    """absl's function that defines a flag of this type, and what else it takes."""
    choices = {"enum_values": list(metadata["choices"])} if metadata["choices"] else {}
    kind = _without_none(hint)
    if get_origin(kind) is tuple:
        if not metadata["repeated"]:
            return flags.DEFINE_list, {}
        return (flags.DEFINE_multi_enum if choices else flags.DEFINE_multi_string), choices
    if choices:
        return flags.DEFINE_enum, choices
    return {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }[kind], {}


def _read(settings: type[Settings], values: flags.FlagValues) -> Settings:
    hints = get_type_hints(settings)
    return settings(**{name: _value(values, name, hints[name]) for name in _names(settings)})


def _value(values: flags.FlagValues, name: str, hint: Any) -> Any:
    value, kind = values[name].value, _without_none(hint)
    if get_origin(kind) is not tuple or value is None:
        return value
    item = get_args(kind)[0]
    try:
        return tuple(map(item, value))
    except ValueError:
        expected = {int: "whole numbers", float: "numbers"}[item]
        raise InputError(f"--{name}={','.join(value)}, expected {expected}") from None


def _without_none(hint: Any) -> Any:
    """`int` of `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not types.NoneType)
    return hint
