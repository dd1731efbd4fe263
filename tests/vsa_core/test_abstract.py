"""The shapes of backend, metadata, builder and implementation that every sparse method fills in."""
import inspect
from dataclasses import dataclass, fields, is_dataclass

import pytest
import torch

from pack.vsa_core.backends.abstract import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
)


@dataclass
class PlanWithTensors(AttentionMetadata):
    indices: torch.Tensor
    nested: dict


class PassThrough(AttentionImpl):
    def __init__(self, num_heads=1, head_size=1, softmax_scale=1.0, causal=False, num_kv_heads=None, prefix="", **_):
        pass

    def forward(self, query, key, value, attn_metadata):
        return value


@pytest.fixture
def plan():
    return PlanWithTensors(current_timestep=7, indices=torch.arange(4), nested={"rows": [1, 2]})


def test_metadata_is_a_dataclass_whose_first_field_is_the_timestep():
    assert is_dataclass(AttentionMetadata)
    assert [field.name for field in fields(AttentionMetadata)] == ["current_timestep"]
    assert AttentionMetadata(current_timestep=3).asdict_zerocopy() == {"current_timestep": 3}


def test_metadata_becomes_a_dict_that_shares_every_value(plan):
    as_dict = plan.asdict_zerocopy()
    assert list(as_dict) == ["current_timestep", "indices", "nested"]
    assert as_dict["indices"] is plan.indices and as_dict["nested"] is plan.nested
    as_dict["indices"][0] = 9
    assert int(plan.indices[0]) == 9


def test_skipped_fields_are_absent_from_the_dict_only(plan):
    assert plan.asdict_zerocopy({"indices", "no such field"}).keys() == {"current_timestep", "nested"}
    assert plan.asdict_zerocopy(skip_fields=set()).keys() == {"current_timestep", "indices", "nested"}
    assert plan.asdict_zerocopy(skip_fields=None).keys() == {"current_timestep", "indices", "nested"}


@pytest.mark.parametrize("cls", [AttentionBackend, AttentionImpl, AttentionMetadataBuilder])
def test_abstract_classes_cannot_be_made(cls):
    with pytest.raises(TypeError, match="abstract"):
        cls()


@pytest.mark.parametrize("missing", ["get_name", "get_impl_cls", "get_metadata_cls", "get_builder_cls"])
def test_a_backend_has_to_name_all_of_its_classes(missing):
    methods = {name: staticmethod(lambda: None)
               for name in ("get_name", "get_impl_cls", "get_metadata_cls", "get_builder_cls") if name != missing}
    with pytest.raises(TypeError, match=missing):
        type("Incomplete", (AttentionBackend,), methods)()


def test_a_backend_says_whether_it_takes_an_output_buffer():
    assert AttentionBackend.accept_output_buffer is False


@pytest.mark.parametrize("missing", ["__init__", "prepare", "build"])
def test_a_builder_has_to_prepare_and_build(missing):
    methods = {name: lambda self: None for name in ("__init__", "prepare", "build") if name != missing}
    with pytest.raises(TypeError, match=missing):
        type("Incomplete", (AttentionMetadataBuilder,), methods)()


def test_an_implementation_leaves_tensors_as_they_are_unless_it_says_otherwise(plan):
    x = torch.randn(2, 3, 1, 1)
    assert PassThrough().preprocess_qkv(x, plan) is x
    assert PassThrough().postprocess_output(x, plan) is x
    assert PassThrough().forward(x, x, x, plan) is x


def test_what_a_method_has_to_fill_in_raises_where_it_calls_it():
    for cls, names in ((AttentionBackend, ("get_name", "get_impl_cls", "get_metadata_cls", "get_builder_cls")),
                       (AttentionMetadataBuilder, ("__init__", "prepare", "build")), (AttentionImpl, ("forward",))):
        for name in names:
            body = getattr(cls, name)
            with pytest.raises(NotImplementedError):
                body(*[None] * sum(1 for part in inspect.signature(body).parameters.values()
                                   if part.kind is part.POSITIONAL_OR_KEYWORD))
    with pytest.raises(NotImplementedError):
        AttentionImpl.__init__(PassThrough(), 1, 1, 1.0)


class InOrder(PassThrough):
    """Marks every stage, so that a stage that is left out or comes too early shows."""

    def preprocess_qkv(self, qkv, attn_metadata):
        assert qkv.shape[0] == 6, "q, k and v of a batch of 2, stacked"
        return qkv * 2

    def forward(self, query, key, value, attn_metadata):
        return query + 10 * key + 100 * value + 1

    def postprocess_output(self, output, attn_metadata):
        return output * 3


def test_the_whole_way_is_preprocess_forward_postprocess_in_this_order(plan):
    q, k, v = torch.randn(3, 2, 5, 1, 4, dtype=torch.float64)
    assert torch.equal(InOrder().attend(q, k, v, plan), (2 * q + 10 * (2 * k) + 100 * (2 * v) + 1) * 3)
    with pytest.raises(ValueError, match="wanted one shape: they are stacked for preprocess_qkv"):
        InOrder().attend(q, k[:, :3], v[:, :3], plan)
    assert torch.equal(PassThrough().attend(q, k[:, :3], v[:, :3], plan), v[:, :3]), "without one they may differ"
