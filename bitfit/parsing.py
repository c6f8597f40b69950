"""The argument parser of all programs: one-line errors, suggestions, and checked values."""

import argparse
import difflib
import math
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bitfit.output_paths import file_error
from utils import UserError, as_list, print_once, print_result, write_line

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

AddFlag = Callable[..., argparse.Action]  # argparse's add_argument


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports an error in one line, and leaves the usage to `-h`."""

    def parse_known_args(
        self,
        args: Iterable[str] | None = None,
        namespace: Any = None,  # noqa: ANN401
    ) -> tuple[Any, list[str]]:
        # Names with such characters would appear in logs, tables, JSON and printed commands.
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if any(unicodedata.category(character) in ("Cc", "Cs") for character in word):
                problem = "has control characters, or bytes that are not UTF-8: use another name"
                self.error(f"the argument '{word}' {problem}")
        if suggestion := self.misspelled_flag(words):
            self.error(suggestion)
        return super().parse_known_args(words, namespace)

    def misspelled_flag(self, words: Sequence[str]) -> str | None:
        """Return a message about the first unknown flag that resembles a known one, or None."""
        if self._subparsers:
            return None  # The parser of the command checks the flags.
        for word in words:
            flag = word.split("=")[0]
            if flag == "--":
                return None
            if flag.startswith("--") and flag not in self._option_string_actions:
                known = [name for name in self._option_string_actions if name.startswith("--")]
                if similar := difflib.get_close_matches(flag, known, n=1):
                    return f"unknown flag {flag}: did you mean {similar[0]}?"
        return None

    def _print_message(self, message: str, file: "SupportsWrite[str] | None" = None) -> None:
        if file is not sys.stdout:
            return super()._print_message(message, file)
        try:
            print_result(message.removesuffix("\n"))
        except OSError as error:
            write_line(f"{self.prog}: stopped: {error}")
            self.exit(1)

    def error(self, message: str) -> NoReturn:
        print_once(f"{self.prog}: error: {message}")
        self.exit(2)


class AppendWords(argparse.Action):
    """Store the words of a flag, or if it is given again, a list of the words of each use."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,  # noqa: ANN401
        option_string: str | None = None,
    ) -> None:
        given = getattr(namespace, self.dest)
        before = [given] if given and isinstance(given[0], str) else given
        setattr(namespace, self.dest, [*before, values] if before else values)


def split_repeated(value: Any) -> list[Any]:  # noqa: ANN401
    """Return the values of the uses of a flag that may be repeated."""
    is_repeated = isinstance(value, list) and value and isinstance(value[0], list | tuple)
    return value if is_repeated else [value]


def make_commands(
    prog: str,
    description: str,
    commands: Sequence[tuple[str, Callable[[AddFlag], None], str]],
    add_common: Callable[[AddFlag], None],
) -> tuple[OneLineParser, dict[str, OneLineParser]]:
    """Return the parser of a program with several commands, and {command: parser}.

    Args:
        commands: [(name, function that adds the command's flags, description)].
        add_common: function that adds the flags of all commands.
    """
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False)
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                    parser_class=OneLineParser)  # fmt: skip
    for name, add_flags, text in commands:
        parser_of_command = choices.add_parser(
            name, help=text, description=text, allow_abbrev=False
        )
        add_common(parser_of_command.add_argument)
        add_flags(parser_of_command.add_argument)
    return parser, choices.choices


def number(
    kind: type[float], low: float, high: float = math.inf, above: bool = False
) -> Callable[[str], float]:
    """Return an argparse type: an int or float from `low` (or above it) to below `high`."""
    rule = f"{'above' if above else 'at least'} {low}"
    rule += f" and below {high}" if high < math.inf else ""
    name = {int: "whole number", float: "number"}[kind]

    def parse(word: str) -> float:
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value < high:
            raise argparse.ArgumentTypeError(f"{word!r} is not a {name} {rule}")
        return value

    return parse


def gpu(word: str) -> int | str:
    """Return a GPU number or `cpu`, as an argparse type."""
    if word == "cpu":
        return word
    try:
        return int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is neither a GPU number nor `cpu`") from None


def new_file(*suffixes: str) -> Callable[[str], Path]:
    """Return an argparse type: the path of a file with one of some suffixes, to be written."""

    def parse(word: str) -> Path:
        if problem := file_error(word, suffixes):
            raise argparse.ArgumentTypeError(f"{word!r} {problem}")
        return Path(word)

    return parse


POSITIVE, COUNT, SEED = number(int, 1, 2**31), number(int, 0), number(int, 0, 2**63)
NOT_NEGATIVE, RATIO = number(float, 0), number(float, 0, 1)


def check_values(name: str, value: object, kind: Callable[[str], Any]) -> list[Any]:
    """Return the values of a Python argument, [] of None; UserError if its flag refuses one."""
    try:
        return [] if value is None else [kind(str(item)) for item in as_list(value)]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from None
