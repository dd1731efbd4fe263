"""Bad input: each has its message, at the node where possible, and a counted dense fallback where not."""
import dataclasses

import pytest
import torch


@pytest.fixture
def validate(comfyui):
    from pack.nodes.methods.video_sparse_attention import VideoSparseAttentionPatch
    return VideoSparseAttentionPatch.validate_inputs


@pytest.mark.parametrize(("widgets", "message"), [
    ({"tile_size": "3x3x3"}, "tile_size '3x3x3' holds 27 tokens: wanted a multiple of 64"),
    ({"tile_size": "4x4"}, "tile_size '4x4': wanted time x height x width"),
    ({"tile_size": "0x8x8"}, "holds 0 tokens"),
    ({"dense_blocks": "0, x"}, "dense_blocks: cannot read 'x'"),
    ({"dense_blocks": "5-3"}, "range '5-3' runs backwards"),
    ({"start_percent": 0.6, "end_percent": 0.5}, "start_percent 0.6 is after end_percent 0.5"),
])
def test_bad_widgets_are_refused_before_and_at_execution(wan, vsa, validate, widgets, message):
    if "tile_size" in widgets:
        assert message in validate(**widgets)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        vsa(wan, **widgets)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5])
def test_sparsity_outside_its_range_is_refused(wan, vsa, sparsity):
    with pytest.raises(ValueError, match="wanted 0 to 0.99"):
        vsa(wan, sparsity)


def test_good_widgets_pass_validation(validate):
    assert validate(tile_size="2x8x8") is True
    assert validate(tile_size=None) is True, "it is fed by a link"


def test_a_model_that_makes_no_video_is_refused(comfyui, wan, vsa):
    class Image(torch.nn.Module):
        pass
    clone = wan.clone()
    base = Image()
    base.diffusion_model, base.latent_format = torch.nn.Linear(1, 1), type("Flat", (), {"latent_dimensions": 2})()
    clone.model = base
    with pytest.raises(ValueError, match=r"found Image \(Linear\), which makes no video"):
        vsa(clone)


def test_a_video_model_of_unknown_layout_is_refused_by_name(wan, vsa):
    class Strange(torch.nn.Module):
        pass
    clone = wan.clone()
    base = Strange()
    base.diffusion_model, base.latent_format = torch.nn.Linear(1, 1), wan.model.latent_format
    clone.model = base
    with pytest.raises(ValueError, match=r"found Strange \(Linear\), a video model whose token layout is not known"):
        vsa(clone)


def test_a_kernel_chosen_by_name_that_cannot_run_here_is_an_error_with_every_reason(wan, vsa):
    if torch.cuda.is_available():
        pytest.skip("the Triton kernel may run here")
    with pytest.raises(RuntimeError) as error:
        vsa(wan, backend="triton")
    assert str(error.value) == ("triton: your CPU cannot run it (needs an NVIDIA card). Set backend to auto, or bypass "
                                "this node (Ctrl+B)")
    assert type(error.value) is RuntimeError, "ComfyUI shows the path of any class of ours"


def test_an_unknown_backend_is_refused(wan, vsa):
    with pytest.raises(ValueError, match="unknown kernel 'warp': wanted 'auto' or one of"):
        vsa(wan, backend="warp")


def refusing(spec, reason):
    return dataclasses.replace(spec, missing=lambda: reason)


def test_without_any_kernel_auto_runs_dense_and_says_why(wan, vsa, run_of, draw, kernel_table):
    from pack.kernels import reference
    kernel_table(refusing(reference.SPEC, "broken for this test"))
    patched = vsa(wan, 0.9, backend="auto")
    assert torch.equal(draw(patched), draw(wan))
    run = run_of(patched)
    assert run.dense == {"no kernel": 4} and run.sparse_calls == 0
    assert any("reference: broken for this test" in note for note in run.said)


def test_without_any_kernel_strict_is_an_error(wan, vsa, kernel_table):
    from pack.kernels import reference
    kernel_table(refusing(reference.SPEC, "broken for this test"))
    with pytest.raises(RuntimeError, match="broken for this test"):
        vsa(wan, 0.9, strict=True, backend="auto")


def crashing(spec, name="crashing"):
    def run(*_):
        raise RuntimeError("PTX was not understood")
    return dataclasses.replace(spec, name=name, load=lambda: run)


def test_a_kernel_that_fails_is_left_for_the_next_one_and_named(wan, vsa, run_of, draw, kernel_table):
    from pack.kernels import reference
    kernel_table(crashing(reference.SPEC), reference.SPEC)
    patched, plain = vsa(wan, 0.5, backend="auto"), vsa(wan, 0.5)
    assert torch.equal(draw(patched), draw(plain))
    run = run_of(patched)
    assert run.sparse_calls == 4 and "PTX was not understood" in run.failed["crashing"]
    assert {entry["backend"] for entry in run.summary()} == {"reference"}


def test_when_every_kernel_fails_the_clip_is_still_finished_dense(wan, vsa, run_of, draw, kernel_table):
    from pack.kernels import reference
    kernel_table(crashing(reference.SPEC))
    patched = vsa(wan, 0.9, backend="auto")
    assert torch.equal(draw(patched), draw(wan))
    assert run_of(patched).dense == {"no kernel": 4}
    assert any("PTX was not understood" in note for note in run_of(patched).said)


