"""How close the sparse calls of a sampling came to exact attention: what is measured, how it is told, what it costs."""
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfyui")
SIZE = (5, 8, 12)
SENTENCE = r"kept (about )?[\d.]+% of the attention, (about )?[\d.]+% from exact \(\d+ tiles in \d+ attention calls\)"


of_lists = pytest.mark.parametrize("method", ["vsa", "sta", "sla"], indirect=True)
"""Methods that read lists of tiles: VMoBA's tokens choose one by one and are not judged."""


@pytest.fixture
def every_tile(monkeypatch):
    """Every sparse call is measured, at all of its tiles: what the sampled figures estimate."""
    from pack.nodes.hook import closeness
    from pack.vsa_core.closeness import Place

    def all_of(self, watch, batch, heads):
        blocks = watch.layout.num_video_slots // 64
        return [Place(b, h, i) for b in range(batch) for h in range(heads) for i in range(blocks)]
    monkeypatch.setattr(closeness, "sampling_rate", lambda tokens, heads, expected: (1, 1))
    monkeypatch.setattr(closeness.Closeness, "_places", all_of)


def texts_of(run):
    from pack.nodes.hook.status import node_text, status_text
    return node_text(run), status_text(run, verbose=True)


def lines_with(text, part):
    return [line for line in text.splitlines() if part in line]


def test_the_node_and_the_report_say_what_was_kept_and_how_far_from_exact(wan, vsa, sta, run_of, draw):
    import re

    from pack.nodes.evidence.report import SparseAttentionReport
    for patched in (vsa(wan, 0.5), sta(wan, verbose=True)):
        latent = draw(patched, SIZE, steps=4)
        run = run_of(patched)
        shown, verbose = texts_of(run)
        report = SparseAttentionReport.execute({"samples": latent}, patched).args[1]
        for text in (shown, verbose, report):
            assert len(lines_with(text, "% of the attention")) == 1 and re.search(SENTENCE, text), text
        assert len(lines_with(verbose, "furthest from exact: layer ")) == 1 and "from exact (" in lines_with(
            verbose, "layer 0: ")[0]
        (numbers,) = run.summary()
        assert 0 < numbers["mass_kept"] < 1 and 0 < numbers["relative_error"] < 1
        assert numbers["measured_calls"] >= 4 and numbers["measured_ms"] > 0


@of_lists
def test_a_call_that_keeps_every_pair_is_exact(wan, method, run_of, draw):
    full, _ = method
    patched = full(wan)
    draw(patched, SIZE)
    close = run_of(patched).closeness
    assert close.mass_kept == pytest.approx(1, abs=1e-6) and close.relative_error < 1e-5
    assert close.sentence().startswith("kept 100.0% of the attention, less than 0.1% from exact (")


def test_figures_are_those_of_the_calls_themselves(wan, vsa, sta, run_of, draw, every_tile):
    """The mean over all tiles, against dense attention of the same q, k and v."""
    from pack.nodes.hook.sparse_calls import SparseCalls
    plain, seen = SparseCalls._measure, []

    def measure(run, watch, q, k, v, out):
        exact = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)))
        sets = watch.layout.token_rows[:watch.layout.num_video_slots].view(-1, 64)
        for rows in sets:
            rows = rows[rows >= 0].long()
            off = out[:, rows].double() - exact.transpose(1, 2)[:, rows]
            error = off.square().sum((1, 3)) / exact.transpose(1, 2)[:, rows].square().sum((1, 3))
            seen.append((len(rows) * error.numel(), error.sqrt().mean().item()))
        plain(run, watch, q, k, v, out)
    for patched in (vsa(wan, 0.7), sta(wan, "1x1x1")):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SparseCalls, "_measure", staticmethod(measure))
            draw(patched, SIZE, cfg=3.0)
        wanted = sum(n * error for n, error in seen) / sum(n for n, _ in seen)
        assert run_of(patched).closeness.relative_error == pytest.approx(wanted, rel=1e-5)


@of_lists
def test_the_sampling_is_bit_for_bit_the_same_without_it(wan, method, draw, run_of, monkeypatch):
    from pack.nodes.hook.closeness import Closeness
    _, sparse = method
    patched = sparse(wan)
    with_it, state = draw(patched, SIZE), torch.get_rng_state()
    assert run_of(patched).closeness.tiles
    monkeypatch.setattr(Closeness, "watch", lambda self, tokens, call: None)
    patched = sparse(wan)
    assert torch.equal(draw(patched, SIZE), with_it) and torch.equal(torch.get_rng_state(), state)
    assert not run_of(patched).closeness.tiles and "from exact" not in texts_of(run_of(patched))[1]


