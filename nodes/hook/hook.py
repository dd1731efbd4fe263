"""The attention hook: the one place that decides, for every attention call, sparse or dense, and counts why.

It lives in a clone's model_options only. The override that was there before is what "dense" means.
"""
from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ...kernels.contest import add
from ...vsa_core.grid import TokenGrid
from ..families import VideoFamily, family_of
from ..families.running_block import running_block, told_apart
from .beforehand import blocks_that_are_not_there, prove_kernels
from .chain import hooks_from
from .layout import from_bshd, to_bshd
from .masks import hide_masked
from .method import CompletesDense, LayerCall, Method, PlansItsStart, Step
from .place_of_run import executing
from .places import is_compiled, noise_of_schedule, place_in_schedule
from .run import DENSE, OTHER, SPARSE, Run
from .settings import FEW_STEPS, Settings
from .sparse_calls import SparseCalls
from .speed import DenseCall
from .status import node_text, replaced_text, show_under_node, status_text, unseen_text

log = logging.getLogger(__name__)

OVERRIDE = "optimized_attention_override"
_numbers = itertools.count()


class SparseAttentionHook:
    """Runs a method inside ComfyUI's attention calls for one patched model."""

    def __init__(self, method: Method, settings: Settings, family: VideoFamily, node_id: str | None = None):
        self.method, self.settings, self.family, self.node_id = method, settings, family, node_id
        self.runs: list[Run] = []
        """Those of the prompt that sampled last, in order."""
        self.warnings: list[str] = []
        """What every run of this hook has to say."""
        self._run: Run | None = None
        self._run_is_implicit = False
        self._inside = threading.local()
        self._steps: dict[str, Step] = {}
        self._found_override = None
        self.calls = SparseCalls(method, settings)
        self.key = f"video_sparse_attention.{method.name}"
        # The host and other packs copy, compare and list transformer_options: a step is there as a string. With the
        # hook's own number in it, a graph that was compiled around an earlier hook does not take it for its own.
        self._step_key, self._previous_key = f"{self.key}.step.{next(_numbers)}", f"{self.key}.previous"
        self.override = torch.compiler.disable(self._attend)
        self.override.sparse_attention_hook = self

    @property
    def last_run(self) -> Run | None:
        return self.runs[-1] if self.runs else None

    # -- install ------------------------------------------------------------------------------------------------

    @classmethod
    def install(cls, model, method: Method, settings: Settings, node_id: str | None = None):
        """A clone of `model` (ModelPatcher) whose video self-attention goes through `method`.

        A hook of the same method that the model already has is replaced.
        Raises ValueError for a model that is no video model or of no known family, and RuntimeError when the
        kernel was chosen by name, or `strict` asks for one, and none can run this model on its device.
        """
        hook = cls(method, settings, family_of(model.model), node_id)
        hook.warnings = blocks_that_are_not_there(model, hook.family, settings)
        if why_off := prove_kernels(model, hook.family, settings, node_id):
            show_under_node(f"{method.name} will be OFF: {why_off}", node_id)
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

    # -- one sampling -------------------------------------------------------------------------------------------

    def _outer_sample(self, executor, *args, **kwargs):
        outer, outer_is_implicit = self._run, self._run_is_implicit
        self._run, self._run_is_implicit = self._new_run(), False
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
            self._run, self._run_is_implicit = self._new_run(), True
        return self._run

    def note(self, text: str) -> None:
        """Have the run that is in progress say this, once."""
        self._current_run().here().note(text)

    def _new_run(self) -> Run:
        run = Run(self.method.name, self.settings.backend, *executing())
        run.warnings += self.warnings
        run.chosen = self.settings.said
        return run

    def _report(self, run: Run) -> None:
        run.finish()
        for text in self.method.remarks(run):
            run.warn(text)
        if self.method.far_cure and (text := run.closeness.warning(self.method.far_cure)):
            run.warn(text)
        self.runs = [*(earlier for earlier in self.runs if earlier.prompt == run.prompt is not None), run]
        text = status_text(run, True) if self.settings.verbose else node_text(run)
        log.info("%s", text if self.settings.verbose else text.replace("\n- ", " | "))
        show_under_node(text, self.node_id)

    # -- one step -----------------------------------------------------------------------------------------------

    def _take_top(self, options: dict) -> None:
        """Put the override back on top, for this forward pass, when a node after ours has taken its place."""
        found = options.get(OVERRIDE)
        if self not in hooks_from(found, options):
            options[self._previous_key], options[OVERRIDE] = found, self.override
            if found is not None:
                self._current_run().here().note("a node behind this one had taken the attention over: it now computes "
                                                "what stays dense")

    def _apply_model(self, executor, x, t, *args, **kwargs):
        """Note the grid and the schedule of this forward pass where the attention calls find them."""
        args = list(args)
        c_crossattn = args[1] if len(args) > 1 else kwargs.get("c_crossattn")
        options = args[3] if len(args) > 3 else kwargs.get("transformer_options", {})
        base, run = executor.class_obj, self._current_run().here()
        try:
            call = self.family.observe(base.diffusion_model, tuple(x.shape), c_crossattn, kwargs)
        except Exception as error:
            run.unseen = replaced_text(self.method.name, base.diffusion_model, error)
            if self.settings.strict:
                raise RuntimeError(run.unseen) from error
            return executor(x, t, *args, **kwargs)
        sigma = float(options["sigmas"].max()) if "sigmas" in options else float(t.max())
        to_sigma = base.model_sampling.percent_to_sigma
        place = place_in_schedule(sigma, options.get("sample_sigmas"), to_sigma)
        number = run.begin_pass(*place)
        noise = noise_of_schedule(options.get("sample_sigmas"), place[1], base.model_sampling)
        step = Step(run, base.diffusion_model, call, self._scheduled(run, sigma, to_sigma, *place), number, *place,
                    noise)
        token, seen = f"{run.steps}.{next(_numbers)}", run.seen
        options = {**options, self._step_key: token}
        self._take_top(options)
        if len(args) > 3:
            args[3] = options
        else:
            kwargs["transformer_options"] = options
        self._steps[token] = step
        try:
            with told_apart(self.family.blocks(base.diffusion_model)):
                out = executor(x, t, *args, **kwargs)
                if run.seen == seen and run.steps == 1:
                    out = self._unseen(run, base, options, lambda: executor(x, t, *args, **kwargs), out)
            return out
        finally:
            del self._steps[token]

    @contextmanager
    def on_card(self, options: dict, net, heads: range | None, run: Callable[[Run], Run] = lambda run: run,
                ) -> Iterator[dict]:
        """The transformer_options under which a copy of the model computes these heads of the pass that is running.

        net: its diffusion model.   heads: None for all.   run: which part of the pass's run counts its calls.
        """
        step = self._steps.get(options.get(self._step_key))
        if step is None:
            yield options
            return
        token = f"{options[self._step_key]}.{next(_numbers)}"
        self._steps[token] = replace(step, run=run(step.run), net=net, share=heads, next_head={}, masks=[])
        try:
            if net is step.net:
                yield {**options, self._step_key: token}
            else:
                with told_apart(self.family.blocks(net)):
                    yield {**options, self._step_key: token}
        finally:
            del self._steps[token]

    def _scheduled(self, run: Run, sigma: float, to_sigma: Callable[[float], float], index: int, total: int) -> bool:
        """Whether the schedule lets a forward pass run sparse, at this step of so many."""
        schedule = self.settings.schedule
        if isinstance(self.method, PlansItsStart) and self.method.plans_start(total):
            schedule = replace(schedule, start_percent=0.0)
        holds = schedule.holds(sigma, to_sigma)
        if holds or not self.settings.few_steps or not 0 < index < total <= FEW_STEPS:
            return holds
        holds = replace(schedule, start_percent=0.0).holds(sigma, to_sigma)
        if holds:
            run.note(f"of {total} steps only the first is dense at the start (start_percent "
                     f"{schedule.start_percent:g} with preset custom would make more)")
        return holds

    def _unseen(self, run: Run, base, options, again: Callable[[], Tensor], out: Tensor) -> Tensor:
        """The first forward pass made no attention call that the hook saw: where the model is compiled, a graph from
        before the node was there ran, so it is made anew and the pass done again; elsewhere the run says so."""
        if is_compiled(base.diffusion_model, options):
            torch._dynamo.reset()
            run.note("the compiled model was built before this node was there: it was compiled again")
            out = again()
        if not run.seen:
            text = unseen_text(self.method.name)
            if self.settings.strict:
                raise RuntimeError(text)
            run.unseen = text
        return out

    # -- one attention call -------------------------------------------------------------------------------------

    def _attend(self, func, q, k, v, heads, *args, **kwargs):
        """ComfyUI's override signature: func(q, k, v, heads, mask, attn_precision, skip_reshape, ...)."""
        options = kwargs.get("transformer_options") or {}
        step = self._steps.get(options.get(self._step_key))
        if step is None or getattr(self._inside, "dense", False):
            return self._dense(func, options, q, k, v, heads, *args, **kwargs)
        step.run.seen += 1
        names = ("mask", "attn_precision", "skip_reshape", "skip_output_reshape")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        skip_reshape = given.get("skip_reshape", False)
        run = step.run

        grid = self._grid(step, options, q, k, heads, given)
        if isinstance(grid, str):
            run.other[grid] += 1
            with run.timed(OTHER, None, q.device):
                out = self._dense(func, options, q, k, v, heads, *args, **kwargs)
            return self._completed(out, (q, k, v), heads, given, options, run, OTHER)
        layer, layers = self.family.layer(step.net, options, running_block(options))
        of_heads = self.family.heads(step.net)[0]
        part = step.heads_of(layer, heads, of_heads)
        run.tokens = max(run.tokens, grid.num_video_tokens)
        reason = self._reason_for_dense(step, grid, layer, layers)
        dense = DenseCall.of(lambda: self._dense(func, options, q, k, v, heads, *args, **kwargs), q, k, func,
                             self.previous(options))
        if reason is None:
            qkv = tuple(to_bshd(x, heads, skip_reshape) for x in (q, k, v))
            call = LayerCall("", layer, layers, part, of_heads, step, options, None)
            out, reason = self.calls.run(call, grid, *qkv, given.get("scale"), dense)
            if out is not None:
                run.layers[layer][SPARSE] += 1
                run.sparse_steps.add(step.index)
                self._tell_those_before(options)
                return from_bshd(out, given.get("skip_output_reshape", False))
        run.dense[reason] += 1
        run.layers[layer][reason] += 1
        with run.timed(DENSE, layer, q.device) as span:
            out = dense.compute()
        add(self.calls.speed.dense_times(dense), span)
        return self._completed(out, (q, k, v), heads, given, options, run, layer)

    def _completed(self, out, qkv, heads, given, options, run: Run, layer):
        """A dense result with what the model was trained to have added to it."""
        finish = self.method.after_dense(options) if isinstance(self.method, CompletesDense) else None
        if finish is None:
            return out
        run.completed[layer] += 1
        skip_output_reshape = given.get("skip_output_reshape", False)
        qkv = (to_bshd(x, heads, given.get("skip_reshape", False)) for x in qkv)
        return from_bshd(finish(to_bshd(out, heads, skip_output_reshape), *qkv), skip_output_reshape)

    def _dense(self, func, options, *args, **kwargs):
        previous = self.previous(options)
        if previous is None or getattr(self._inside, "dense", False):
            return func(*args, **kwargs)
        self._inside.dense = True      # a chain that leads back to us must end, not turn in a circle
        try:
            return previous(func, *args, **kwargs)
        finally:
            self._inside.dense = False

    def _tell_those_before(self, options) -> None:
        """Sparse nodes before this one do not see the calls that this one has computed: their runs count them."""
        for hook in hooks_from(self.previous(options), options):
            if hook is not self and (step := hook._steps.get(options.get(hook._step_key))) is not None:
                step.run.taken[self.method.name] += 1

    def previous(self, options):
        """The override that was there before ours, or None."""
        return options.get(self._previous_key, self._found_override)

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
