"""`pskd recipes`: those of the package, with what was published."""

import argparse

from pskd import recipe
from pskd.errors import PskdError


def add_arguments(recipes: argparse.ArgumentParser) -> None:
    """To the command's parser."""
    recipes.add_argument(
        "words",
        nargs="*",
        metavar="TABLE | show NAME",
        help="the beginning of names (default: all); or print one recipe as resolved YAML",
    )
    recipes.add_argument("--names", action="store_true", help="print the names alone")


def run(arguments: argparse.Namespace) -> None:
    """Print a table, names, or a recipe.

    Raises:
        PskdError: other words, or a recipe that there is not.
    """
    from pskd.report.recipes import listing, shown

    match arguments.words:
        case ["show", name]:
            print(shown(name))
        case ["show"]:
            raise PskdError("pskd recipes show needs NAME; `pskd recipes` lists the names.")
        case [] | [_]:
            prefix = arguments.words[0] if arguments.words else ""
            print("\n".join(recipe.table(prefix)) if arguments.names else listing(prefix))
        case words:
            raise PskdError(
                f"pskd recipes {' '.join(words)}: use `pskd recipes [TABLE]` or "
                "`pskd recipes show NAME`."
            )