def test_the_same_sampling_measures_the_same_tiles(wan, vsa, run_of, draw):
    told = []
    for _ in range(2):
        patched = vsa(wan, 0.7)
        draw(patched, SIZE)
        told.append(run_of(patched).closeness.tiles)
    assert told[0] == told[1]


def test_dense_calls_are_not_measured(wan, vsa, run_of, draw, every_tile):
    patched = vsa(wan, 0.7, start_percent=0.5, dense_blocks="0")
    draw(patched, SIZE, steps=4)
    run = run_of(patched)
    assert run.closeness.calls == run.sparse_calls == 2 and {tile.layer for tile in run.closeness.tiles} == {1}
    assert run.closeness.worst() == "", "one layer alone is not the worst of any"


def test_both_halves_of_a_batch_are_measured(wan, vsa, run_of, draw):
    from pack.nodes.hook.closeness import Closeness
    rows = set()
    with pytest.MonkeyPatch.context() as patch:
        places = Closeness._places

        def note(self, watch, batch, heads):
            found = places(self, watch, batch, heads)
            rows.update(place.row for place in found)
            return found
        patch.setattr(Closeness, "_places", note)
        draw(vsa(wan, 0.7), SIZE, steps=6, cfg=3.0)
    assert rows == {0, 1}


def test_a_model_with_gates_is_told_what_was_kept_only(gated, vsa, run_of, draw):
    """The gates add a branch that dense attention does not have: an error against it would mean nothing."""
    patched = vsa(gated, 0.7)
    draw(patched, SIZE)
    run = run_of(patched)
    assert run.gated and run.closeness.relative_error is None and 0 < run.closeness.mass_kept < 1
    assert "what the trained gates add is not judged" in texts_of(run)[0] and "from exact" not in texts_of(run)[0]
    assert "least kept: layer " in texts_of(run)[1] and not run.closeness.warning("lower sparsity")


def test_far_from_exact_is_said_with_the_cure_of_the_method(wan, vsa, sta, run_of, draw, monkeypatch):
    from pack.nodes.hook import closeness
    monkeypatch.setattr(closeness, "FAR", 0.0)
    for patched, cure in ((vsa(wan, 0.9), "lower sparsity"), (sta(wan, "1x1x1"), "choose a larger window")):
        draw(patched, SIZE)
        shown = lines_with(texts_of(run_of(patched))[0], "from exact")
        assert len(shown) == 1 and f"Far from exact: {cure}. A hint only: the clip itself is the verdict" in shown[0]


def test_an_interrupted_sampling_keeps_its_figures(wan, vsa, run_of, draw, every_tile):
    def interrupt(step, *_):
        if step == 1:
            raise InterruptedError
    patched = vsa(wan, 0.7)
    with pytest.raises(InterruptedError):
        draw(patched, SIZE, steps=6, callback=interrupt)
    assert run_of(patched).closeness.calls == 4 and "of the attention" in texts_of(run_of(patched))[0]


def test_a_fault_while_measuring_is_told_and_the_sampling_goes_on(wan, vsa, run_of, draw, monkeypatch):
    from pack.nodes.hook import closeness

    def fail(*_):
        raise torch.OutOfMemoryError("no room")
    wanted = draw(vsa(wan, 0.7), SIZE)
    monkeypatch.setattr(closeness, "closeness_of", fail)
    patched = vsa(wan, 0.7)
    assert torch.equal(draw(patched, SIZE), wanted)
    assert run_of(patched).notes == ["how close sparse attention is to exact could not be measured: no room"]


def test_of_two_sparse_nodes_each_is_measured_in_its_own_calls(wan, vsa, sta, draw, every_tile):
    from pack.nodes.hook.hook import SparseAttentionHook
    patched = vsa(sta(wan), 0.5, start_percent=0.5)
    draw(patched, SIZE, steps=4)
    assert [hook.last_run.closeness.calls for hook in SparseAttentionHook.of(patched)] == [4, 4]


# -- the sampled figure against that of all tiles ------------------------------------------------------------------

PROFILES, STAGES, HEADS = 6, 2, 6


