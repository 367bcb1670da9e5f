"""Typed configs: a frozen dataclass per verb declares every option once; flags, help and `run(**kw)` come from it."""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from utils.core.errors import UserError
from utils.core.files import nearest

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    *,
    aliases: Sequence[str] = (),
    choices: Sequence[Any] | None = None,
    nargs: str | int | None = None,
    const: Any = None,
    type: Callable[[str], Any] | None = None,
) -> Any:
    """A dataclass field that is also a command-line option.

    A bool field becomes a switch: `--x` when its default is false; `--x` and `--no-x` when it is true. `aliases` are
    further flag names without dashes; `nargs`, `const`, `type` and `choices` mean what they mean to argparse.
    """
    meta = {"help": help, "aliases": tuple(aliases), "choices": choices, "nargs": nargs, "const": const, "type": type}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


class _Parser(argparse.ArgumentParser):
    """Errors are UserErrors in one line instead of argparse's usage dump; `--batch_size` is `--batch-size`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def parse_known_args(self, args: Sequence[str], namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:  # type: ignore[override]
        return super().parse_known_args([_dashed(arg) for arg in args], namespace)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they are written, and defaults where there is something to say."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in ("", None, False) or action.default == []:
            return action.help
        return super()._get_help_string(action)


def _dashed(arg: str) -> str:
    """`--batch_size=8` as `--batch-size=8`; what is no flag stays as it is."""
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else arg


def _scalar_type(annotation: Any) -> Callable[[str], Any]:
    """The converter for one value of a field annotated `int`, `str | None`, `list[float]` and so on."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not types.NoneType]
        return _scalar_type(inner[0])
    if typing.get_origin(annotation) in (list, tuple):
        return _scalar_type(typing.get_args(annotation)[0])
    return annotation if annotation in (int, float, str) else str


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def build_parser(cls: type, prog: str, description: str = "") -> argparse.ArgumentParser:
    """An ArgumentParser whose options are the fields of dataclass `cls`; unambiguous prefixes of flags are accepted."""
    parser = _Parser(prog=prog, description=description, formatter_class=_Help)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        meta = field.metadata
        names = [field.name, *meta["aliases"]]
        flags = list(dict.fromkeys(f"--{name.replace('_', '-')}" for name in names))
        default = _default(field)
        text = meta["help"].replace("%", "%%")
        if isinstance(default, bool) and meta["nargs"] is None:
            if default:
                parser.add_argument(
                    *flags, dest=field.name, default=True, action=argparse.BooleanOptionalAction, help=text
                )
            else:
                parser.add_argument(*flags, dest=field.name, default=False, action="store_true", help=text)
            continue
        kind = meta["type"] or _scalar_type(hints[field.name])
        extra = {k: meta[k] for k in ("choices", "nargs") if meta[k] is not None}
        if meta["const"] is not None:
            extra["const"] = meta["const"]
        parser.add_argument(*flags, dest=field.name, default=default, type=kind, help=text, **extra)
    return parser


def parse_config(
    cls: type[T],
    argv: Sequence[str] | None,
    prog: str,
    description: str = "",
    retired: Mapping[str, str] | None = None,
) -> T:
    """Parse `argv` (default: the process's) into a `cls`. `retired` maps flags of YOLOv5 to what replaces them."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(cls, prog, description)
    known = {flag for action in parser._actions for flag in action.option_strings}
    for token in argv:
        flag = _dashed(token.split("=")[0])
        if retired and flag not in known and flag in retired:
            raise UserError(f"{flag} does not exist here: {retired[flag]}")
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = nearest(unknown[0].split("=")[0], known)
        raise UserError(f"unknown argument '{unknown[0]}'{hint or ' (see --help)'}")
    return cls(**vars(values))


def find_option(cls: type, name: str) -> dataclasses.Field:
    """The field of `cls` that a keyword means: its name or an alias, with dashes or underscores."""
    names = {}
    for field in dataclasses.fields(cls):
        for own in (field.name, *field.metadata["aliases"]):
            names[own.replace("-", "_")] = field
    field = names.get(name.replace("-", "_"))
    if field is None:
        raise UserError(f"unknown option '{name}'{nearest(name, names)}")
    return field


def config_from_kwargs(cls: type[T], **kwargs: Any) -> T:
    """Build a `cls` from keywords as `run(**kw)` takes them; aliases and dashes are accepted, unknown names refused.

    An option whose value may be left out on the command line takes True for that, and False for its default.
    """
    values: dict[str, Any] = {}
    for key, value in kwargs.items():
        field = find_option(cls, key)
        if field.metadata["nargs"] == "?" and isinstance(value, bool):
            value = field.metadata["const"] if value else _default(field)
        choices = field.metadata["choices"]
        picked = value if isinstance(value, (list, tuple)) else [value]
        if choices is not None and value not in (None, _default(field)) and not set(picked) <= set(choices):
            raise UserError(f"option '{key}' is {value!r}; expected one of {', '.join(map(str, choices))}")
        if isinstance(value, (list, tuple)):
            value = [str(v) if isinstance(v, Path) else v for v in value]
        elif isinstance(value, Path):
            value = str(value)
        if field.metadata["nargs"] in ("+", "*") and value is not None and not isinstance(value, (list, tuple)):
            value = [value]
        values[field.name] = value
    return cls(**values)


def given_options(cls: type, given: Sequence[str] | Mapping[str, Any]) -> set[str]:
    """Names of the fields of `cls` that stand in `given`: a command line, or the keywords of `run`."""
    if isinstance(given, Mapping):
        return {find_option(cls, key).name for key in given}
    parser = build_parser(cls, "")
    for action in parser._actions:
        action.default = None
    values, _ = parser.parse_known_args(list(given))
    return {name for name, value in vars(values).items() if value is not None}


def config_dict(config: Any) -> dict[str, Any]:
    """The fields of a config as plain values (for opt.yaml and checkpoints)."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }


def refuse_changed(config: Any, allowed: Collection[str], where: str) -> None:
    """UserError for the first option beside `allowed` that is not at its default: it would do nothing `where`."""
    for name, field in sorted((field.name, field) for field in dataclasses.fields(config) if field.name not in allowed):
        if getattr(config, name) != _default(field):
            raise UserError(f"--{name.replace('_', '-')} does nothing {where}; leave one of the two out")


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a verb as a program: UserError and OSError become one line on stderr and exit code 1, an interrupt 130."""
    try:
        code = main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = 1
    except BrokenPipeError:
        code = 1
    except OSError as error:  # a folder without rights, a full disk
        place = f" '{error.filename}'" if error.filename else ""
        print(f"error: the system refuses{place}: {error.strerror or error}", file=sys.stderr, flush=True)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code or 0)
