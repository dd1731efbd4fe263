"""One graph while it is drawn: nodes, links, groups and notes. Knows a node's definition, nothing of video.

    page = Page(definition)
    vae = page.add("VAELoader", vae_name="wan_2.1_vae.safetensors")
    decode = page.add("VAEDecode", vae=vae[0], samples=sampler[0])      # node[n]: its n-th output
    page.group("Step 1 - Load models", (0, 0), [vae])
"""
from dataclasses import dataclass, field

SLOT, WIDGET, TITLE, HEAD, PAD, GAP = 20, 24, 30, 44, 20, 20
"""Heights of a socket, a widget, a node's title and a group's title; space around and between nodes."""
BLUE, GREEN, GREY = "#3f789e", "#8A8", "#444"
POSITIVE, NEGATIVE, NOTE = ("#232", "#353"), ("#322", "#533"), ("#432", "#000")
WIDTH = 340


@dataclass
class Node:
    id: int
    kind: str
    inputs: dict
    size: list
    title: str | None = None
    colors: tuple | None = None
    pos: list = field(default_factory=lambda: [0, 0])

    def __getitem__(self, slot):
        return Output(self, slot)

    @property
    def bottom(self):
        return self.pos[1] + self.size[1]


@dataclass(frozen=True)
class Output:
    node: Node
    slot: int


@dataclass(frozen=True)
class Box:
    """A group's rectangle."""

    title: str
    color: str
    left: int
    top: int
    right: int
    bottom: int


def least_height(sockets, outputs, widgets):
    """The height that ComfyUI's canvas gives a node at least, its title apart."""
    return SLOT * max(sockets, outputs, 1) + 6 + (WIDGET * widgets + 8 if widgets else 0)


class Page:
    """definition: node type -> ([(input, spec), ...], [(output, type), ...]); is_widget: spec -> bool."""

    def __init__(self, definition, is_widget):
        self.definition, self.is_widget = definition, is_widget
        self.nodes: list[Node] = []
        self.boxes: list[Box] = []

    def add(self, kind, title=None, size=(WIDTH, 0), colors=None, **inputs):
        """A node. Of `size` the height is what the node needs at least, where it is less."""
        declared, outputs = self.definition(kind)
        unknown = set(inputs) - {name for name, _ in declared}
        if unknown:
            raise ValueError(f"{kind} has no input {', '.join(sorted(unknown))}")
        shown = [self.is_widget(spec) for _, spec in declared]
        controls = sum(bool(len(spec) > 1 and spec[1].get(more)) for _, spec in declared
                       for more in ("control_after_generate", "image_upload"))
        least = least_height(shown.count(False), len(outputs), shown.count(True) + controls)
        node = Node(len(self.nodes) + 1, kind, inputs, [size[0], max(least, size[1])], title, colors)
        self.nodes.append(node)
        return node

    def note(self, title, text, size):
        node = Node(len(self.nodes) + 1, "MarkdownNote", {"text": text}, list(size), title, NOTE)
        self.nodes.append(node)
        return node

    def group(self, title, at, *columns, color=BLUE):
        """A group at (x, y) around columns of nodes. A number in a column is a space above the next node."""
        x, bottom = at[0] + PAD, 0
        for column in columns:
            y = at[1] + HEAD
            nodes = [node for node in column if isinstance(node, Node)]
            width = max(node.size[0] for node in nodes)
            for entry in column:
                if isinstance(entry, Node):
                    entry.pos, entry.size = [x, y + TITLE], [width, entry.size[1]]
                    y += TITLE + entry.size[1] + GAP
                else:
                    y += entry
            x, bottom = x + width + GAP * 2, max(bottom, y)
        box = Box(title, color, at[0], at[1], x - GAP * 2 + PAD, bottom - GAP + PAD)
        self.boxes.append(box)
        return box
