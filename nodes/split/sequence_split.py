"""The node "Multi-GPU Sequence Split"."""
from __future__ import annotations

import logging

from comfy_api.latest import io

from ..families import family_of
from ..hook.status import show_under_node
from .cards import ALL, cards_of, require_copies, unequal, with_copies
from .engines import AUTO, EXCHANGES, refusal
from .fan_out import SequenceSplit

log = logging.getLogger(__name__)


class MultiGPUSequenceSplit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MultiGPUSequenceSplit",
            display_name="Multi-GPU Sequence Split",
            category="model/patch",
            description=(
                "Samples one clip on several cards at once: each card has a copy of the model and a share of the "
                "tokens, and around attention they trade tokens for heads, so that the result is that of one card. "
                "Works with dense and sparse attention, before or after their nodes."),
            search_aliases=["multi gpu", "sequence parallel", "ulysses", "context parallel", "USP", "xDiT"],
            inputs=[
                io.Model.Input("model", tooltip="A video model from a loader of ComfyUI or of this pack. Other patches "
                                                "may come before or after."),
                io.String.Input(
                    "devices", default=ALL,
                    tooltip="all, or a list such as cuda:0, cuda:1. The card that the model is loaded for is always "
                            "among them. Use cards that are alike: each gets as many tokens."),
                io.Combo.Input(
                    "exchange", options=list(EXCHANGES), default=AUTO, optional=True, advanced=True,
                    tooltip="What moves tensors between the cards. device copies: each copies what it needs from the "
                            "others, on every system. torch.distributed: NCCL, not on Windows. auto takes device "
                            "copies."),
                io.Boolean.Input(
                    "check", default=False, optional=True, advanced=True,
                    tooltip="Runs the first pass on one card as well and says how far apart the results are. Costs one "
                            "pass on one card."),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, devices=ALL, exchange=AUTO, check=False) -> io.NodeOutput:
        node_id = getattr(getattr(cls, "hidden", None), "unique_id", None)
        family, net = family_of(model.model), model.model.diffusion_model
        stacks = family.stacks(net)
        if isinstance(stacks, str):
            raise ValueError(f"this model cannot be split over several cards: {stacks}. Remove this node")
        require_copies(model)
        cards = cards_of(devices, model.load_device)
        if reason := refusal(exchange, cards):
            raise ValueError(reason)
        if len(cards) == 1:
            text = f"NOT SPLIT: {cards[0]} is the only card here, the model passes through unchanged"
            log.warning("[split] %s", text)
            show_under_node(text, node_id)
            return io.NodeOutput(model)
        heads = family.heads(net)[0]
        if heads < len(cards):
            raise ValueError(f"this model has {heads} heads, {len(cards)} cards are too many for it: name at most "
                             f"{heads} in devices")
        said = [text for text in [unequal(cards)] if text]
        for text in said:
            log.warning("[split] %s", text)
            show_under_node(text, node_id)
        patched = with_copies(model, cards)
        SequenceSplit(cards, exchange, check, node_id, said).install(patched)
        return io.NodeOutput(patched)
