"""Attention masks that hide text: the hidden tokens stay hidden and the clip runs sparse."""
import pytest
import torch

THW, TEXT, HEADS, DIM = (5, 6, 7), 9, 2, 32
CLIP = THW[0] * THW[1] * THW[2]
LENGTH = TEXT + CLIP
LOWEST = torch.finfo(torch.float32).min


class Blocks:
    """Calls the hook of a patched HunyuanVideo as its blocks do. Every instance is one forward pass."""

    def __init__(self, patched):
        from pack.nodes.families import ModelCall
        from pack.nodes.hook.hook import SparseAttentionHook
        from pack.nodes.hook.method import Step
        from pack.nodes.hook.run import Run
        self.hook, self.run = SparseAttentionHook.of(patched)[0], Run("VSA")
        call = ModelCall(THW, (1, 1, 1), frozenset(), frozenset(), prefix=TEXT)
        self.step = Step(self.run, patched.model.diffusion_model, call, True, 1)
        self.hook._steps["of this test"] = self.step
        self.options = {self.hook._step_key: "of this test", "block_type": "double", "block_index": 0}

    def __call__(self, q, k, v, mask):
        def dense(q, k, v, heads, mask=None, **_):
            return scaled_dot_product(q, k, v, mask)
        return self.hook.override(dense, q, k, v, HEADS, mask=mask, skip_reshape=True,
                                  transformer_options=self.options)


def scaled_dot_product(q, k, v, mask):
    if mask is not None and mask.ndim == 3:     # as ComfyUI does
        mask = mask.unsqueeze(1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@pytest.fixture
def hunyuan(load_tiny):
    return load_tiny("tiny_hunyuan_video")


def operands(batch=1):
    return (torch.randn(batch, HEADS, LENGTH, DIM) for _ in range(3))


def added(hidden, shape=(1, 1, LENGTH), lowest=LOWEST):
    mask = torch.zeros(shape)
    mask[..., list(hidden)] = lowest
    return mask


MASKS = {
    "the end of the text": (added((7, 8)), (7, 8)),
    "scattered text": (added((0, 3, 8)), (0, 3, 8)),
    "the whole text": (added(range(TEXT)), tuple(range(TEXT))),
    "nothing": (added(()), ()),
    "minus infinity, four axes": (added((1, 2), (1, 1, 1, LENGTH), -torch.inf), (1, 2)),
    "half precision": (added((1, 2), (1, 1, LENGTH), torch.finfo(torch.float16).min).half(), (1, 2)),
    "bool, two axes": (added((4, 5), (1, LENGTH)) == 0, (4, 5)),
}


@pytest.mark.parametrize(("mask", "hidden"), MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("batch", [1, 2])
def test_masked_text_equals_dense_under_the_same_mask(hunyuan, method, mask, hidden, batch):
    blocks, (q, k, v) = Blocks(method[0](hunyuan)), operands(batch)
    wanted = scaled_dot_product(q, k, v, mask if mask.dtype == torch.bool else mask.float())
    found = blocks(q, k, v, mask)
    assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-5
    assert [record.grid.hidden for record in blocks.run.records.values()] == [hidden]
    assert blocks.run.sparse_calls == 1 and not blocks.run.other


def test_hidden_text_has_no_influence_however_large_it_is(hunyuan, method):
    q, k, v = operands()
    mask, patched = added((2, 8)), method[1](hunyuan)
    before = Blocks(patched)(q, k, v, mask)
    k[:, :, [2, 8]], v[:, :, [2, 8]] = 1e4, -1e4
    assert torch.equal(Blocks(patched)(q, k, v, mask), before)
    assert not torch.equal(Blocks(patched)(q, k, v, added((2,))), before)


ROWS = torch.cat([added((7, 8), (1, 1, 1, LENGTH)), added((8,), (1, 1, 1, LENGTH))])


@pytest.mark.parametrize(("mask", "reason"), [
    (added((7, 8), (1, 1, LENGTH, LENGTH)), "attention mask"),
    (added((7, 8), (1, HEADS, 1, LENGTH)), "attention mask"),
    (added((7, 8), lowest=-3.0), "attention mask"),
    (ROWS, "attention mask"),
    (added((TEXT + 4,)), "attention mask over the clip"),
], ids=["per query", "per head", "weights instead of hiding", "another one for each clip", "over the clip"])
def test_a_mask_that_does_more_than_hide_text_runs_dense_and_is_counted(hunyuan, method, mask, reason):
    blocks, (q, k, v) = Blocks(method[1](hunyuan)), operands(2)
    assert torch.equal(blocks(q, k, v, mask), scaled_dot_product(q, k, v, mask))
    assert dict(blocks.run.other) == {reason: 1} and blocks.run.sparse_calls == 0


def test_the_layers_of_a_pass_read_their_mask_once_and_another_pass_reads_its_own(hunyuan, method, monkeypatch):
    from pack.nodes.hook import masks
    read, mask, patched = [], added((7, 8)), method[0](hunyuan)
    monkeypatch.setattr(masks, "_read", lambda *args, original=masks._read: read.append(1) or original(*args))
    q, k, v = operands()
    first = Blocks(patched)
    for _ in range(3):
        first(q, k, v, mask)
    assert len(read) == 1
    mask.copy_(added((0,)))         # the next pass's mask, at the same address
    second = Blocks(patched)
    second(q, k, v, mask)
    assert [record.grid.hidden for record in second.run.records.values()] == [(0,)] and len(read) == 2


def test_two_masks_in_one_pass_are_kept_apart(hunyuan, method):
    blocks, (q, k, v) = Blocks(method[0](hunyuan)), operands()
    for hidden in ((8,), (0, 1), (8,)):
        blocks(q, k, v, added(hidden))
    assert {record.grid.hidden: record.calls for record in blocks.run.records.values()} == {(8,): 2, (0, 1): 1}


def test_a_prompt_with_masked_tokens_is_sampled_sparse_with_them_hidden(hunyuan, method, run_of, draw):
    patched = method[1](hunyuan)
    sparse = draw(patched, (7, 10, 6), cfg=1.0)
    assert torch.isfinite(sparse).all()
    assert [record.grid.hidden for record in run_of(patched).records.values()] == [(5, 6)]
    assert set(run_of(patched).other) == {"text refiner"} and run_of(patched).sparse_calls == 8
    assert 0 < run_of(patched).summary()[0]["density"] < 1


def test_density_under_a_mask_is_1_when_every_pair_is_kept(hunyuan, method, run_of, draw):
    patched = method[0](hunyuan)
    draw(patched, (7, 10, 6), cfg=1.0)
    assert run_of(patched).summary()[0]["density"] == pytest.approx(1.0, abs=1e-6)
