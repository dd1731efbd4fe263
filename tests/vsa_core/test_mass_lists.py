"""Lists of different length: as many tiles as hold a share of the attention, within a bound on their average."""
from math import prod

import pytest
import torch

import interpreted_kernel
from mass_cases import LAYOUTS, metadata, oracle_of, peaked
from mass_oracle import held
from oracles import relative_l2_per_tile, vsa_attention_oracle
from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl
from pack.vsa_core.mass import pooled_masses
from pack.vsa_core.mass_lists import keep_mass


@pytest.mark.parametrize("target", [0.9, 0.95, 0.99])
def test_every_row_holds_the_target_with_as_few_tiles_as_can_be(target):
    md = metadata((7, 9, 11), suffix=5)
    masses, others = oracle_of(*peaked(md)[:2], md)
    kept = keep_mass(masses.clone(), others, target, prod(md.num_tiles), md)
    mask, own = kept.mask("cpu"), torch.eye(kept.tiles, dtype=torch.bool)
    found = held(masses, others, mask)
    assert found.min() >= target - 1e-12 and not kept.bounded
    smallest = torch.where(mask & ~own, masses, torch.inf).amin(-1)
    assert (found - smallest < target).all(), "without its smallest one no row would reach the target"
    assert (torch.where(mask, -torch.inf, masses).amax(-1) <= smallest).all()
    assert (mask & own).sum(-1).eq(1).all()
    counts = mask.sum(-1)
    assert counts.amin() < counts.amax() == kept.longest
    assert kept.mean == pytest.approx(counts.double().mean().item())
    sizes = md.variable_block_sizes.double()
    assert kept.mass == pytest.approx(((found @ sizes) / sizes.sum()).mean().item(), rel=1e-9)


@pytest.mark.parametrize("most", [1, 1.5, 4, 7.25, 11])
def test_the_average_of_every_clip_stays_within_the_bound_and_all_rows_give_up_the_same(most):
    md = metadata((7, 9, 11))
    masses, others = oracle_of(*peaked(md)[:2], md)
    kept = keep_mass(masses.clone(), others, 0.99, most, md)
    mask = kept.mask("cpu")
    counts = mask.sum(-1).double()
    assert counts.mean((1, 2)).max() <= most and kept.bounded and counts.amin() >= 1
    if most > 1:
        assert counts.mean((1, 2)).min() > 0.9 * most, "the room is used"
    found, own = held(masses, others, mask), torch.eye(kept.tiles, dtype=torch.bool)
    before_the_last = found - torch.where(mask & ~own, masses, torch.inf).amin(-1)
    assert (before_the_last.amax((1, 2)) <= found.amin((1, 2)) + 1e-6).all()


def test_a_clip_in_a_batch_has_the_lists_that_it_has_alone():
    md = metadata((7, 9, 11))
    masses, others = oracle_of(*peaked(md)[:2], md)
    both = keep_mass(masses.clone(), others, 0.95, 5, md).mask("cpu")
    for one in range(2):
        part = slice(one, one + 1)
        assert torch.equal(both[part], keep_mass(masses[part].clone(), others[part], 0.95, 5, md).mask("cpu"))


def test_broken_masses_make_lists_all_the_same():
    md = metadata((7, 9, 11))
    masses, others = oracle_of(*peaked(md)[:2], md)
    masses[0, 0, 3], others[0, 0, 3] = torch.nan, torch.nan
    kept = keep_mass(masses, others, 0.95, 5, md)
    assert kept.mask("cpu").sum(-1).ge(1).all() and kept.mean <= 5


@pytest.mark.parametrize("target, most", [(0.0, 3), (1.0, 3), (-1, 3), (float("nan"), 3), (0.9, 0.5)])
def test_a_target_that_cannot_be_aimed_at_is_refused(target, most):
    md = metadata((4, 4, 8))
    with pytest.raises(ValueError, match="wanted"):
        keep_mass(torch.rand(1, 1, 2, 2), torch.zeros(1, 1, 2), target, most, md)


@pytest.mark.parametrize("thw, tile, others", LAYOUTS, ids=str)
def test_lists_of_different_length_give_the_oracles_attention_on_every_route(thw, tile, others):
    md = metadata(thw, tile, **others)
    q, k, v = peaked(md)
    kept = keep_mass(*pooled_masses(q, k, md, 0.25), 0.9, prod(md.num_tiles), md)
    impl = VideoSparseAttentionImpl(3, 16)
    impl.kept = kept
    in_sequence = impl.attend(q, k, v, md)
    in_slots = impl.postprocess_output(impl.forward(*impl.preprocess_qkv(torch.cat([q, k, v]), md).chunk(3), None, md),
                                       md)
    check(in_sequence, q, k, v, kept, md, 1e-5)
    check(in_slots, q, k, v, kept, md, 1e-5)


@pytest.mark.parametrize("thw, tile, others", [((5, 5, 6), (4, 4, 4), dict(prefix=2, suffix=3)),
                                               ((5, 5, 9), (4, 4, 8), dict(suffix=65))], ids=str)
def test_lists_of_different_length_give_the_oracles_attention_on_the_triton_kernel(worker, thw, tile, others):
    md = metadata(thw, tile, **others)
    q, k, v = peaked(md, heads=2, dim=64, dtype=torch.float16)
    kept = keep_mass(*pooled_masses(q, k, md, 0.125), 0.8, prod(md.num_tiles), md)
    assert kept.by_head[0] < kept.by_head[1]
    out, _ = interpreted_kernel.attend_video(worker, q, k, v, None, kept, raw_latent_shape=thw, tile_size=tile,
                                             VSA_sparsity=0.7, **others)
    check(out, q, k, v, kept, md, 6e-4)


def check(out, q, k, v, kept, md, bound):
    """The attention is the oracle's on the same lists, which differ in length. Hidden tokens are left out of it."""
    grid, mask = md.grid, kept.mask("cpu")
    if grid.hidden:
        return check_hidden(out, q, k, v, mask, md, bound)
    rows = {(b, h, i): mask[b, h, i].nonzero().flatten().tolist()
            for b in range(mask.shape[0]) for h in range(mask.shape[1]) for i in range(mask.shape[2])}
    assert len({len(tiles) for tiles in rows.values()}) > 1
    wanted, *_ = vsa_attention_oracle(q, k, v, None, grid.thw, md.tile_size, 1, grid.prefix, grid.suffix,
                                      selection=rows)
    assert float(relative_l2_per_tile(out, wanted, grid.thw, md.tile_size, grid.prefix, grid.suffix).max()) <= bound


def check_hidden(out, q, k, v, mask, md, bound):
    """The same for hidden tokens, by a mask of all pairs."""
    from oracles import other_tokens, tile_of_token
    grid = md.grid
    own = torch.tensor(tile_of_token(grid.thw, md.tile_size))
    video = slice(grid.prefix, grid.prefix + len(own))
    seen = torch.ones(*mask.shape[:2], md.total_seq_length, md.total_seq_length, dtype=torch.bool)
    seen[:, :, video, video] = mask[:, :, own][..., own]
    places = other_tokens(grid.thw, grid.prefix, grid.suffix)
    seen[..., [places[i] for i in grid.hidden]] = False
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), attn_mask=seen).transpose(1, 2)
    assert float(relative_l2_per_tile(out, wanted, grid.thw, md.tile_size, grid.prefix, grid.suffix).max()) <= bound
