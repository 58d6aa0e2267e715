"""The recipes of the package, for people: `pskd recipes`."""

from pskd import recipe
from pskd.command_line import resolve
from pskd.report.table import PUBLISHED_COLUMNS, markdown


def listing(prefix: str) -> str:
    """A table in Markdown of the recipes whose names begin so, with the published figures.

    Raises:
        PskdError: there is none.
    """
    header = ["recipe", *(title for title, _, _ in PUBLISHED_COLUMNS), "source"]
    rows = []
    for name in recipe.table(prefix):
        known = recipe.read(name)
        cells = [
            f"{known.published[key]:.2f}" if key in known.published else ""
            for _, key, _ in PUBLISHED_COLUMNS
        ]
        rows.append([name, *cells, known.source])
    return markdown(header, rows)


def shown(name: str) -> str:
    """The resolved configuration of a recipe as YAML, which `train.py --config` takes.

    Raises:
        PskdError: unknown.
    """
    known = recipe.read(name)
    chain = " on ".join(part.label for part in reversed(known.parts))
    figures = ", ".join(f"{key} {value}" for key, value in known.published.items())
    lines = [f"# {chain}", f"# source: {known.source}"]
    if figures:
        lines.append(f"# published: {figures}")
    return "\n".join(lines) + "\n" + resolve(["--recipe", name]).to_yaml().rstrip()