@pytest.mark.parametrize(("widgets", "advice"), [
    ({"strict": True, "backend": "auto"}, "Switch strict off to run"),
    ({"backend": "crashing"}, "Set backend to auto to run"),
    ({"strict": True, "backend": "crashing"}, "Set backend to auto and switch strict off to run"),
], ids=["strict", "by name", "both"])
def test_a_kernel_that_fails_is_an_error_with_advice_that_helps(wan, vsa, draw, kernel_table, widgets, advice):
    from pack.kernels import reference
    kernel_table(crashing(reference.SPEC))
    with pytest.raises(RuntimeError) as error:
        draw(vsa(wan, 0.9, **widgets))
    assert str(error.value) == ("the kernel crashing failed in the middle of the sampling: PTX was not understood. "
                                f"{advice} such attention calls dense, or bypass this node (Ctrl+B)")


def test_running_out_of_memory_runs_those_calls_dense(wan, vsa, run_of, draw, kernel_table):
    from pack.kernels import reference

    def run(*_):
        raise torch.OutOfMemoryError("no room")
    kernel_table(dataclasses.replace(reference.SPEC, load=lambda: run))
    patched = vsa(wan, 0.9, backend="auto")
    assert torch.equal(draw(patched), draw(wan))
    assert run_of(patched).dense == {"out of memory": 4}


def test_nan_in_the_model_is_reported_and_nothing_crashes(wan, vsa, run_of, draw):
    clone = wan.clone()
    clone.add_patches({"diffusion_model.blocks.0.self_attn.q.bias": (torch.full((256,), torch.nan),)}, 1.0)
    patched = vsa(clone, 0.9)
    out = draw(patched)
    assert torch.isnan(out).any()
    assert any("NaN or infinity came in with q, k or v" in note for note in run_of(patched).said)


class Attention:
    """Calls the hook of a patched model as ComfyUI does, with operands of the test's choosing."""

    def __init__(self, patched, net):
        from pack.nodes.families import ModelCall
        from pack.nodes.hook.hook import SparseAttentionHook
        from pack.nodes.hook.method import Step
        from pack.nodes.hook.run import Run
        self.hook = SparseAttentionHook.of(patched)[0]
        self.run = Run("VSA")
        call = ModelCall((5, 4, 6), (1, 1, 1), frozenset(), frozenset())
        self.hook._steps["here"] = Step(self.run, net, call, True, 1)
        self.options = {self.hook._step_key: "here", "grid_sizes": (5, 4, 6)}

    def __call__(self, q, k, v, heads, **kwargs):
        def dense(q, k, v, heads, **_):
            self.called_dense = True
            return q
        self.called_dense = False
        self.hook.override(dense, q, k, v, heads, transformer_options=self.options, **kwargs)
        assert self.called_dense == (self.run.sparse_calls == 0)
        return self.run


def heads_in_rows(tokens, heads=2, dim=64, dtype=torch.float32):
    return torch.randn(1, tokens, heads * dim).to(dtype)


@pytest.mark.parametrize(("lengths", "kwargs", "outcome"), [
    ((120, 120), {}, None),
    ((120, 77), {}, "cross-attention"),
    ((120, 120), {"mask": torch.zeros(1, 1, 120, 120)}, "attention mask"),
    ((120, 120), {"low_precision_attention": False}, "full precision asked for"),
    ((120, 120), {"enable_gqa": True}, "fewer key heads than query heads"),
    ((77, 77), {}, "attention over something other than the clip"),
    ((150, 150), {}, "tokens beside the clip whose place is not known"),
])
def test_calls_that_are_not_the_clip_attending_to_itself_stay_dense(wan, vsa, lengths, kwargs, outcome):
    attention = Attention(vsa(wan, 0.5), wan.model.diffusion_model)
    q, k = (heads_in_rows(n) for n in lengths)
    run = attention(q, k, k, 2, **kwargs)
    assert dict(run.other) == ({} if outcome is None else {outcome: 1})


def test_another_softmax_scale_runs_dense(wan, vsa):
    x = heads_in_rows(120)
    run = Attention(vsa(wan, 0.5), wan.model.diffusion_model)(x, x, x, 2, scale=0.5)
    assert dict(run.dense) == {"softmax scale other than head_dim ** -0.5": 1}


def test_head_dim_96_runs_on_the_reference_and_is_refused_by_triton(wan, vsa):
    from pack.kernels import Call, explain_kernels
    refused = explain_kernels(Call("cuda", (8, 9), torch.bfloat16, 96))["triton"]
    assert refused == "it takes heads of 64 or 128 channels, this model has 96"
    x = heads_in_rows(120, dim=96)
    assert Attention(vsa(wan, 0.5), wan.model.diffusion_model)(x, x, x, 2).sparse_calls == 1


@pytest.mark.parametrize("layout", ["rows", "heads"])
def test_both_host_layouts_give_the_same_result(wan, vsa, layout):
    attention = Attention(vsa(wan, 0.5), wan.model.diffusion_model)
    q, k, v = (heads_in_rows(120) for _ in range(3))
    wanted = attention.hook.override(None, q, k, v, 2, transformer_options=attention.options)
    split = [x.view(1, 120, 2, 64).transpose(1, 2) for x in (q, k, v)]
    found = attention.hook.override(None, *split, 2, transformer_options=attention.options, skip_reshape=True,
                                    skip_output_reshape=layout == "heads")
    found = found.transpose(1, 2).flatten(2) if layout == "heads" else found
    assert torch.equal(found, wanted)
