"""The `pskd` command: what one does beside training."""

import argparse
import os
import re
import sys
from typing import Any, NoReturn

from pskd import launch
from pskd.commands import (
    compare,
    doctor,
    evaluate,
    export,
    health,
    import_public,
    index,
    inspect,
    recipes,
    report,
    store,
)
from pskd.errors import EXIT_COMPLETE, EXIT_FAILED, PskdError

_COMMANDS = {  # in the order of --help
    "report": (report, "a run as a page with figures"),
    "compare": (compare, "complete runs side by side"),
    "recipes": (recipes, "the recipes, with what was published"),
    "export": (export, "a run's network for other programs"),
    "import": (import_public, "weights of public code for this program"),
    "index": (index, "look at a folder of images, once"),
    "health": (health, "whether a run is alive: exit code 0 or 1"),
    "evaluate": (evaluate, "the measures of a network, or of logits"),
    "inspect": (inspect, "what past predictions say of the data"),
    "doctor": (doctor, "whether this machine, or all nodes together, can train"),
    "store": (store, "the past predictions of a run"),
}
_TAKE_SETTINGS = ("evaluate", "inspect", "doctor")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. Of several ranks, one says why they fail."""
    if launch.is_launched():
        launch.die_with_launcher()  # first of all: imports take seconds, and a launcher can die
    words, settings = _split_settings(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    try:
        arguments, unknown = parser.parse_known_args(words)
        if unknown and arguments.command != "doctor":
            arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        if settings and arguments.command not in _TAKE_SETTINGS:
            arguments.parser.error(
                f"only {', '.join(_TAKE_SETTINGS)} take settings such as {settings[0]}"
            )
        arguments.settings = [*unknown, *settings]
        code = _COMMANDS[arguments.command][0].run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # of `pskd ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except PskdError as error:
        launch.refuse(error)
        return EXIT_FAILED
    return EXIT_COMPLETE if code is None else int(code)


def run() -> NoReturn:
    """The whole of the command: by its arguments, and exit."""
    launch.end(main())


def _split_settings(argv: list[str]) -> tuple[list[str], list[str]]:
    """(words of the command, `--section.field=VALUE` of a configuration)."""
    words, flags, queue = [], [], list(argv)
    while queue:
        word = queue.pop(0)
        if not re.match(r"--[a-z]+\.\w", word):
            words.append(word)
        elif "=" in word or not queue or queue[0].startswith("--"):
            flags.append(word)
        else:
            flags.append(f"{word}={queue.pop(0)}")
    return words, flags


class _Parser(argparse.ArgumentParser):
    """Of the command and of each below it: says its own usage, and ends as every refusal does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self.set_defaults(parser=self)  # that of the last command stays

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(EXIT_FAILED, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    usage = f"%(prog)s [-h] COMMAND ...\ncommands: {', '.join(_COMMANDS)}"
    parser = _Parser(prog="pskd", usage=usage, description=__doc__)
    commands = parser.add_subparsers(
        prog=parser.prog, required=True, metavar="COMMAND", dest="command"
    )
    for name, (module, text) in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=text))
    return parser


if __name__ == "__main__":
    run()
