"""Settings classes as absl flags, and back."""

import dataclasses
import typing

import pytest
from absl import flags

from experiments.flags import absl_flags, programs
from prelnroberta.errors import InputError

PROGRAMS = [
    value
    for name, value in vars(programs).items()
    if dataclasses.is_dataclass(value) and value.__module__ == programs.__name__
]


def parse(settings, *arguments):
    """The settings of a command line, by flags that are not absl's global ones."""
    values = flags.FlagValues()
    absl_flags._define(settings, values)
    values(["program", *arguments])
    return absl_flags._read(settings, values)


def changed_value(field, hint):
    """A value of the flag that is not its default."""
    kind = absl_flags._without_none(hint)
    if field.metadata["choices"]:
        value = next(c for c in field.metadata["choices"] if c != field.default)
        return (value,) if typing.get_origin(kind) is tuple else value
    if typing.get_origin(kind) is tuple:
        return {str: ("a b", "c=d"), int: (3, 4), float: (0.5,)}[typing.get_args(kind)[0]]
    if kind is bool:
        return not field.default
    return {str: "some text", int: 7, float: 0.125}[kind]


@pytest.mark.parametrize("settings", PROGRAMS, ids=lambda settings: settings.__name__)
def test_every_flag_survives_a_flagfile(settings, tmp_path):
    hints = typing.get_type_hints(settings)
    given = settings(
        **{
            field.name: changed_value(field, hints[field.name])
            for field in dataclasses.fields(settings)
        }
    )
    unsaved = {
        field.name: field.default
        for field in dataclasses.fields(settings)
        if field.metadata["on_resume"] == "unsaved"
    }
    path = tmp_path / "flags.txt"
    path.write_text(absl_flags.flagfile(given))
    assert parse(settings, f"--flagfile={path}") == dataclasses.replace(given, **unsaved)


@pytest.mark.parametrize("settings", PROGRAMS, ids=lambda settings: settings.__name__)
def test_defaults_of_flags_are_defaults_of_fields(settings):
    required = {
        field.name: "x"
        for field in dataclasses.fields(settings)
        if field.default is dataclasses.MISSING
    }
    arguments = [f"--{name}={value}" for name, value in required.items()]
    assert parse(settings, *arguments) == settings(**required)


@pytest.mark.parametrize("settings", PROGRAMS, ids=lambda settings: settings.__name__)
def test_every_flag_has_a_help_text(settings):
    for field in dataclasses.fields(settings):
        text = field.metadata["help"]
        assert text[0].isupper() or text.split()[0].rstrip(":") in (
            *field.metadata["choices"],
            "address:port",
        ), (field.name, text)
        assert text.endswith("."), (field.name, text)


def test_missing_required_flag():
    with pytest.raises(flags.IllegalFlagValueError, match="run_dir"):
        parse(programs.PretrainSettings)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "3e-4", 3e-4),
        ("steps", "5", 5),
        ("decay_norms", "true", True),
        ("seeds", "1,2", (1, 2)),
        ("schedule", "cosine", "cosine"),
    ],
)
def test_value_of_a_swept_flag(name, text, value):
    settings = programs.FinetuneSettings(run_dir="a", train_file="b", eval_file="c")
    assert absl_flags.parsed(settings, name, text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("learning_rate", "fast", "learning_rate"),
        ("schedule", "square", "linear"),
        ("seeds", "1,x", "--seeds=1,x, expected whole numbers"),
        ("speed", "1", "there is no flag --speed"),
    ],
)
def test_wrong_value_of_a_swept_flag(name, text, message):
    settings = programs.FinetuneSettings(run_dir="a", train_file="b", eval_file="c")
    with pytest.raises(InputError, match=message):
        absl_flags.parsed(settings, name, text)
