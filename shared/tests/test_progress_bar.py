"""The bar of commands that do one thing after another."""

from folovllm.cli.progress_bar import ProgressBar


def test_bar_begins_where_an_earlier_run_ended_and_shows_the_last_text(capsys) -> None:
    with ProgressBar(4, "Things", "thing") as bar:
        bar.show(3, "third")
        bar.show(4, "fourth")
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("Things: 100%")
    assert "4/4" in last
    assert "fourth" in last
