"""Somebody's dense attention that takes its time, in front of a sparse node."""
import time


def slow_dense(milliseconds, name="attention_sage"):
    """An override that takes its time, as somebody's dense attention."""
    def override(func, *args, **kwargs):
        time.sleep(milliseconds / 1e3)
        return func(*args, **kwargs)
    override.__name__ = name
    return override


def under(model, override):
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone
