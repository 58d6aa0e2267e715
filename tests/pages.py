"""The page of a report, read back: its text, and that it needs nothing else."""

import re
from html.parser import HTMLParser

SECTIONS = [
    "Measures",
    "Learning curves",
    "Schedules",
    "Calibration",
    "Risk and coverage",
    "Classes",
    "Throughput",
    "Configuration",
    "Environment",
    "Starts",
]


class Page(HTMLParser):
    """What stands in a page; every element closed, in order."""

    VOID = ("meta", "link", "img", "path", "use", "rect")

    def __init__(self, text):
        super().__init__()
        self.text, self.headings, self.addresses, self.ids, self.tags = "", [], [], [], []
        self._open = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for key, value in attributes:
            if key in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.addresses.append(value)
            if key == "id":
                self.ids.append(value)
            self.addresses += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += f" {data}"
        if self._open[-1:] == ["h2"]:
            self.headings.append(data)

    def check_self_contained(self):
        """Nothing is fetched, nothing runs, and every address inside leads somewhere, once."""
        assert "script" not in self.tags
        assert len(set(self.ids)) == len(self.ids)
        for address in self.addresses:
            if not address.startswith("data:"):
                assert address.removeprefix("#") in self.ids, address
                assert address.startswith("#")


def parsed(path):
    text = path.read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    found = Page(text)
    found.check_self_contained()
    return found


def words(text):
    return " ".join(text.split())
