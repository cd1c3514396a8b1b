"""A comparison as it was written: its page as a browser would read it, its JSON, its Markdown."""

import json
from html.parser import HTMLParser

from dinogen.report.compare import write_comparison


class Page(HTMLParser):
    """What a browser would load and show, and the cells of the table of metric values."""

    def __init__(self, text):
        super().__init__()
        self.raw = text
        self.sources, self.tags, self.words, self.open, self.ids = [], [], [], [], []
        self.rows = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        if tag not in ("meta", "img", "br", "wbr", "input"):
            self.open.append(tag)
        self.sources += [given[key] for key in ("src", "srcset", "data", "poster") if key in given]
        self.sources += [given["href"]] if tag in ("link", "image") else []
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append([given.get("class", "").split(), ""])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "img", "br", "wbr", "input"):
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open) and "svg" not in self.open:
            self.rows[-1][-1][1] += data

    def metric_values(self):
        """{run: {heading: (value and spread, marks)}} of the first table."""
        heads = [text for _, text in self.rows[1]]
        table = {}
        for row in self.rows[2:]:
            if len(row) != len(heads):
                break
            name = row[0][1]
            table[name] = {h: (text, marks) for h, (marks, text) in zip(heads, row, strict=True)}
        return table


def compare(out, *runs, title="Five runs"):
    page = write_comparison(runs, out, title).page
    data = json.loads((out / "comparison.json").read_text())
    return Page(page.read_text()), data, (out / "comparison.md").read_text()


def cell(page, run, heading):
    """The cell of a run under a heading, by the beginnings of both."""
    (row,) = [cells for name, cells in page.metric_values().items() if name.startswith(run)]
    (found,) = [value for head, value in row.items() if head.startswith(heading)]
    return found
