"""What the user sees: text under the node, the report node, the picture."""
import pytest
import torch


@pytest.fixture
def shown(comfyui, monkeypatch):
    """Texts that went under a node, as (node id, text)."""
    import server
    texts = []

    class Server:
        def send_progress_text(self, text, node_id, sid=None):
            texts.append((node_id, text))
    monkeypatch.setattr(server.PromptServer, "instance", Server(), raising=False)
    return texts


def node(model, node_id, **widgets):
    from pack.nodes.hook.hook import SparseAttentionHook
    from pack.nodes.hook.settings import read_settings
    from pack.nodes.methods.video_sparse_attention import VideoSparseAttentionPatch, read_method
    settings = read_settings(**{"dense_blocks": "0", "start_percent": 0.0, "min_tokens": 0, **widgets})
    assert VideoSparseAttentionPatch.define_schema().node_id == "VideoSparseAttentionPatch"
    return SparseAttentionHook.install(model, read_method(0.5, "auto"), settings, node_id)


def test_the_node_shows_the_verdict_and_the_report_grid_tile_density_kernel_calls_and_time(wan, draw, shown):
    patched = node(wan, "7")
    draw(patched)
    draw(patched)
    assert [node_id for node_id, _ in shown] == ["7", "7"]
    text = shown[-1][1]
    assert text.startswith("VSA is ") and "% of attention skipped in 2 of 2 steps." in text
    report = report_of(patched)
    for part in ("every tile looks at 2 of 4 tiles (", "% of all pairs of tokens), kernel reference",
                 "usual time of one attention call: sparse ",
                 "clip of 5x5x6 tokens (time x height x width), tile 3x5x3",
                 "attention calls: 2 sparse, 2 dense (dense_blocks 2)", "left alone: cross-attention 4"):
        assert part in report and part not in text
    assert "layer" not in report


def test_a_model_that_no_kernel_can_run_is_told_before_the_sampling(wan, shown, monkeypatch):
    from dataclasses import replace

    import pack.kernels
    none = replace(pack.kernels.KERNELS[-1], dtypes=(torch.bfloat16,))
    monkeypatch.setattr(pack.kernels, "KERNELS", (none,))
    node(wan, "7")
    (node_id, text), = shown
    assert node_id == "7" and text.startswith("VSA will be OFF: ") and "bfloat16" in text


def test_verbose_adds_a_line_per_layer(wan, draw, shown):
    draw(node(wan, "7", verbose=True))
    assert "layer 0: attention calls dense_blocks 2; together dense" in shown[-1][1]
    assert "layer 1: attention calls sparse 2; together sparse" in shown[-1][1]


def test_a_run_without_a_sparse_call_says_so_and_why(wan, draw, shown):
    draw(node(wan, "7", min_tokens=10000))
    assert "VSA is OFF: the clip has 150 tokens and min_tokens is 10000" in shown[-1][1]


def test_the_density_is_the_share_of_query_key_pairs_that_the_lists_keep(wan, vsa, run_of, draw):
    patched = vsa(wan, 0.5, tile_size="4x4x4")
    draw(patched, (8, 16, 16))                      # whole tiles only: 4 of 8
    entry = run_of(patched).summary()[0]
    assert entry["kept"] == 4 and entry["tiles"] == 8
    assert entry["density"] == pytest.approx(0.5, abs=1e-6) and entry["work"] == pytest.approx(0.5)


def test_the_report_node_gives_text_numbers_and_a_picture(wan, vsa, draw):
    from pack.nodes.evidence.report import SparseAttentionReport, _picture
    from pack.nodes.hook.hook import SparseAttentionHook
    patched = vsa(wan, 0.5)
    latent = {"samples": draw(patched, (7, 14, 18))}
    run = SparseAttentionHook.of(patched)[0].last_run
    plain, over = _picture([run], None), _picture([run], torch.rand(25, 112, 144, 3))
    for image in (plain, over):
        assert image.ndim == 4 and image.shape[-1] == 3 and 0 <= image.min() and image.max() <= 1
    assert over.unique().numel() > plain.unique().numel() > 3
    assert SparseAttentionReport.define_schema().node_id == "SparseAttentionReport"
    found = SparseAttentionReport.execute(latent, patched)
    assert found.args[0] is latent and found.ui["text"] == [found.args[1]] and found.ui["images"]
    tile_map = next(iter(run.records.values())).tile_map
    assert tile_map.sum().item() == pytest.approx(run.summary()[0]["kept"])


