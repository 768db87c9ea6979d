"""What tools show: tables keep their texts as they are, bars stay out of files."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megatron_orz import terminal


def test_a_table_shows_headings_rows_and_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.31.mlp.experts.127.gate_up_proj.weight"
    table = terminal.table("of [bold]", ["tensor", "type"], ["change [95%]"], notes=True, caption="from [0] on")
    table.add_row(name, "float32", "12", "a note " * 20)
    terminal.console().print(table)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [lines[0], lines[-1]] == ["of [bold]", "from [0] on"]
    assert lines[2].split() == ["tensor", "type", "change", "[95%]"]
    assert lines[4].split()[:4] == [name, "float32", "12", "a"], "a name is in one piece"
    assert lines[5].startswith(("a note", "note")), "notes go on below"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_drawn_on_a_terminal_alone(is_terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=100)
    with terminal.progress(console) as bar:
        bar.advance(bar.add_task("reading", total=4), 3)
        console.print("meanwhile")
    assert ("reading" in out.getvalue() and "3/4" in out.getvalue()) == is_terminal
    assert "meanwhile" in out.getvalue()
    assert is_terminal or out.getvalue() == "meanwhile\n"
