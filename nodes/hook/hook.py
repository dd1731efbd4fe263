"""The attention hook: the one place that decides, for every attention call, sparse or dense, and counts why.

It lives in a clone's model_options only. The override that was there before is what "dense" means.
"""
from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ... import kernels
from ...vsa_core.grid import TokenGrid
from ..families import VideoFamily, family_of
from ..families.running_block import running_block, told_apart
from .layout import from_bshd, to_bshd
from .masks import hide_masked
from .method import LayerCall, Method, StaysDense, Step
from .run import DENSE, OTHER, SPARSE, GridRecord, Run
from .settings import Settings
from .status import show_under_node, status_text

log = logging.getLogger(__name__)

OVERRIDE = "optimized_attention_override"


class SparseAttentionHook:
    """Runs a method inside ComfyUI's attention calls for one patched model."""

    def __init__(self, method: Method, settings: Settings, family: VideoFamily, node_id: str | None = None):
        self.method, self.settings, self.family, self.node_id = method, settings, family, node_id
        self.last_run: Run | None = None
        self._run: Run | None = None
        self._run_is_implicit = False
        self._inside = threading.local()
        self._found_override = None
        self.key = f"video_sparse_attention.{method.name}"
        self._step_key, self._previous_key = f"{self.key}.step", f"{self.key}.previous"
        self.override = torch.compiler.disable(self._attend)
        self.override.sparse_attention_hook = self

    # -- install ------------------------------------------------------------------------------------------------

    @classmethod
    def install(cls, model, method: Method, settings: Settings, node_id: str | None = None):
        """A clone of `model` (ModelPatcher) whose video self-attention goes through `method`.

        A hook of the same method that the model already has is replaced.
        Raises ValueError for a model that is no video model or of no known family, and NoKernel when the kernel
        was chosen by name, or `strict` asks for one, and none can run this model on its device.
        """
        hook = cls(method, settings, family_of(model.model), node_id)
        hook._require_kernel(model)
        clone = model.clone()
        options = clone.model_options.setdefault("transformer_options", {})
        hook._remove_same_method(clone, options)
        hook._found_override = options.get(OVERRIDE)
        options[OVERRIDE] = hook.override
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, hook.key, hook._outer_sample)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, hook.key, hook._apply_model)
        clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, hook.key, hook._cleanup)
        return clone

    @staticmethod
    def of(model) -> list[SparseAttentionHook]:
        """The hooks that a ModelPatcher carries, first installed first."""
        wrappers = model.get_all_wrappers(WrappersMP.OUTER_SAMPLE)
        return [w.__self__ for w in wrappers if isinstance(getattr(w, "__self__", None), SparseAttentionHook)]

    def _remove_same_method(self, clone, options: dict) -> None:
        for old in self.of(clone):
            if old.key == self.key:
                log.info("[%s] replaces the settings of an earlier %s node", self.method.name, self.method.name)
                for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL):
                    clone.remove_wrappers_with_key(kind, old.key)
                clone.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, old.key)
                if options.get(OVERRIDE) is old.override:
                    options[OVERRIDE] = old._found_override
                    if old._found_override is None:
                        del options[OVERRIDE]

    def _require_kernel(self, model) -> None:
        base = model.model
        dtype = getattr(base, "get_dtype_inference", base.get_dtype)()
        call = kernels.Call.on(model.load_device, dtype, self.family.heads(base.diffusion_model)[1])
        try:
            kernels.choose_kernel(call, self.settings.backend)
        except kernels.NoKernel as error:
            if self.settings.strict or self.settings.backend != kernels.AUTO:
                raise
            log.warning("[%s] everything will run dense: %s", self.method.name, error)

    # -- one sampling -------------------------------------------------------------------------------------------

    def _outer_sample(self, executor, *args, **kwargs):
        outer, outer_is_implicit = self._run, self._run_is_implicit
        self._run, self._run_is_implicit = Run(self.method.name), False
        try:
            return executor(*args, **kwargs)
        finally:
            run, self._run, self._run_is_implicit = self._run, outer, outer_is_implicit
            self._report(run)

    def _cleanup(self, *_):
        if self._run is not None and self._run_is_implicit:
            run, self._run, self._run_is_implicit = self._run, None, False
            self._report(run)

    def _current_run(self) -> Run:
        if self._run is None:      # a caller that applies the model outside of ComfyUI's guiders
            self._run, self._run_is_implicit = Run(self.method.name), True
        return self._run

    def _report(self, run: Run) -> None:
        run.finish()
        for text in self.method.remarks(run):
            run.note(text)
        self.last_run = run
        text = status_text(run, self.settings.verbose)
        log.info("%s", text if self.settings.verbose else text.replace("\n", " | "))
        show_under_node(text, self.node_id)

    # -- one step -----------------------------------------------------------------------------------------------

    def _take_top(self, options: dict) -> None:
        """Put the override back on top, for this forward pass, when a node after ours has taken its place."""
        found = options.get(OVERRIDE)
        if not self._is_under(found, options):
            options[self._previous_key], options[OVERRIDE] = found, self.override
            if found is not None:
                self._current_run().note("a later node had replaced the attention override: it now serves as dense")

    def _is_under(self, override, options: dict) -> bool:
        seen = set()
        while (hook := getattr(override, "sparse_attention_hook", None)) is not None and id(hook) not in seen:
            if hook is self:
                return True
            seen.add(id(hook))
            override = options.get(hook._previous_key, hook._found_override)
        return False

    def _apply_model(self, executor, x, t, *args, **kwargs):
        """Note the grid and the schedule of this forward pass where the attention calls find them."""
        args = list(args)
        c_crossattn = args[1] if len(args) > 1 else kwargs.get("c_crossattn")
        options = args[3] if len(args) > 3 else kwargs.get("transformer_options", {})
        base, run = executor.class_obj, self._current_run()
        call = self.family.observe(base.diffusion_model, tuple(x.shape), c_crossattn, kwargs)
        high, low = self.settings.schedule.sigmas(base.model_sampling.percent_to_sigma)
        sigma = float(options["sigmas"].max()) if "sigmas" in options else float(t.max())
        run.steps += 1
        step = Step(run, base.diffusion_model, call, low <= sigma <= high, run.steps, *_place(sigma, options))
        options = {**options, self._step_key: step}
        self._take_top(options)
        if len(args) > 3:
            args[3] = options
        else:
            kwargs["transformer_options"] = options
        with told_apart(self.family.blocks(base.diffusion_model)):
            return executor(x, t, *args, **kwargs)

    # -- one attention call -------------------------------------------------------------------------------------

    def _attend(self, func, q, k, v, heads, *args, **kwargs):
        """ComfyUI's override signature: func(q, k, v, heads, mask, attn_precision, skip_reshape, ...)."""
        options = kwargs.get("transformer_options") or {}
        step: Step | None = options.get(self._step_key)
        if step is None or getattr(self._inside, "dense", False):
            return self._dense(func, options, q, k, v, heads, *args, **kwargs)
        names = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        skip_reshape = given.get("skip_reshape", False)
        run = step.run

        grid = self._grid(step, options, q, k, heads, given)
        if isinstance(grid, str):
            run.other[grid] += 1
            with run.timed(OTHER, None, q.device):
                return self._dense(func, options, q, k, v, heads, *args, **kwargs)
        layer, layers = self.family.layer(step.net, options, running_block(options))
        of_heads = self.family.heads(step.net)[0]
        part = step.heads_of(layer, heads, of_heads)
        reason = self._reason_for_dense(step, grid, layer, layers)
        if reason is None:
            qkv = tuple(to_bshd(x, heads, skip_reshape) for x in (q, k, v))
            call = LayerCall("", layer, layers, part, of_heads, step, options, None)
            out, reason = self._sparse(call, grid, *qkv, given.get("scale"))
            if out is not None:
                run.layers[layer][SPARSE] += 1
                return from_bshd(out, given.get("skip_output_reshape", False))
        run.dense[reason] += 1
        run.layers[layer][reason] += 1
        with run.timed(DENSE, layer, q.device):
            return self._dense(func, options, q, k, v, heads, *args, **kwargs)

    def _dense(self, func, options, *args, **kwargs):
        previous = options.get(self._previous_key, self._found_override)
        if previous is None or getattr(self._inside, "dense", False):
            return func(*args, **kwargs)
        self._inside.dense = True      # a chain that leads back to us must end, not turn in a circle
        try:
            return previous(func, *args, **kwargs)
        finally:
            self._inside.dense = False

    def _grid(self, step: Step, options, q, k, heads, given) -> TokenGrid | str:
        """Where the clip's tokens lie in this call, or what else the call is."""
        tokens = q.shape[-2]
        if k.shape[-2] != tokens:
            return "cross-attention"
        if k.shape != q.shape or given.get("enable_gqa"):
            return "fewer key heads than query heads"
        if given.get("low_precision_attention") is False:
            return "full precision asked for"
        head_dim = q.shape[-1] if given.get("skip_reshape", False) else q.shape[-1] // heads
        grid = self.family.locate(step.net, step.call, options, tokens, (heads, head_dim))
        if isinstance(grid, TokenGrid) and tokens in step.call.context_lengths:
            return "as many tokens as the text: self- or cross-attention"
        mask = given.get("mask")
        return grid if mask is None or isinstance(grid, str) else hide_masked(grid, mask, step.masks)

    def _reason_for_dense(self, step: Step, grid: TokenGrid, layer, layers) -> str | None:
        if grid.thw[0] == 1:
            return "one frame"
        if grid.num_video_tokens < self.settings.min_tokens:
            return f"fewer than {self.settings.min_tokens} tokens"
        if not step.scheduled:
            return "outside start_percent..end_percent"
        if self.settings.dense_blocks.ranges:
            if layer is None:
                return "layer not known"
            if self.settings.dense_blocks.contains(layer, layers):
                return "dense_blocks"
        return None

    def _sparse(self, call: LayerCall, grid: TokenGrid, q, k, v, scale) -> tuple[Tensor | None, str | None]:
        """The sparse result, or None and why the call has to run dense."""
        run = call.step.run
        if scale is not None and abs(scale - q.shape[-1] ** -0.5) > 1e-6 * scale:
            return None, "softmax scale other than head_dim ** -0.5"
        asked = kernels.Call.of(q)
        run.asked[asked] = None
        while True:
            try:
                spec = kernels.choose_kernel(asked, self.settings.backend, run.failed)
            except kernels.NoKernel as error:
                if self.settings.strict or self.settings.backend != kernels.AUTO:
                    raise
                run.note(str(error))
                return None, "no kernel"
            try:
                return self._run_kernel(replace(call, kernel=spec.name), grid, q, k, v), None
            except StaysDense as reason:
                return None, str(reason)
            except comfy.model_management.InterruptProcessingException:
                raise
            except torch.cuda.OutOfMemoryError:
                run.plans.clear()
                run.note("the sparse path ran out of memory; those calls ran dense")
                return None, "out of memory"
            except Exception as error:
                if self.settings.strict or self.settings.backend != kernels.AUTO:
                    raise RuntimeError(f"kernel {spec.name} failed: {type(error).__name__}: {error}. "
                                       "Choose another backend, or switch strict off to run dense instead") from error
                run.failed[spec.name] = f"failed in this run: {type(error).__name__}: {error}"
                log.warning("[%s] kernel %s failed", self.method.name, spec.name, exc_info=True)

    def _run_kernel(self, call: LayerCall, grid: TokenGrid, q, k, v) -> Tensor:
        run, kernel, step = call.step.run, call.kernel, call.step
        with run.timed(SPARSE, call.layer, q.device):
            key = (grid, q.device)
            if key not in run.plans:
                run.plans[key] = self.method.plan(grid, q.device)
            plan = run.plans[key]
            record = run.records.get((grid, kernel)) or GridRecord(grid, self.method.facts(plan), kernel)
            sampled = run.sampled_step != step.number
            out = self.method.attend(plan, q, k, v, replace(call, record=record,
                                                            sampled=sampled or self.settings.verbose))
        if sampled:
            run.sampled_step = step.number
            run.watch_finite(q, k, v)
        record.calls += 1
        run.records[grid, kernel] = record
        return out


def _place(sigma: float, options: dict[str, Any]) -> tuple[int, int]:
    """(index, number of steps) of a sigma in the sampling schedule; between two entries the nearer one counts."""
    sigmas = options.get("sample_sigmas")
    if sigmas is None or len(sigmas) < 2:
        return 0, 1
    steps = [abs(value - sigma) for value in sigmas.tolist()[:-1]]
    return steps.index(min(steps)), len(steps)
