"""Several cards for the tests of the split: all of them are the CPU."""
import torch


def cpu_cards(monkeypatch, count):
    """From now on ComfyUI finds so many cards."""
    import comfy.model_management
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices",
                        lambda exclude_current=False: [torch.device("cpu")] * count)


def split_of(model):
    """The split that a ModelPatcher carries."""
    from comfy.patcher_extension import WrappersMP

    from pack.nodes.split.cards import KEY
    return model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)[0].__self__


def relative_l2(actual, expected):
    return float((actual - expected).double().norm() / expected.double().norm())
