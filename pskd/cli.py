"""The `pskd` command: what one does beside training."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from pskd import launch
from pskd.doctor import command as doctor_command
from pskd.errors import EXIT_COMPLETE, EXIT_FAILED, AgreedError, PskdError
from pskd.fields import at_least
from pskd.health import STALE_S, check
from pskd.report import evaluate_command, inspect_command

# Their modules import what takes long only when they run.
_TAKE_SETTINGS = {
    "evaluate": (evaluate_command, "the measures of a network, or of logits"),
    "inspect": (inspect_command, "what past predictions say of the data"),
    "doctor": (doctor_command, "whether this machine, or all nodes together, can train"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. Of several ranks, one says why they fail."""
    launched = launch.is_launched()
    if launched:
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
        code = arguments.run_command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # of `pskd ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except PskdError as error:
        agreed = isinstance(error, AgreedError)
        if (launch.rank() if agreed else launch.local_rank()) > 0:
            launch.leave_the_last_word()
        else:
            sys.stderr.write(f"error: {error}\n")
            sys.stderr.flush()
        if launched:
            os._exit(EXIT_FAILED)  # groups whose peers are gone may abort an orderly end
        return EXIT_FAILED
    return EXIT_COMPLETE if code is None else int(code)


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
    parser = _Parser(prog="pskd", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_report(commands.add_parser("report", help="a run as a page with figures"))
    _add_compare(commands.add_parser("compare", help="complete runs side by side"))
    recipes = commands.add_parser("recipes", help="the recipes, with what was published")
    recipes.add_argument(
        "words",
        nargs="*",
        metavar="TABLE | show NAME",
        help="the beginning of names (default: all); or print one recipe as resolved YAML",
    )
    recipes.add_argument("--names", action="store_true", help="print the names alone")
    recipes.set_defaults(run_command=_recipes)
    _add_export(commands.add_parser("export", help="a run's network for other programs"))
    _add_import(commands.add_parser("import", help="weights of public code for this program"))
    _add_index(commands.add_parser("index", help="look at a folder of images, once"))
    _add_health(commands.add_parser("health", help="whether a run is alive: exit code 0 or 1"))
    for name, (module, text) in _TAKE_SETTINGS.items():
        command = commands.add_parser(name, help=text)
        module.add_arguments(command)
        command.set_defaults(run_command=module.run)
    store = commands.add_parser("store", help="the past predictions of a run")
    actions = store.add_subparsers(required=True, metavar="ACTION")
    for name, run, text in (
        ("info", _store_info, "which generations there are, and who names them"),
        ("verify", _store_verify, "read every row and compare its checksum"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("directory", type=Path, metavar="DIR", help="a run, or its store/")
        action.set_defaults(run_command=run)
    return parser


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    report.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="for index.html and the figures (default: RUN/report)",
    )
    _add_bins(report)
    report.set_defaults(run_command=_report)


def _add_bins(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--bins",
        type=at_least(1, "--bins"),
        help="of reliability diagrams (default: those of the run's ECE)",
    )


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    compare.add_argument(
        "--by-recipe",
        action="store_true",
        help="one row a recipe: mean, deviation and published figure",
    )
    compare.add_argument(
        "--format",
        choices=["text", "markdown", "latex"],
        default="markdown",
        help="of the table (default: markdown; latex: for the package booktabs)",
    )
    compare.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with figures as well"
    )
    _add_bins(compare)
    compare.set_defaults(run_command=_compare)


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("run", type=Path, metavar="RUN", help="the directory of a complete run")
    export.add_argument(
        "--weights", choices=["last", "best"], default="last", help="of which epoch"
    )
    export.add_argument(
        "--format",
        choices=["state-dict", "torch-export", "onnx"],
        default="state-dict",
        help="for load_state_dict, torch.export.load or ONNX (default: state-dict)",
    )
    export.add_argument(
        "--output", type=Path, metavar="FILE", help="default: in RUN/exports, named by the network"
    )
    export.set_defaults(run_command=_export)


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, metavar="FILE", help="a checkpoint or state dict")
    command.add_argument(
        "--model", required=True, metavar="NAME", help="the network, as model.name"
    )
    command.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="OUT.pth",
        help="for --model.init and teachers",
    )
    command.set_defaults(run_command=_import)


