"""A run in words: the text under the node, the log line, and the report."""
from __future__ import annotations

import logging

from ...kernels import AUTO, backend_list
from .run import DENSE, SPARSE, Run

log = logging.getLogger(__name__)


def status_text(run: Run, verbose: bool = False) -> str:
    """What ran, how fast, on which grid, and why the rest ran dense: short lines, the most wanted first."""
    entries = [entry for entry in run.summary() if entry["grid"]]
    lines = [_kept_line(entry) for entry in entries] or [run.unseen or f"{run.method_name}: nothing ran sparse"]
    lines += _choice_lines(run)
    lines += _time_lines(run)
    lines.append(f"{run.sparse_calls} sparse calls, {run.dense.total()} dense" + _reasons(run.dense))
    lines += [_grid_line(entry) for entry in entries]
    if run.other:
        lines.append(f"not the clip's self-attention, left alone: {_listed(run.other)}")
    lines += run.notes
    if verbose:
        lines += _layer_lines(run)
    return "\n".join(lines)


def kernel_text(run: Run, backend: str) -> str:
    """Every kernel and whether it could run the calls of this run, or why not. Empty when none was asked for.

    backend: what the node's widget says.
    """
    lines = []
    for call in run.asked:
        card = "" if call.capability is None else " sm_{}{}".format(*call.capability)
        dtype = str(call.dtype).removeprefix("torch.")
        lines.append(f"kernels for {dtype}, head_dim {call.head_dim} on {call.device_type}{card}, backend {backend}:")
        lines += [f"  {line}" for line in backend_list(call, backend, run.failed)]
    return "\n".join(lines)


def unseen_text(method: str) -> str:
    """What to tell of a sampling in which the hook was never called."""
    return (f"{method} is OFF: the model made no attention call that this node could see. Another node has put its own "
            "forward pass in place of the model's (some caching and speed-up nodes do), or a compiled model from "
            "another loader runs. Bypass that node, or put this one behind it")


def replaced_text(method: str, net, error: Exception) -> str:
    """What to tell when the model that is sampled is not built like the one that the node was given."""
    return (f"{method} is OFF: another node has put a {type(net).__name__} in the model's place, in which the clip's "
            f"tokens cannot be found ({type(error).__name__}: {error}). Bypass that node, or put this one before it")


def show_under_node(text: str, node_id: str | None) -> None:
    """Show text under a node of the open graph; does nothing where there is no server."""
    if node_id is None:
        return
    try:
        from server import PromptServer
        PromptServer.instance.send_progress_text(text, node_id)
    except (ImportError, AttributeError):
        log.debug("no server to show the text of node %s", node_id)


def _choice_lines(run: Run) -> list[str]:
    """For every kernel that ran: what it has shown on this card, and how it fares against dense attention."""
    lines = []
    for kernel in dict.fromkeys([*(record.kernel for record in run.records.values()), *run.medians]):
        facts = [run.proofs.get(kernel, "")]
        if kernel in run.medians:
            sparse, dense, name = run.medians[kernel]
            facts.append(f"{dense / sparse:.1f}x dense per call ({sparse:.2f} ms, {name} {dense:.2f} ms)")
        if any(facts):
            lines.append(f"{run.backend}: {kernel}, {', '.join(filter(None, facts))}" if run.backend == AUTO
                         else f"{kernel}: {', '.join(filter(None, facts))}")
    return lines


def _kept_line(entry: dict) -> str:
    density = "" if entry["density"] is None else f" ({entry['density']:.1%} of pairs)"
    kept = entry.get("label") or f"{entry['kept']} of {entry['tiles']} tiles"
    return f"{entry['method']}: {kept}{density}, {entry['backend']}"


def _grid_line(entry: dict) -> str:
    others = "".join(f" + {entry[side]} {side}" for side in ("prefix", "suffix") if entry[side])
    return f"grid {_x(entry['grid'])}{others}, tile {_x(entry['tile'])}"


def _time_lines(run: Run) -> list[str]:
    sparse, dense = (run.median_ms(kind) for kind in (SPARSE, DENSE))
    lines = []
    if sparse and dense and len(run.records) == 1:
        lines.append(f"{dense / sparse:.2f}x as fast per call: {sparse:.2f} ms, dense {dense:.2f} ms (medians)")
    spent = [f"{kind} {run.milliseconds(kind):.0f} ms" for kind, ms in ((SPARSE, sparse), (DENSE, dense)) if ms]
    if spent:
        lines.append(f"inside attention: {', '.join(spent)}")
    return lines


def _layer_lines(run: Run) -> list[str]:
    lines = []
    for layer, counts in sorted(run.layers.items(), key=lambda item: (item[0] is None, item[0])):
        ms = {kind: run.layer_ms[layer, kind] for kind in (SPARSE, DENSE)}
        spent = ", ".join(f"{kind} {value:.1f} ms" for kind, value in ms.items() if value)
        lines.append(f"layer {'?' if layer is None else layer}: {_listed(counts)}; {spent}")
    return lines


def _reasons(counts) -> str:
    return f" ({_listed(counts)})" if counts else ""


def _listed(counts) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _x(thw) -> str:
    return "x".join(map(str, thw))
