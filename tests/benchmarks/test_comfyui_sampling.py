"""The benchmark of whole samplings goes through its steps on a CPU, with a tiny model in a real ComfyUI."""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))


def test_every_method_is_sampled_beside_dense_and_what_the_node_says_stands_below(comfyui, tmp_path):
    import comfyui_sampling
    target = comfyui_sampling.main(["--dry-run", "--steps", "2", "--out", str(tmp_path), "--comfyui", str(comfyui)])
    rows = json.loads(target.read_text())["rows"]
    assert [row["case"] for row in rows] == list(comfyui_sampling.CASES)
    (refused,) = (row for row in rows if "reason" in row)
    assert refused["case"] == "VSA 0.9, triton" and "needs an NVIDIA card" in refused["reason"]
    ran = [row for row in rows if row is not refused]
    assert ran[0]["speedup"] == 1
    assert all(row["steps"] == 2 and row["lowest"] <= row["seconds"] <= row["highest"] for row in ran)
    text = target.with_suffix(".md").read_text()
    assert text.count("as the node tells it") == len(ran) - 1 and "dry run" in text and "`python " in text


def test_what_the_time_does_not_suffice_for_says_so(comfyui, tmp_path):
    import comfyui_sampling
    target = comfyui_sampling.main(["--dry-run", "--seconds", "-1", "--cases", "dense", "VSA 0.9", "--out",
                                    str(tmp_path), "--comfyui", str(comfyui)])
    rows = json.loads(target.read_text())["rows"]
    assert [row["reason"] for row in rows] == ["not measured: no time left"] * 2
