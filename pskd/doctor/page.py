"""One page of what was found, on all nodes together.

A check gives lines. What all ranks say alike stands there once; what they say differently, once for
each group of ranks that says it.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from pskd.words import counted

OK: Literal["ok"] = "ok"
WARNING: Literal["warning"] = "warning"
WRONG: Literal["WRONG"] = "WRONG"  # it would keep the run from working

_INDENT = " " * 26


class Line(NamedTuple):
    """What one rank found about a topic. alike: nodes should not differ in it."""

    topic: str
    state: Literal["ok", "warning", "WRONG"]
    text: str
    remedy: str = ""
    alike: bool = False


class Place(NamedTuple):
    """Where a rank is. node: the first rank of its node."""

    host: str
    address: str
    node: int


def render(places: Sequence[Place], lines_of_rank: Sequence[Sequence[Line]]) -> tuple[str, bool]:
    """The page, and whether nothing on it is wrong. Both arguments: of each rank, in order."""
    nodes = sorted({place.node for place in places})
    out = [f"{counted(len(places), 'rank')} on {counted(len(nodes), 'node')}"]
    for number, node in enumerate(nodes):
        ranks = [rank for rank, place in enumerate(places) if place.node == node]
        out.append(f"node {number}: {places[node].host}, {places[node].address}, {_named(ranks)}")
    out.append("")
    states: list[str] = []
    topics = dict.fromkeys(line.topic for lines in lines_of_rank for line in lines)
    for topic in topics:
        said: dict[Line, list[int]] = {}
        for rank, lines in enumerate(lines_of_rank):
            for line in lines:
                if line.topic == topic:
                    said.setdefault(line, []).append(rank)
        for line, ranks in said.items():
            who = "" if len(said) == 1 else f"{_who(ranks, places, nodes)}: "
            odd = line.alike and len(said) > 1 and line.state == OK
            state = WARNING if odd else line.state
            states.append(state)
            out.append(f"{state:9}{topic:17}{who}{line.text}")
            remedy = line.remedy or ("The others differ: make them alike." if odd else "")
            if remedy:
                out.append(f"{_INDENT}{remedy}")
    out += ["", _verdict(states)]
    return "\n".join(out), WRONG not in states


def _verdict(states: Sequence[str]) -> str:
    wrong, warnings = states.count(WRONG), states.count(WARNING)
    also = f" ({counted(warnings, 'warning')})" if warnings else ""
    if wrong:
        return f"Not ready: {counted(wrong, 'line')} above would keep the run from working{also}."
    return f"Ready to train{also}."


def _who(ranks: list[int], places: Sequence[Place], nodes: list[int]) -> str:
    """Nodes, if the first ranks of nodes said it for them; else ranks."""
    if len(nodes) > 1 and set(ranks) <= set(nodes):
        return " and ".join(f"node {nodes.index(rank)} ({places[rank].host})" for rank in ranks)
    return _named(ranks)


def _named(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0-7`, `ranks 0, 2`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
