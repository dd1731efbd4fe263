"""A run in words: the text under the node, the log line, and the report. The sentence on top is `verdict`'s."""
from __future__ import annotations

import logging

from ...kernels import AUTO, EXACT, backend_list
from .run import DENSE, SPARSE, Run
from .verdict import bullets, dense_steps, verdict

log = logging.getLogger(__name__)


def node_text(run: Run) -> str:
    """What stands under the node: the verdict, what the user has to see, how close it came to exact attention, the
    kernel, and the dense steps."""
    close = run.closeness.sentence()
    close = "" if any(text.startswith(close) for text in run.warnings) else close
    lines = [*run.warnings, close, run.rounding.sentence(), *_choice_lines(run), run.chosen, dense_steps(run)]
    return "\n".join([verdict(run), *bullets(lines)])


def status_text(run: Run, verbose: bool = False) -> str:
    """`node_text`, then what ran, on which grid, how long a call took, and why the rest ran dense."""
    lines = []
    for entry in run.summary():
        if entry["grid"]:
            lines += [_kept_line(entry), _grid_line(entry)]
    lines += [run.closeness.worst(), *_time_lines(run)]
    lines.append(f"attention calls: {run.sparse_calls} sparse, {run.dense.total()} dense" + _reasons(run.dense))
    if run.other:
        lines.append(f"other attention calls, left alone: {_listed(run.other)}")
    if run.taken:
        lines.append(f"attention calls that a sparse node behind this one computed: {_listed(run.taken)}")
    lines += run.notes
    if verbose:
        lines += _layer_lines(run)
    return "\n".join([node_text(run), *bullets(lines)])


def kernel_text(run: Run, backend: str, precision: str = EXACT) -> str:
    """Every kernel and whether it could run the calls of this run, or why not. Empty when none was asked for.

    backend, precision: what the node's widgets say.
    """
    lines = []
    for call in run.asked:
        card = "" if call.capability is None else " sm_{}{}".format(*call.capability)
        dtype = str(call.dtype).removeprefix("torch.")
        lines.append(f"- kernels for {dtype}, head_dim {call.head_dim} on {call.device_type}{card}, backend {backend}:")
        lines += [f"  - {line}" for line in backend_list(call, backend, run.failed, precision)]
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
    density = "" if entry["density"] is None else f" ({entry['density']:.1%} of all pairs of tokens)"
    kept = entry.get("label") or f"every tile looks at {entry['kept']} of {entry['tiles']} tiles"
    far = ", the others count as one averaged token each" if entry.get("far_field") else ""
    return f"{kept}{density}{far}, kernel {entry['backend']}"


def _grid_line(entry: dict) -> str:
    others = "".join(f" + {entry[side]} {side}" for side in ("prefix", "suffix") if entry[side])
    tile = "" if entry.get("runs") or entry.get("chunks") else f", tile {_x(entry['tile'])}"
    return f"clip of {_x(entry['grid'])} tokens (time x height x width){others}{tile}"


def _time_lines(run: Run) -> list[str]:
    """The usual time of a call. Sums are not told: they are of different numbers of calls."""
    usual = [f"{kind} {ms:.2f} ms" for kind in (SPARSE, DENSE) if (ms := run.median_ms(kind))]
    return [f"usual time of one attention call: {', '.join(usual)}"] if usual else []


def _layer_lines(run: Run) -> list[str]:
    lines = []
    for layer, counts in sorted(run.layers.items(), key=lambda item: (item[0] is None, item[0])):
        ms = {kind: run.layer_ms[layer, kind] for kind in (SPARSE, DENSE)}
        spent = ", ".join(f"{kind} {value:.1f} ms" for kind, value in ms.items() if value)
        close = run.closeness.of_layer(layer)
        lines.append(f"layer {'?' if layer is None else layer}: attention calls {_listed(counts)}; together {spent}"
                     + (f"; {close}" if close else ""))
    return lines


def _reasons(counts) -> str:
    return f" ({_listed(counts)})" if counts else ""


def _listed(counts) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def _x(thw) -> str:
    return "x".join(map(str, thw))
