"""Masses of tiles against a float64 oracle."""
import pytest
import torch

from mass_cases import LAYOUTS, metadata, oracle_of, peaked
from pack.vsa_core.mass import pooled_masses


@pytest.mark.parametrize("thw, tile, others", LAYOUTS, ids=str)
def test_tile_means_tell_the_masses_of_tiles_whose_tokens_are_alike(thw, tile, others):
    md = metadata(thw, tile, **others)
    q, k, _ = peaked(md)
    owner = md.token_rows[:md.num_video_slots].view(-1, md.slots_per_tile)
    for rows in owner:
        rows = rows[rows >= 0].long()
        for x in (q, k):
            x[:, rows] = x[:, rows].mean(1, keepdim=True)
    found, wanted = pooled_masses(q, k, md, 0.25), oracle_of(q, k, md)
    assert relative_l2(*(torch.cat([masses, rest[..., None]], -1) for masses, rest in (found, wanted))) <= 1e-5


def relative_l2(found, wanted):
    """The largest over (batch, head, query tile)."""
    return ((found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()
