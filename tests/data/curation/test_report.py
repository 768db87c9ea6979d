"""The page: its numbers are those of the curation, and hostile problems stay text."""

from html.parser import HTMLParser
from pathlib import Path

from megatron_orz.data.curation.pipeline import Curation, Decision, StageCount
from megatron_orz.data.curation.report import write_report
from megatron_orz.data.curation.stage import Verdict
from tests.data.curation.rows import candidates

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'</pre></article>"


class Page(HTMLParser):
    """Tags, texts and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())


def make_curation() -> Curation:
    problems = [(HOSTILE, HOSTILE), *((f"What is {n}+{n}?", str(2 * n)) for n in range(1999))]
    decisions = [
        Decision(
            candidate=candidate,
            trail=(
                ("rules", Verdict(None, HOSTILE if not candidate.row else "")),
                ("difficulty", Verdict("too_easy" if candidate.row % 4 == 3 else None, "", candidate.row % 9)),
            ),
        )
        for candidate in candidates(problems)
    ]
    return Curation(
        decisions=decisions,
        stages=[
            StageCount(name="rules", num_in=2000, dropped={}),
            StageCount(name="difficulty", num_in=2000, dropped={"too_easy": 500}),
        ],
    )


def test_the_page_tells_the_counts(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", make_curation(), notes=["Not decontaminated"])
    page = Page((tmp_path / "report.html").read_text())
    assert "1,500 of 2,000 rows stay" in page.texts
    assert "Not decontaminated" in page.texts
    assert "too_easy 500" in page.texts
    assert page.texts.count("x.jsonl") == 1
    chart = page.texts[page.texts.index("Right responses to a problem, of all that were sampled") :]
    # 2000 rows of row % 9 right: 223 or 222 of each; ranges 0, 1, 2 to 3, 4 to 7, 8 to 15.
    assert chart[1:11] == ["0", "223", "1", "223", "2 to 3", "444", "4 to 7", "888", "8 to 15", "222"]
    bars = [float(value) for name, value in page.attributes if name == "width" and value not in (None, "760")]
    assert max(bars) == 500.0


def test_hostile_problems_stay_text_and_nothing_is_loaded(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", make_curation(), notes=[])
    page = Page((tmp_path / "report.html").read_text())
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not {"src", "href", "onerror"} & {name for name, _ in page.attributes}
    assert HOSTILE in page.texts, "the problem is shown as it is"


def test_an_empty_curation_has_a_page(tmp_path: Path) -> None:
    empty = Curation(decisions=[], stages=[StageCount(name="collect", num_in=0, dropped={})])
    write_report(tmp_path / "report.html", empty, notes=[])
    assert "0 of 0 rows stay" in Page((tmp_path / "report.html").read_text()).texts