def _add_index(index: argparse.ArgumentParser) -> None:
    index.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="DIR/<class>/<image>; or a folder of two such folders, train and val",
    )
    index.add_argument(
        "--index-path",
        type=Path,
        metavar="FILE",
        help="where the index goes (default: DIR/.pskd-index, else ~/.cache/pskd)",
    )
    index.add_argument(
        "--drop-bad", action="store_true", help="leave out files of no use, do not refuse them"
    )
    index.add_argument(
        "--verify", action="store_true", help="decode every file and compare it with the index"
    )
    index.add_argument(
        "--ground-truth",
        type=Path,
        metavar="FILE",
        help="ILSVRC2012_validation_ground_truth.txt, for a flat DIR or for val; needs --classes",
    )
    index.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="class names in the order of their integers: meta.mat, or a text file",
    )
    index.add_argument("--list", type=Path, metavar="FILE", help="lines `path label`")
    index.add_argument(
        "--workers",
        type=at_least(1, "--workers"),
        metavar="K",
        help="processes that read (default: one a core)",
    )
    index.set_defaults(run_command=_index)


def _add_health(health: argparse.ArgumentParser) -> None:
    health.add_argument(
        "run",
        type=Path,
        nargs="?",
        metavar="RUN",
        help="the run directory (default: the environment's PSKD_RUN_DIR)",
    )
    health.add_argument(
        "--stale-s",
        type=float,
        default=STALE_S,
        metavar="S",
        help=f"how old its heartbeat may be, in seconds (default: {STALE_S:g})",
    )
    health.set_defaults(run_command=_health)


def _report(arguments: argparse.Namespace) -> None:
    from pskd.report.run_page import report  # noqa: PLC0415

    print(report(arguments.run, arguments.output, arguments.bins))


def _compare(arguments: argparse.Namespace) -> None:
    from pskd.report.compare import by_recipe, comparison, different_data  # noqa: PLC0415
    from pskd.report.table import render  # noqa: PLC0415

    if arguments.bins is not None and arguments.html is None:
        raise PskdError(f"--bins {arguments.bins} means nothing without --html: leave it out.")
    table = (by_recipe if arguments.by_recipe else comparison)(arguments.runs)
    warning = different_data(arguments.runs)
    if arguments.html is not None:
        from pskd.report.compare_page import compare_page  # noqa: PLC0415

        compare_page(arguments.runs, table, arguments.html, arguments.bins)
    print(render(table, arguments.format))
    if warning is not None:
        sys.stderr.write(f"warning: {warning}\n")


def _recipes(arguments: argparse.Namespace) -> None:
    from pskd import recipe  # noqa: PLC0415
    from pskd.report.recipes import listing, shown  # noqa: PLC0415

    match arguments.words:
        case ["show", name]:
            print(shown(name))
        case [] | [_]:
            prefix = arguments.words[0] if arguments.words else ""
            print("\n".join(recipe.table(prefix)) if arguments.names else listing(prefix))
        case words:
            raise PskdError(
                f"pskd recipes {' '.join(words)}: use `pskd recipes [TABLE]` or "
                "`pskd recipes show NAME`."
            )


def _export(arguments: argparse.Namespace) -> None:
    from pskd.export import export  # noqa: PLC0415

    written = export(
        arguments.run, which=arguments.weights, kind=arguments.format, output=arguments.output
    )
    print("\n".join(map(str, written)))


def _import(arguments: argparse.Namespace) -> None:
    from pskd.export import import_public  # noqa: PLC0415

    import_public(arguments.file, arguments.model, arguments.output)
    print(arguments.output)


def _index(arguments: argparse.Namespace) -> None:
    from pskd.data.index_command import reports  # noqa: PLC0415

    for report in reports(arguments):
        print(report)


def _health(arguments: argparse.Namespace) -> None:
    run = arguments.run or os.environ.get("PSKD_RUN_DIR")
    if not run:
        raise PskdError("pskd health needs RUN, a run directory, or PSKD_RUN_DIR.")
    print(check(Path(run), arguments.stale_s))


def _store_info(arguments: argparse.Namespace) -> None:
    from pskd.report.store import info  # noqa: PLC0415

    print(info(arguments.directory))


def _store_verify(arguments: argparse.Namespace) -> None:
    from pskd.report.store import verify  # noqa: PLC0415

    damaged = 0
    for what, damage in verify(arguments.directory):
        print(f"{'ok' if damage is None else 'DAMAGED':8} {what}")
        if damage is not None:
            damaged += 1
            print(f"         {damage}")
    if damaged:
        raise PskdError(f"{damaged} of the files of {arguments.directory} are damaged or missing.")


if __name__ == "__main__":
    sys.exit(main())
