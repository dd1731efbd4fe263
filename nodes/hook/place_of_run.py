"""Which prompt and node of the host a sampling belongs to."""
from __future__ import annotations

from typing import Any


def executing() -> tuple[str | None, str | None]:
    """(prompt id, node id) of what the host executes on this thread; None outside of a prompt."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return None, None
    context = get_executing_context()
    return (None, None) if context is None else (context.prompt_id, context.node_id)


def nodes_behind(prompt: dict[str, Any] | None, node_id: str | None, name: str) -> set[str]:
    """The ids of all nodes whose output reaches the input `name` of a node, in a prompt in API format."""
    found: set[str] = set()
    waiting = [((prompt or {}).get(node_id) or {}).get("inputs", {}).get(name)]
    while waiting:
        link = waiting.pop()
        if isinstance(link, list) and len(link) == 2 and str(link[0]) not in found:
            found.add(str(link[0]))
            waiting += ((prompt or {}).get(str(link[0])) or {}).get("inputs", {}).values()
    return found