@pytest.mark.parametrize("patched", [False, True], ids=["bypassed", "not sampled"])
def test_the_report_node_never_ends_a_run(wan, vsa, patched):
    from pack.nodes.evidence.report import SparseAttentionReport
    latent = {"samples": torch.zeros(1, 4)}
    found = SparseAttentionReport.execute(latent, vsa(wan) if patched else wan)
    assert found.args[0] is latent and found.ui["images"], "a picture of its own, or the page keeps an old one"
    assert found.args[1].startswith("Nothing was sampled with this" if patched else "DENSE run: there is no sparse")


def test_the_words_of_a_map_are_those_of_its_numbers():
    from pack.nodes.evidence.tile_map import conclusion
    tile_map = torch.zeros(3, 4, 4)
    tile_map[1, 2, 2] = tile_map[1, 0, 0] = tile_map[0, 2, 1] = tile_map[2, 3, 3] = 1
    assert conclusion(tile_map) == (
        "The middle of the clip (outlined) looks at 8% of it: 50% of that at the same moment, 75% at the same spot of "
        "the frame or beside it, at any time.")
    assert conclusion(torch.zeros(3, 4, 4)) == "The middle of the clip looks at nothing."


@pytest.mark.parametrize(("length", "frames", "first_of_each"), [
    (21, 81, [0, *range(1, 81, 4)]), (16, 16, list(range(16))), (5, 20, [0, 4, 8, 12, 16]), (1, 1, [0])],
    ids=["causal", "one to one", "four to one", "one frame"])
def test_a_place_in_time_is_the_frame_that_it_is_decoded_to(length, frames, first_of_each):
    from pack.nodes.evidence.tile_map import frame_of
    assert [frame_of(token, length, frames) for token in range(length)] == first_of_each


def report_of(model):
    from pack.nodes.evidence.report import SparseAttentionReport
    return SparseAttentionReport.execute({"samples": None}, model).args[1]


@pytest.mark.parametrize(("backend", "reference"), [("auto", "can run"), ("reference", "can run")])
def test_the_report_lists_every_kernel_and_why_it_could_not_run(wan, draw, backend, reference):
    from pack.kernels import KERNELS
    patched = node(wan, "7", backend=backend)
    draw(patched)
    head, *lines = report_of(patched).splitlines()[-1 - sum(spec.exact for spec in KERNELS):]
    assert head == f"- kernels for float32, head_dim 128 on cpu, backend {backend}:"
    assert lines == ["  - cuda_sm90: your CPU cannot run it (needs an NVIDIA card)",
                     "  - triton: your CPU cannot run it (needs an NVIDIA card)",
                     f"  - reference: {reference}"]


def test_a_kernel_that_failed_in_this_run_is_listed_with_what_it_said(wan, draw, monkeypatch):
    from dataclasses import replace

    import pack.kernels
    def broken(*args):
        raise RuntimeError("no such luck")
    spec = replace(pack.kernels.KERNELS[-1], name="broken", load=lambda: broken, origin=lambda: "disk cache: loaded")
    monkeypatch.setattr(pack.kernels, "KERNELS", (spec, *pack.kernels.KERNELS))
    patched = node(wan, "7")
    draw(patched)
    text = report_of(patched)
    assert "  - broken: failed in this run: no such luck (disk cache: loaded)\n" in text
    assert text.endswith("  - reference: can run") and "kernel reference" in text


def test_a_run_that_asked_no_kernel_lists_none(wan, draw):
    patched = node(wan, "7", min_tokens=10000)
    draw(patched)
    assert "kernels for" not in report_of(patched)


def test_the_report_stands_in_its_own_node(wan, draw, shown, monkeypatch):
    from types import SimpleNamespace

    from pack.nodes.evidence.report import SparseAttentionReport
    patched = node(wan, "7")
    draw(patched)
    monkeypatch.setattr(SparseAttentionReport, "hidden", SimpleNamespace(
        unique_id="9", prompt=None, extra_pnginfo=None), raising=False)
    assert ("9", report_of(patched)) == shown[-1]
