"""The cards of a split: which ones a user named, and a copy of the model on each."""
from __future__ import annotations

import comfy.model_management
import torch

KEY = "video_sparse_attention.sequence_split"
"""Of the copies among a model's additional models, and of the split's wrappers and callbacks."""
ALL = "all"
UNEQUAL = 1.25
"""Cards whose number of multiprocessors differs by more than this factor are told."""
_COPY = "_video_sparse_attention_copy"


def cards_of(text: str, first: torch.device) -> list[torch.device]:
    """The devices that `text` names, "all" or a list such as "cuda:0, cuda:1"; `first`, where the model is, leads.

    Raises ValueError: found, wanted.
    """
    here = [torch.device(device) for device in comfy.model_management.get_all_torch_devices()]
    on_cpu = first.type == "cpu"
    known = ", ".join(map(str, here)) + (", cpu:0" if on_cpu else "")
    if text.strip().lower() == ALL:
        return [first, *(device for device in here if device != first or on_cpu and device is not here[0])]
    names = [name.strip() for name in text.split(",") if name.strip()]
    found = []
    for name in names:
        try:
            device = torch.device(int(name) if name.isdigit() else name)
        except (RuntimeError, ValueError):
            raise ValueError(f"devices {text!r}: {name!r} is no device, wanted all or a list of {known}") from None
        if device.type != "cpu" and device.index is None:
            device = torch.device(device.type, 0)
        if device not in here and not (on_cpu and device.type == "cpu"):
            raise ValueError(f"devices {text!r}: there is no {name} here, wanted all or a list of {known}")
        if device in found:
            raise ValueError(f"devices {text!r}: {name} is named twice, wanted each card once")
        found.append(device)
    if not found:
        raise ValueError(f"devices {text!r}: wanted all or a list of {known}")
    if first not in found:
        raise ValueError(f"devices {text!r}: the model is loaded for {first}, which is not among them. Add it, or move "
                         "the model with Select Model Device")
    return [first, *(device for device in found if device != first)]


def unequal(devices: list[torch.device]) -> str:
    """What to say of cards that are not alike, "" where they are or where it cannot be told."""
    if any(device.type != "cuda" for device in devices):
        return ""
    cards = [torch.cuda.get_device_properties(device) for device in devices]
    sizes = [card.multi_processor_count for card in cards]
    memory = [card.total_memory for card in cards]
    if max(sizes) <= UNEQUAL * min(sizes) and max(memory) <= UNEQUAL * min(memory):
        return ""
    told = ", ".join(f"{device} {card.name} ({card.multi_processor_count} multiprocessors, "
                     f"{card.total_memory / 2**30:.0f} GiB)" for device, card in zip(devices, cards, strict=True))
    return (f"the cards are not alike: {told}. Every card gets as many tokens, so the smallest one sets the pace. Name "
            "the cards that are alike in devices")


def require_copies(model) -> None:
    """Raise ValueError where the host or the model's loader makes no copies of it for other cards, or core's split
    has made some already."""
    if not hasattr(model, "deepclone_multigpu"):
        raise ValueError("this ComfyUI cannot load a model on a second card: update it to one that has the node "
                         "MultiGPU CFG Split, or remove this node")
    if model.get_additional_models_with_key("multigpu"):
        raise ValueError("this model is split by MultiGPU CFG Split already, and both want the cards: remove one of "
                         "the two nodes")
    if getattr(model, "cached_patcher_init", None) is None:
        raise ValueError("the loader of this model cannot load it a second time for another card: use Load Diffusion "
                         "Model, Load Checkpoint or Load Sparse Diffusion Model")


def with_copies(model, devices: list[torch.device]):
    """A clone of `model` (ModelPatcher) that carries a copy of its weights for every device but the first."""
    clone = model.clone()
    clone.set_additional_models(KEY, [])
    copies = []
    for device in devices[1:]:
        copies.append(_copy(clone, device, [model.model, *(copy.model for copy in copies)]))
    clone.set_additional_models(KEY, copies)
    return clone


def _copy(model, device: torch.device, taken: list):
    """A copy on the device: one that is loaded there already, and not among `taken`, or a new one."""
    for loaded in comfy.model_management.loaded_models():
        if (loaded is not None and loaded.load_device == device and loaded.model not in taken
                and getattr(loaded.model, _COPY, None) == model.clone_base_uuid):
            return loaded.clone()
    copy = model.deepclone_multigpu(new_load_device=device)
    setattr(copy.model, _COPY, model.clone_base_uuid)
    copy.remove_additional_models(KEY)
    return copy


def matched_copies(model) -> list:
    """The copies as `model` is now: with the patches, options and extra layers that came after the split.

    Core matches the copies of its own split; under its key, on a clone, it does so for these.
    """
    clone = model.clone()
    clone.set_additional_models("multigpu", clone.get_additional_models_with_key(KEY))
    clone.remove_additional_models(KEY)
    clone.match_multigpu_clones()
    return clone.get_additional_models_with_key("multigpu")
