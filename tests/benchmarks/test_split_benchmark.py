"""The benchmark of several cards: its arithmetic, and that bytes are those of the formula."""
import pytest


@pytest.fixture
def split(load):
    return load("split")


def test_predictions_are_those_worked_out_by_hand(split):
    """Wan 14B in 720p on an H100: 77 ms of projections, 45 of attention and 6 of the rest per layer."""
    model, card = split.MODELS[2], split.RATES[0]
    assert [round(ms) for ms in split.stages(model, card, 0.9)] == [77, 45, 6]
    assert round(split.sent(model, 2) / 1e6) == 774 and round(split.sent(model, 4, 4) / 1e6) == 726
    alone = sum(split.stages(model, card, 0.9))
    for link, wanted in (("NVLink 4", (1.93, 3.80, 7.53)), ("PCIe 5 x16", (1.45, 2.55, 4.81))):
        found = [alone / split.split_ms(model, card, 0.9, cards, split.LINKS[link]) for cards in split.CARDS]
        assert found == pytest.approx(wanted, abs=0.01)


def test_a_run_says_what_is_predicted_and_what_was_counted_and_timed(split, capsys):
    split.main(["--devices", "cpu", "cpu", "--tokens", "2x4x4", "--repeats", "1"])
    out = capsys.readouterr().out
    assert "Predicted, not measured" in out and "| Wan 14B, 720p, 81 frames | RTX 4090 |" in out
    assert "2 ranks, 12 heads, 1560 tokens: [2396160, 2396160]" in out and "WRONG" not in out
    assert "of it the exchange: " in out
    split.main([])
    assert "not measured: one GPU or none here" in capsys.readouterr().out


def test_bytes_that_are_not_the_formulas_end_the_command_with_an_error(split, monkeypatch):
    monkeypatch.setattr(split, "counted_bytes", lambda *args: ([1, 2], [1, 1]))
    with pytest.raises(SystemExit, match="not those of the formula"):
        split.main([])
