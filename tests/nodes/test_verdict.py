"""The sentence that a sampling comes to, the bullets under it, and that both can be read in either node display."""
import re

import pytest

from slow_dense import slow_dense, under

pytestmark = pytest.mark.usefixtures("own_proofs")
SIZE = (5, 8, 12)


def verdict_of(run):
    from pack.nodes.hook.verdict import verdict
    return verdict(run)


def texts_of(run):
    from pack.nodes.hook.status import node_text, status_text
    return node_text(run), status_text(run, verbose=True)


def test_a_sampling_that_gains_says_by_how_much_and_what_dense_would_take(wan, vsa, fakes, run_of, draw):
    import fake_kernels
    fakes(fake_kernels.right)
    patched = vsa(under(wan, slow_dense(80)), 0.9, backend="auto")
    draw(patched, SIZE, steps=8, cfg=1.0)
    run = run_of(patched)
    said = re.fullmatch(r"VSA is ON: sampling about ([\d.]+)x faster \(([\d.]+) s; dense would take about ([\d.]+) s\)"
                        r"\. (\d+)% of attention skipped in 8 of 8 steps\.", verdict_of(run))
    faster, took, dense, skipped = map(float, said.groups())
    assert faster == pytest.approx(dense / took, rel=0.1) and skipped == pytest.approx(100 * (1 - run.density), abs=0.6)
    attention = 16 * 0.08               # two layers in eight steps, 80 ms each
    assert dense == pytest.approx(took - (run.milliseconds("sparse") + run.milliseconds("probe")) / 1e3 + attention,
                                  rel=0.25)


def test_a_sampling_that_loses_says_so_where_the_user_insists(wan, vsa, fakes, run_of, draw):
    import fake_kernels
    fakes(fake_kernels.slow(60))
    patched = vsa(under(wan, slow_dense(5)), 0.5, backend="fake0")
    draw(patched, SIZE, steps=5)
    first, second, *_ = texts_of(run_of(patched))[0].splitlines()
    assert first.startswith("VSA is SLOWER than dense here: sampling took ")
    assert second.startswith("- sparse is slower than dense here: ") and "Backend fake0 was chosen by name" in second


def test_auto_that_went_back_to_dense_says_off_and_after_how_many_calls(wan, vsa, fakes, run_of, draw):
    import fake_kernels
    fakes(fake_kernels.slow(60))
    patched = vsa(under(wan, slow_dense(5)), 0.5, backend="auto")
    draw(patched, SIZE, steps=8)
    run = run_of(patched)
    assert verdict_of(run) == (f"VSA is OFF after {run.sparse_calls} attention calls that were timed: dense attention "
                               "is faster here. Longer or larger clips gain more.")


@pytest.mark.parametrize(("widgets", "size", "because"), [
    ({"min_tokens": 5000}, (5, 10, 12),
     "the clip has 150 tokens and min_tokens is 5000. Make it longer or larger by 33.3x, or lower"),
    ({}, (1, 10, 12), "it makes a single frame"),
    ({"start_percent": 1.0}, (5, 10, 12), "every sampled step lies outside start_percent to end_percent. Lower"),
    ({"dense_blocks": "0-1"}, (5, 10, 12), "dense_blocks names every block"),
    ({"sparsity": 0.0, "backend": "auto"}, (5, 10, 12), "every tile looks at the whole clip. Raise sparsity"),
], ids=lambda value: next(iter(value), "one frame") if isinstance(value, dict) else None)
def test_a_sampling_without_a_sparse_call_says_why_and_what_to_do(wan, vsa, run_of, draw, widgets, size, because):
    patched = vsa(wan, **widgets)
    draw(patched, size)
    assert verdict_of(run_of(patched)).startswith("VSA is OFF: ") and because in verdict_of(run_of(patched))


def test_a_full_window_runs_dense_too(wan, sta, run_of, draw):
    patched = sta(wan, "1.0x1.0x1.0", backend="auto")
    draw(patched)
    assert run_of(patched).dense == {"nothing would be left out": 4}


def test_dense_steps_are_named_by_their_number(wan, vsa, run_of, draw):
    patched = vsa(wan, 0.5, start_percent=0.2, end_percent=0.7)
    draw(patched, steps=10)
    assert "- dense steps: 1-2, 9-10 of 10" in texts_of(run_of(patched))[0].splitlines()


def test_a_second_sparse_node_is_never_taken_for_dense_attention(wan, vsa, sta, draw):
    from pack.nodes.hook.hook import SparseAttentionHook
    patched = vsa(sta(wan), 0.5, start_percent=0.5)
    draw(patched, steps=4)
    inner, outer = (hook.last_run for hook in SparseAttentionHook.of(patched))
    assert outer.sparse_calls == inner.sparse_calls == inner.taken["VSA"] == 4
    assert outer.dense_seconds() is None and "not compared with dense attention" in verdict_of(outer)
    assert "x dense per call" not in texts_of(outer)[1] and "node behind this one computed: VSA 4" in texts_of(inner)[1]


def test_a_sparse_node_whose_calls_another_took_says_so(wan, vsa, sta, draw):
    from pack.nodes.hook.hook import SparseAttentionHook
    patched = sta(vsa(wan))
    draw(patched)
    inner = SparseAttentionHook.of(patched)[0].last_run
    assert verdict_of(inner) == ("VSA is OFF: the STA node behind this one computed all 4 attention calls in its "
                                 "place. Keep one of both.")


def test_every_line_reads_right_as_plain_text_and_as_markdown(wan, vsa, run_of, draw):
    """A paragraph and then bullets: a display that joins the lines of a paragraph keeps those apart."""
    patched = vsa(wan, 0.5, dense_blocks="0", verbose=True)
    draw(patched)
    for text in texts_of(run_of(patched)):
        first, *rest = text.splitlines()
        assert first and not first.startswith(("-", " "))
        assert all(re.match(r" *- \S", line) for line in rest)
        assert not re.search(r"[*`<>|]|(?<!\w)_|_(?!\w)", text)


def test_what_the_node_shows_fits_and_numbers_carry_their_unit(wan, vsa, run_of, draw):
    patched = vsa(wan, 0.5, start_percent=0.3)
    draw(patched, steps=6)
    shown, report = texts_of(run_of(patched))
    assert len(shown.splitlines()) <= 5 and len(shown.splitlines()[0]) <= 160
    assert "inside attention" not in report, "sums over different numbers of calls say nothing"
    assert not re.search(r"pack\.|kernels\.|\b[0-9a-f]{12}\b|Error", report)


def test_blocks_that_the_model_does_not_have_are_named(wan, vsa, run_of, draw):
    patched = vsa(wan, 0.5, dense_blocks="0, 38-39, -3, 1-99")
    draw(patched)
    assert texts_of(run_of(patched))[0].splitlines()[1] == (
        "- dense_blocks 38-39, -3: this model has blocks 0 to 1, so that does nothing")
