"""One attention call run sparse: its kernel, the clock, and why it has to run dense after all."""
from __future__ import annotations

import logging
from dataclasses import replace

import comfy.model_management
import torch
from torch import Tensor

from ... import kernels
from ...kernels import Contest, KernelSpec
from ...kernels.contest import add
from ...vsa_core.grid import TokenGrid
from .closeness import Watch
from .method import LayerCall, Method, StaysDense
from .no_kernel import dense_instead, failure_text, no_kernel_text, words_of
from .run import MEASURE, PROBE, SPARSE, GridRecord, Run
from .settings import Settings
from .speed import DenseCall, Speed

log = logging.getLogger(__name__)

SLOWER = "sparse would be slower here"
KEEPS_ALL = "nothing would be left out"


class _DoesNotFit(Exception):
    """The settings cannot be used on this clip, whatever the kernel; the cause says why."""


class SparseCalls:
    """Runs the calls of one hook through its method, on a kernel that is right and, with `auto`, faster than dense."""

    def __init__(self, method: Method, settings: Settings):
        self.method, self.settings, self.speed = method, settings, Speed()

    def run(self, call: LayerCall, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor, scale: float | None,
            dense: DenseCall) -> tuple[Tensor | None, str | None]:
        """The result for q, k, v [B, S, H, D], or None and why the call has to run dense."""
        run = call.step.run
        if scale is not None and abs(scale - q.shape[-1] ** -0.5) > 1e-6 * scale:
            return None, "softmax scale other than head_dim ** -0.5"
        asked = kernels.Call.of(q)
        run.asked[asked] = None
        while True:
            spec = None
            try:
                spec = kernels.choose_kernel(asked, self.settings.backend, run.failed, announce=run.note,
                                             precision=self.settings.precision)
                run.proofs[spec.name] = kernels.proof_words(spec.name, asked)
                self._tell_precision(spec, asked, run)
                return self._on_kernel(replace(call, kernel=spec.name), grid, q, k, v, dense, spec.exact)
            except kernels.NoKernel as error:
                text = no_kernel_text(error, asked, self.settings.backend)
                if self.settings.insists:
                    raise RuntimeError(text) from None
                run.warn(text)
                return None, "no kernel"
            except _DoesNotFit as error:
                if self.settings.insists:
                    raise error.__cause__ from None
                run.warn(str(error.__cause__))
                return None, "the settings do not fit this clip"
            except StaysDense as reason:
                return None, str(reason)
            except comfy.model_management.InterruptProcessingException:
                raise
            except torch.cuda.OutOfMemoryError as error:
                if self.settings.insists:
                    raise RuntimeError("sparse attention ran out of GPU memory. Use a smaller clip. "
                                       + dense_instead(self.settings, self.method.has_strict)) from error
                run.plans.clear()
                run.warn("the sparse path ran out of memory: those attention calls ran dense")
                return None, "out of memory"
            except Exception as error:
                if spec is None:
                    raise
                if self.settings.insists:
                    raise RuntimeError(
                        failure_text(spec.name, error, self.settings, self.method.has_strict)) from error
                run.failed[spec.name] = f"failed in this run: {words_of(error)}"
                log.warning("[%s] kernel %s failed", self.method.name, spec.name, exc_info=True)

    def _tell_precision(self, spec: KernelSpec, asked: kernels.Call, run: Run) -> None:
        """Where "int8 scores" gets an exact kernel, say so and why."""
        if spec.exact and self.settings.precision == kernels.INT8_SCORES and self.settings.backend == kernels.AUTO:
            reasons = {**kernels.explain_kernels(asked), **run.failed}
            why = kernels.listed({name: reasons[name] for name in kernels.INT8_KERNELS if reasons.get(name)})
            run.warn(f"no int8 scores here, exact ones in their place: {why}")

    def _on_kernel(self, call: LayerCall, grid: TokenGrid, q, k, v, dense: DenseCall, exact: bool):
        run, step = call.step.run, call.step
        key = (grid, q.device)
        if key not in run.plans:
            try:
                run.plans[key] = self.method.plan(grid, q.device)
            except ValueError as error:
                raise _DoesNotFit from error
        plan, contest = run.plans[key], None
        if (self.settings.backend == kernels.AUTO and self.method.dense_serves
                and self.method.keeps_all(plan, q.shape[2], call)):
            return None, KEEPS_ALL
        if self.method.timed and not dense.is_sparse:
            contest = self.speed.contest(dense, call.kernel, self.method.work(plan, q.shape[2], call))
            if self._loses(call, contest, dense):
                return None, SLOWER
        record = run.records.get((grid, call.kernel)) or GridRecord(grid, self.method.facts(plan), call.kernel)
        sampled = run.sampled_step != step.number
        watch = run.closeness.watch(q.shape[0] * q.shape[1], call) if self.method.far_cure else None
        call = replace(call, record=record, sampled=sampled or self.settings.verbose, watch=watch)
        with run.timed(SPARSE, call.layer, q.device) as span:
            out = self.method.attend(plan, q, k, v, call)
        run.closeness.passed()
        if not exact and run.rounding.due((call.layers or 1) * call.step.total):
            self._check_rounding(run, plan, call, grid, q, k, v, out)
        if watch is not None:
            self._measure(run, watch, q, k, v, out)
        if sampled:
            run.sampled_step = step.number
            run.watch_finite(q, k, v)
        if contest is not None:
            if contest.sparse and contest.wants_dense():
                self._probe(contest, dense, run, q.device)
            add(contest.sparse, span)
            run.compared[contest] += 1
        record.calls += 1
        run.records[grid, call.kernel] = record
        return out, None

    def _loses(self, call: LayerCall, contest: Contest, dense: DenseCall) -> bool:
        """Whether this call runs dense because that is faster; the run learns both times in any case."""
        wins, run = contest.sparse_wins(), call.step.run
        if wins is None:
            return False
        run.medians[call.kernel] = (*contest.medians(), dense.name)
        if wins:
            return False
        sparse_ms, dense_ms = contest.medians()
        times = f"{sparse_ms:.1f} ms, dense {dense_ms:.1f} ms ({dense.name})"
        if self.method.dense_serves and self.settings.backend == kernels.AUTO:
            run.warn(f"{SLOWER}: {times}. To run it sparse all the same choose backend {call.kernel}")
            return True
        if not self.method.dense_serves:
            run.warn(f"sparse attention does not gain time here: {times}. This model was trained for it, so it stays")
        else:
            run.warn(f"sparse is slower than dense here: {times}. Backend {call.kernel} was chosen by name: it stays")
        return False

    def _check_rounding(self, run: Run, plan, call: LayerCall, grid: TokenGrid, q, k, v, out: Tensor) -> None:
        """Run a finished call on an exact kernel too, and compare. Nothing of it counts, or may fail the sampling."""
        try:
            apart = Run(run.method_name)
            spec = kernels.choose_kernel(kernels.Call.of(q))
            again = replace(call, kernel=spec.name, record=GridRecord(grid, dict(call.record.facts), spec.name),
                            sampled=False, watch=None, step=replace(call.step, run=apart))
            with run.timed(MEASURE, None, q.device):
                run.rounding.measure(out, self.method.attend(plan, q, k, v, again))
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:
            run.rounding.given_up = True
            run.note(f"how far int8 scores are from exact ones could not be measured: {words_of(error)}")

    @staticmethod
    def _measure(run: Run, watch: Watch, *tensors: Tensor) -> None:
        """Compute some tiles of a finished call exactly. The result is there, so that nothing may fail the sampling."""
        try:
            with run.timed(MEASURE, None, tensors[0].device):
                run.closeness.measure(watch, *tensors)
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:
            run.closeness.given_up = True
            run.note(f"how close sparse attention is to exact could not be measured: {words_of(error)}")

    @staticmethod
    def _probe(contest: Contest, dense: DenseCall, run: Run, device: torch.device) -> None:
        """Run the same call densely, only to be timed: where no dense step came before, nothing else tells."""
        try:
            with run.timed(PROBE, None, device) as span:
                dense.compute()
            add(contest.dense, span)
            run.probes += 1
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:
            contest.given_up = True
            run.note(f"dense attention could not be timed beside it: {words_of(error)}")