@pytest.fixture(scope="module")
def figures(comfyui):
    """Of every profile and stage the figures of all places [2 * HEADS * blocks, 3], from real calls of VSA, and how to
    find one: neighbours resemble each other, layers and heads differ in how sharply they look."""
    from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder
    from pack.vsa_core.closeness import Launch, Place, closeness_of
    from pack.vsa_core.layout import to_sequence
    md = VideoSparseAttentionMetadataBuilder().build(0, (4, 8, 12), (1, 1, 1), 0.6, torch.device("cpu"), (2, 4, 4))
    impl, generator, tables = VideoSparseAttentionImpl(HEADS, 16), torch.Generator().manual_seed(3), {}
    blocks = md.num_video_slots // 64
    places = [Place(b, h, i) for b in range(2) for h in range(HEADS) for i in range(blocks)]
    own = torch.arange(md.padded_seq_length) // 64
    for profile in range(PROFILES):
        x = torch.randn(3, 2, md.total_seq_length, HEADS, 16, generator=generator)
        about = torch.randn(3, 2, blocks, HEADS, 16, generator=generator)
        x += torch.stack([to_sequence(part[:, own], md) for part in about])
        sharp = (torch.randn(HEADS, 1, generator=generator) * 0.5 + profile / PROFILES).exp()
        for stage in range(STAGES):
            launches = []
            impl.on_lists = lambda heads, indices, counts, _, kept=launches: kept.append(
                Launch(heads, indices, counts))
            q = x[0] * sharp * (1 + 0.3 * stage)
            out = impl.attend(q, x[1], x[2], md)
            tables[profile, stage] = closeness_of(q, x[1], x[2], out, places, launches, md, 0.25)
    return tables, {place: i for i, place in enumerate(places)}, md


def sampled(figures, steps, seed, layers=30, tokens=32760, passes=2):
    """What a run with so many steps measures; the calls' figures are looked up."""
    from pack.nodes.hook import closeness
    tables, index, md = figures
    close, x = closeness.Closeness(seed), torch.empty(2, 1, HEADS, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closeness, "closeness_of", lambda table, *rest: table[[index[place] for place in rest[3]]])
        for step in range(steps):
            for layer in list(range(layers)) * passes:
                call = SimpleNamespace(heads=range(12), of_heads=12, layer=layer, layers=layers,
                                       step=SimpleNamespace(total=steps))
                watch = close.watch(tokens, call)
                close.passed()
                if watch is not None:
                    watch.launches, watch.layout = [None], md
                    table = tables[layer % PROFILES, step * STAGES // steps]
                    close.measure(watch, _Table(table, x), x, x, x)
    close.finish()
    return close


class _Table:
    """A call's figures in the place of its queries."""

    def __init__(self, table, x):
        self.table, self.shape = table, x.shape

    def __getitem__(self, at):
        return self.table[at]


def true_figures(figures):
    every = torch.cat(list(figures[0].values())).double()
    weights = every[:, 0] / every[:, 0].sum()
    return (weights @ every[:, 1]).item(), (weights @ every[:, 2]).item()


def test_a_usual_run_is_within_a_tenth_of_the_figures_of_all_tiles_in_95_of_100_runs(figures):
    """30 layers of 12 heads and 32760 tokens, 30 steps of two passes: what Wan 2.1 1.3B does."""
    kept, error = true_figures(figures)
    runs = [sampled(figures, 30, seed) for seed in range(100)]
    assert 0.1 < error < 0.6 and min(len(run.tiles) for run in runs) > 200
    assert sum(abs(run.relative_error / error - 1) <= 0.1 for run in runs) >= 95
    assert sum(abs(run.mass_kept / kept - 1) <= 0.1 for run in runs) >= 95


def test_short_runs_say_about_and_what_is_told_without_it_is_within_a_tenth(figures):
    _, error = true_figures(figures)
    told = 0
    for steps in (4, 8):
        runs = [sampled(figures, steps, seed) for seed in range(100)]
        assert sum(abs(run.relative_error - error) <= run.half_width() for run in runs) >= 92
        assert all(run.sure != ("about" in run.sentence()) for run in runs)
        sure = [run for run in runs if run.sure]
        assert sum(abs(run.relative_error / error - 1) <= 0.1 for run in sure) >= 0.95 * len(sure)
        told += len(sure)
    assert 0 < told < 100
