"""Which backend a layer gets: forced, asked for by the environment, or its own first choice."""
import logging

import pytest
import torch

from pack.vsa_core.backends import BACKENDS
from pack.vsa_core.backends.sdpa import SDPABackend
from pack.vsa_core.backends.sliding_tile_attn import SlidingTileAttentionBackend
from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionBackend
from pack.vsa_core.selector import (
    STR_BACKEND_ENV_VAR,
    AttentionBackendEnum,
    backend_name_to_enum,
    get_attn_backend,
    get_env_variable_attn_backend,
    get_global_forced_attn_backend,
    global_force_attn_backend,
    global_force_attn_backend_context_manager,
)

DENSE, VSA, STA = (AttentionBackendEnum.TORCH_SDPA, AttentionBackendEnum.VIDEO_SPARSE_ATTN,
                   AttentionBackendEnum.SLIDING_TILE_ATTN)


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv(STR_BACKEND_ENV_VAR, raising=False)
    yield
    global_force_attn_backend(None)


@pytest.mark.parametrize("backend", [SDPABackend, *BACKENDS])
def test_every_backend_has_a_member_of_its_name_and_is_selected_by_it(backend, monkeypatch):
    member = backend_name_to_enum(backend.get_name())
    assert member.name == backend.get_name()
    assert get_attn_backend(64, torch.bfloat16, (member,)) is backend
    monkeypatch.setenv(STR_BACKEND_ENV_VAR, backend.get_name())
    assert get_env_variable_attn_backend() is member and get_attn_backend(64, torch.float32) is backend
    assert {member.name for member in AttentionBackendEnum} == {x.get_name() for x in (SDPABackend, *BACKENDS)}


def test_without_a_wish_a_layer_gets_its_first_choice_and_dense_when_it_has_none():
    assert get_attn_backend(128, torch.float32) is SDPABackend
    assert get_attn_backend(128, torch.float32, (STA, VSA, DENSE)) is SlidingTileAttentionBackend
    assert get_attn_backend(16, torch.float32, (VSA, DENSE)) is VideoSparseAttentionBackend
    assert STR_BACKEND_ENV_VAR == "FASTVIDEO_ATTENTION_BACKEND"
    assert get_env_variable_attn_backend() is None and get_global_forced_attn_backend() is None


def test_the_forced_backend_goes_before_the_environments(monkeypatch):
    monkeypatch.setenv(STR_BACKEND_ENV_VAR, "VIDEO_SPARSE_ATTN")
    assert get_attn_backend(64, torch.float32) is VideoSparseAttentionBackend
    global_force_attn_backend(STA)
    assert get_attn_backend(64, torch.float32) is SlidingTileAttentionBackend
    global_force_attn_backend(None)
    assert get_attn_backend(64, torch.float32) is VideoSparseAttentionBackend


def test_a_context_manager_forces_inside_and_restores_behind_even_after_an_error():
    global_force_attn_backend(VSA)
    with global_force_attn_backend_context_manager(STA):
        assert get_global_forced_attn_backend() is STA
        with global_force_attn_backend_context_manager(None):
            assert get_attn_backend(64, torch.float32) is SDPABackend
        assert get_global_forced_attn_backend() is STA
    with pytest.raises(RuntimeError, match="inside"), global_force_attn_backend_context_manager(DENSE):
        raise RuntimeError("inside")
    assert get_global_forced_attn_backend() is VSA


@pytest.mark.parametrize("name", ["FLASH_ATTN", "sliding_tile_attn", "SLIDING_TILE", " "])
def test_a_typo_in_the_environment_raises_with_the_list(name, monkeypatch):
    assert backend_name_to_enum(name) is None
    monkeypatch.setenv(STR_BACKEND_ENV_VAR, name)
    for call in (get_env_variable_attn_backend, lambda: get_attn_backend(64, torch.float32)):
        with pytest.raises(ValueError, match=f"BACKEND={name}: wanted one of TORCH_SDPA, VIDEO_SPARSE_ATTN, SLIDING"):
            call()


def test_an_empty_variable_is_an_unset_one(monkeypatch):
    monkeypatch.setenv(STR_BACKEND_ENV_VAR, "")
    assert get_env_variable_attn_backend() is None


def test_a_wish_that_a_layer_cannot_grant_raises_with_the_reason(monkeypatch):
    with global_force_attn_backend_context_manager(VSA), pytest.raises(
            ValueError, match=r"VIDEO_SPARSE_ATTN \(forced it\) cannot be had: this layer supports SLIDING_TILE_ATTN"):
        get_attn_backend(64, torch.float32, (STA,))
    monkeypatch.setenv(STR_BACKEND_ENV_VAR, "SLIDING_TILE_ATTN")
    with pytest.raises(ValueError, match="BACKEND asks for it.*no kernel takes head_size 64 in torch.float8_e4m3fn"):
        get_attn_backend(64, torch.float8_e4m3fn)


def test_selection_falls_to_dense_and_says_so_where_no_kernel_takes_the_dtype(caplog):
    with caplog.at_level(logging.WARNING):
        assert get_attn_backend(64, torch.float8_e4m3fn, (STA, DENSE)) is SDPABackend
    assert "falls to TORCH_SDPA: SLIDING_TILE_ATTN: no kernel takes head_size 64" in caplog.text


def test_a_layer_that_can_have_nothing_raises_with_every_reason():
    with pytest.raises(ValueError, match=r"VIDEO_SPARSE_ATTN: found head_size 64 and torch.int32.*· SLIDING_TILE_ATTN"):
        get_attn_backend(64, torch.int32, (VSA, STA))
    with pytest.raises(ValueError, match="found head_size 0"):
        get_attn_backend(0, torch.float32)
    with pytest.raises(ValueError, match="supports no attention backend"):
        get_attn_backend(64, torch.float32, ())
    with pytest.raises(ValueError, match="'SLIDING_TILE_ATTN': wanted an AttentionBackendEnum"):
        global_force_attn_backend("SLIDING_TILE_ATTN")
