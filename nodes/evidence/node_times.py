"""How long the nodes of a prompt took, as the host tells it to whoever listens.

Nothing of ours runs in a sampling without a sparse node, so this is how a dense run gets its time.
"""
from __future__ import annotations

import logging
import time
from typing import Any

log = logging.getLogger(__name__)

NAME = "video_sparse_attention.node_times"


def watch() -> None:
    """Listen to the prompt that is about to run. Where the host has nothing to listen to, no times are known."""
    try:
        from comfy_execution.progress import ProgressHandler, add_progress_handler

        class Listener(ProgressHandler):
            def __init__(self):
                super().__init__(NAME)
                self.started: dict[str, float] = {}
                self.took: dict[str, float] = {}
                self.steps: dict[str, float] = {}

            def start_handler(self, node_id, state, prompt_id):
                self.started[node_id] = time.perf_counter()

            def update_handler(self, node_id, value, max_value, state, prompt_id, image=None):
                self.steps[node_id] = max_value

            def finish_handler(self, node_id, state, prompt_id):
                if node_id in self.started:
                    self.took[node_id] = time.perf_counter() - self.started.pop(node_id)

        add_progress_handler(Listener())
    except (ImportError, AttributeError, TypeError):
        log.debug("this ComfyUI does not tell how long its nodes take")


def sampling_seconds(prompt: dict[str, Any] | None, behind: set[str]) -> float | None:
    """Seconds of the sampler, or samplers, among the nodes `behind`; None when none of them ran in this prompt.

    A sampler is what counted most steps, and every node of its class.
    """
    try:
        from comfy_execution.progress import get_progress_state
        listener = get_progress_state().handlers.get(NAME)
    except (ImportError, AttributeError):
        return None
    if listener is None or not prompt:
        return None
    stepping = {node: listener.took[node] for node in behind if node in listener.took and node in listener.steps}
    if not stepping:
        return None
    kind = prompt[max(stepping, key=stepping.get)].get("class_type")
    return sum(took for node, took in stepping.items() if prompt[node].get("class_type") == kind)
