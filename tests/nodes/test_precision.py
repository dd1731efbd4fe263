"""The widget precision: 8-bit scores where they are asked for and nowhere else, with their error on this very clip."""
import re

import pytest
import torch

SIZE = (5, 8, 12)
SENTENCE = r"int8 scores: (\d+\.\d+)% from exact scores, checked on (\d+) attention calls"


@pytest.fixture(params=["vsa", "sta", "sla", "vmoba"])
def patched(request, wan):
    """patched(**widgets) -> a model whose calls are sparse, on whatever kernel auto takes."""
    patch = request.getfixturevalue(request.param)
    sparse = {"vsa": {"sparsity": 0.7}, "sta": {"window": "1x1x1"}, "sla": {"ratio": 0.3},
              "vmoba": {"threshold": 0.1, "temporal_chunk": 1}}[request.param]
    return lambda **widgets: patch(wan, **sparse, **{"backend": "auto", **widgets})


@pytest.fixture
def undecided(monkeypatch):
    """The clock never decides against sparse."""
    from pack.kernels import Contest
    monkeypatch.setattr(Contest, "sparse_wins", lambda self: None)


def test_int8_scores_run_and_their_error_on_this_clip_is_told(patched, draw, run_of, undecided):
    from pack.nodes.hook.status import node_text
    model = patched(precision="int8 scores")
    found = draw(model, SIZE, steps=4)
    run, text = run_of(model), node_text(run_of(model))
    assert {record.kernel for record in run.records.values()} == {"reference_int8"}
    told = re.search(SENTENCE, text)
    assert told and 0 < float(told[1]) < 5 and int(told[2]) == len(run.rounding.errors) == 8, text
    exact = draw(patched(), SIZE, steps=4)
    assert not torch.equal(found, exact) and ((found - exact).norm() / exact.norm()) < 0.05


def test_the_told_error_is_that_of_the_calls(patched, draw, run_of, undecided, monkeypatch):
    from pack.nodes.hook.rounding import Rounding
    seen = []
    plain = Rounding.measure

    def measure(self, found, exact):
        seen.append(((found.double() - exact.double()).norm() / exact.double().norm()).item())
        plain(self, found, exact)
    monkeypatch.setattr(Rounding, "measure", measure)
    model = patched(precision="int8 scores")
    draw(model, SIZE, steps=2)
    assert run_of(model).rounding.errors == pytest.approx(seen, rel=1e-4) and 0 < max(seen) < 0.05


@pytest.mark.parametrize("widgets", [{}, {"precision": "exact"}, {"backend": "reference", "precision": "int8 scores"}])
def test_nothing_is_rounded_where_it_was_not_asked_for(patched, draw, run_of, widgets):
    model = patched(**widgets)
    draw(model, SIZE, steps=2)
    run = run_of(model)
    assert all(record.kernel == "reference" for record in run.records.values()) and not run.rounding.errors
    assert not any("int8" in text for text in run.warnings)


def test_a_kernel_that_rounds_is_there_by_its_name_too(patched, draw, run_of):
    model = patched(backend="reference_int8")
    draw(model, SIZE, steps=2)
    run = run_of(model)
    assert {record.kernel for record in run.records.values()} == {"reference_int8"} and run.rounding.errors


def test_the_checks_count_as_nothing(vsa, gated, draw, run_of, undecided):
    """Gates are counted once per call, densities and closeness as without them."""
    models = [vsa(gated, 0.5, backend=backend) for backend in ("reference_int8", "reference")]
    for model in models:
        draw(model, SIZE, steps=2)
    int8, exact = map(run_of, models)
    assert int8.gated == exact.gated and int8.sparse_calls == exact.sparse_calls and int8.seen == exact.seen
    assert int8.density == exact.density and int8.closeness.calls == exact.closeness.calls
    assert int8.rounding.errors and not exact.rounding.errors


def test_where_no_such_kernel_runs_an_exact_one_does_and_the_node_says_why(patched, draw, run_of, kernel_table):
    from dataclasses import replace

    from pack.kernels import reference, reference_int8
    kernel_table(reference.SPEC, replace(reference_int8.SPEC, dtypes=(torch.bfloat16,)))
    model = patched(precision="int8 scores", start_percent=0.0)
    draw(model, SIZE, steps=2)
    said = [text for text in run_of(model).warnings if text.startswith("no int8 scores here")]
    assert said == ["no int8 scores here, exact ones in their place: reference_int8: it computes in bfloat16, this "
                    "model in float32"]


def test_a_check_that_fails_fails_no_sampling(patched, draw, run_of, monkeypatch, undecided):
    from pack.nodes.hook.rounding import Rounding

    def breaks(self, found, exact):
        raise RuntimeError("no room")
    monkeypatch.setattr(Rounding, "measure", breaks)
    model = patched(precision="int8 scores")
    draw(model, SIZE, steps=2)
    run = run_of(model)
    assert run.sparse_calls and "how far int8 scores are from exact ones could not be measured: no room" in run.notes


def test_a_precision_that_is_none_is_refused(patched):
    with pytest.raises(ValueError, match="precision 'int4': wanted exact or int8 scores"):
        patched(precision="int4")


def test_both_kernels_that_a_check_needs_are_proven_before_the_sampling(wan, vsa, kernel_table, own_proofs):
    import fake_kernels
    from pack import kernels
    from pack.kernels import reference_int8
    int8 = fake_kernels.spec_of(reference_int8.run, "int8", exact=False)
    exact = fake_kernels.spec_of(fake_kernels.right, "exact")
    kernel_table(exact, int8)
    vsa(wan, 0.7, backend="auto", precision="int8 scores")
    call = kernels.Call.on(torch.device("cpu"), torch.float32, 128)
    assert all(kernels.PROOFS.known(spec, call).passed for spec in (int8, exact))


@pytest.mark.parametrize(("layers", "steps"), [(30, 8), (40, 20), (30, 50), (2, 4), (1, 1), (7, 3)])
def test_the_checks_are_spread_over_steps_and_layers(comfyui, layers, steps):
    from pack.nodes.hook.rounding import CHECKS, Rounding
    rounding = Rounding()
    checked = [(step, layer) for step in range(steps) for layer in range(layers) if rounding.due(layers * steps)]
    assert min(CHECKS, layers * steps) <= len(checked) <= 2 * CHECKS
    assert checked[0] == (0, 0) and len({step for step, _ in checked}) >= min(steps, CHECKS) - 1
    assert len({layer for _, layer in checked}) >= min(layers, 5)
