"""The notes of the example graphs, and their prompts."""
from __future__ import annotations

from .files import HUB, URLS, files_of, tree

PROMPT = ("a red fox trots through fresh snow at sunrise, steam from its breath, low sun behind the trees, "
          "the camera follows beside it")
MOTION = "the camera moves slowly closer, hair and clothes stir in a light wind, natural light"
SOUND = f"{PROMPT}. Snow crunches under its paws, a distant bird calls, wind in the branches."
NEGATIVE = ("bright tones, overexposed, static, blurred details, subtitles, worst quality, low quality, "
            "deformed, still picture")
TUTORIALS = {
    "Wan 2.1": "https://docs.comfy.org/tutorials/video/wan/wan-video",
    "Wan 2.2": "https://docs.comfy.org/tutorials/video/wan/wan2_2",
    "MiniMax H3": "https://docs.comfy.org/tutorials/video/minimax/minimax-h3-native",
}
COMPARE = ("**To compare**, bypass the sparse node (Ctrl+B) and run again with the same seed: the clip is made with "
           "dense attention, and the report names both times.")
VSA = ("**Video Sparse Attention** lets every 3-D tile of the clip look only at the tiles that matter to it.\n\n"
       "- `sparsity` 0.8 leaves out four fifths of them. Higher is faster and further from dense.\n"
       "- `start_percent` 0.2 keeps the noisiest part dense, where the composition forms.\n")
STA = ("**Sliding Tile Attention** lets every 3-D tile of the clip look at a window of tiles around it.\n\n"
       "- `window` 1.0x0.5x0.5 sees all of time, half of the height and half of the width. Smaller is faster and "
       "further from dense.\n"
       "- A strategy gives every step, layer and head a window of its own: see *wan_sta_strategy_search*.\n")
VMOBA = ("**Video Mixture of Block Attention** lets every token of the clip look at its own chunk and at those that it "
         "chooses itself. Layers take turns: chunks of whole frames, columns through time, boxes.\n\n"
         "- `threshold` 0.25 looks at about a fifth of the clip. Higher is slower and closer to dense.\n"
         "- `form` pooled lets 64 tokens choose together: cheaper and coarser.\n"
         "- No model was published that was trained for it; it pays on long and large clips, if at all.\n")
EXPECT = ("**What to expect**: {tokens:,} tokens{each}. After a run the sparse node says *ON*, *OFF* or *SLOWER*, "
          "with the reason, and the report shows where the middle of the clip looks.")


def about(method, tokens, more="", each="", compare=COMPARE):
    """What a graph does and what its user will see."""
    text = {"vsa": VSA, "sta": STA, "vmoba": VMOBA}[method] + (f"\n{more}\n" if more else "")
    return f"{text}\n{EXPECT.format(tokens=tokens, each=each)}\n\n{compare}"


def links(nodes, family=None, more=""):
    """Every file that the nodes load, with its address where it has one, and the folder it belongs into."""
    files = list(dict.fromkeys(entry for node in nodes for entry in files_of(node)))
    text = f"[ComfyUI's tutorial]({TUTORIALS[family]})\n\n" if family in TUTORIALS else ""
    by_folder: dict[str, list] = {}
    for name, folder in files:
        by_folder.setdefault(folder, []).append(f"- [{name}]({URLS[name]})" if name in URLS else f"- {name}")
    text += "\n\n".join(f"**{folder}**\n\n" + "\n".join(lines) for folder, lines in by_folder.items())
    return f"{text}\n\n{more}{chr(10) * 2 if more else ''}```\n{tree(files)}\n```\n"


def hub(name):
    return f"{HUB}/{name}"
