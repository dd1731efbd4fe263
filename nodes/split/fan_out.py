"""One forward pass on several cards of one process, a thread for each, on ComfyUI's copies of the model."""
from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack

import comfy.model_management
import torch
from comfy.patcher_extension import CallbacksMP

from ...vsa_core.thread_ranks import RankFailed, run_as_ranks
from ..hook.hook import SparseAttentionHook
from ..hook.run import Run
from ..hook.status import show_under_node
from ..trained.fed_layers import FedLayers
from .cards import KEY, matched_copies
from .engines import groups_of
from .evidence import Evidence
from .passes import Call, Split
from .shard import CannotSplit
from .split_attention import Times

log = logging.getLogger(__name__)


class SequenceSplit(Split):
    """The split over the devices of this process."""

    def __init__(self, devices: Sequence[torch.device], exchange: str, check: bool = False,
                 node_id: str | None = None, warnings: Sequence[str] = ()):
        super().__init__(list(map(str, devices)))
        self.devices, self.exchange, self.check, self.node_id = list(devices), exchange, check, node_id
        self.warnings = list(warnings)
        self._groups: list | None = None

    def install(self, clone) -> None:
        super().install(clone)
        for kind, callback in ((CallbacksMP.ON_PRE_RUN, _pre_run), (CallbacksMP.ON_CLEANUP, _cleanup)):
            clone.remove_callbacks_with_key(kind, KEY)
            clone.add_callback_with_key(kind, KEY, callback)

    def _outer_sample(self, executor, *args, **kwargs):
        model = executor.class_obj.model_patcher
        if model.get_additional_models_with_key("multigpu"):
            raise ValueError("Multi-GPU Sequence Split and MultiGPU CFG Split are on one model, and both want the "
                             "cards: remove one of the two nodes")
        copies = model.get_additional_models_with_key(KEY)
        model.set_additional_models(KEY, matched_copies(model))
        self.evidence = Evidence(self.cards)
        try:
            return executor(*args, **kwargs)
        finally:
            self._groups = None
            model.set_additional_models(KEY, copies)
            text = "\n- ".join([self.evidence.text(), *self.warnings])
            log.info("%s", text.replace("\n- ", " | "))
            show_under_node(text, self.node_id)

    def on_all_cards(self, executor, patcher, call: Call):
        copies = patcher.get_additional_models_with_key(KEY)
        if len(copies) != len(self.devices) - 1:
            raise CannotSplit("copies that are not loaded")
        alone = _alone(executor, patcher, call) if self.check and not self.evidence.checked else None
        if self._groups is None:
            self._groups = groups_of(self.exchange, self.devices)
        times = [Times() for _ in self.devices]
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

        def on(rank: int):
            with torch.inference_mode(modes[0]), torch.set_grad_enabled(modes[1]):
                if not rank:
                    return self.on_card(patcher, executor.class_obj, executor, call, times[0])
                return self._on_copy(rank, copies[rank - 1], executor.original.__name__, call, times[rank])

        try:
            results = run_as_ranks([lambda rank=rank: on(rank) for rank in range(len(self.devices))], self._groups)
        except RankFailed as failed:
            if isinstance(failed.error, CannotSplit):
                raise failed.error from None
            raise _told(failed, self.devices) from failed.error
        self.evidence.add({rank: (shard, times[rank]) for rank, (_, shard) in enumerate(results)})
        if alone is not None:
            self.evidence.compare(results[0][0], alone)
        return results[0][0]

    def _on_copy(self, rank: int, copy, name: str, call: Call, times: Times):
        """`on_card` for a card that has a copy. name: of its forward."""
        device, net = self.devices[rank], copy.model.diffusion_model
        comfy.model_management.set_torch_device(device)
        card = f"{device} (card {rank + 1})"
        with ExitStack() as stack:
            for layers in call.options.values():
                if isinstance(layers, FedLayers):
                    stack.enter_context(layers.feeding(copy.model))
            return self.on_card(copy, net, getattr(net, name), call.moved(device), times,
                                lambda run: run.part(card, other_heads=True))


def _alone(executor, patcher, call: Call):
    """The output of one card, of which nothing is counted."""
    with ExitStack() as stack:
        own = call.options
        for hook in SparseAttentionHook.of(patcher):
            own = stack.enter_context(hook.on_card(own, executor.class_obj, None,
                                                   lambda run: Run(run.method_name, run.backend)))
        return call.on(executor, own)


def _pre_run(model) -> None:
    for copy in model.get_additional_models_with_key(KEY):
        copy.pre_run()


def _cleanup(model) -> None:
    for copy in model.get_additional_models_with_key(KEY):
        copy.cleanup()


def _told(failed: RankFailed, devices: Sequence[torch.device]) -> BaseException:
    """What to raise for a card that failed: the error's own kind where the host knows it, with the card's name."""
    error, card = failed.error, devices[failed.rank]
    if isinstance(error, comfy.model_management.InterruptProcessingException) or not isinstance(error, Exception):
        return error
    text = f"Multi-GPU Sequence Split: {card} failed: {error}"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return torch.cuda.OutOfMemoryError(f"{text}. Use a smaller clip or a smaller format of the weights")
    return RuntimeError(text if str(error) else f"{text}{type(error).__name__}")
