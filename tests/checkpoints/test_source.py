"""Files, shards and folders as one set of tensors."""
import json

import pytest

from make_checkpoints import KINDS, diffusers_state, half_converted, write_shards
from make_tiny import save
from pack.checkpoints.names import native_wan_name
from pack.checkpoints.plan import plan_of
from pack.checkpoints.safetensors_file import CheckpointError
from pack.checkpoints.source import open_checkpoint

SHARD = "diffusion_pytorch_model-{:05}-of-00003.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_publishing_gives_the_same_native_names_and_gates(write, state_dict, kind):
    plan = plan_of(open_checkpoint(write(kind)))
    gates = {name for name in state_dict if "to_gate_compress" in name}
    assert set(plan.names.values()) == set(state_dict) - gates
    assert {name for parts in plan.gates.values() for name in parts.values()} == gates
    assert (plan.family, plan.layers, plan.width) == ("Wan", 3, 256)
    for name, target in plan.names.items():
        assert plan.checkpoint.tensors[name].info.shape == tuple(state_dict[target].shape)


def test_the_naming_is_told(write):
    namings = {kind: plan_of(open_checkpoint(write(kind))).naming for kind in KINDS}
    assert namings == {**dict.fromkeys(KINDS, "diffusers"), "native file": "native", "half converted": "mixed"}


def test_half_converted_names_are_half_and_half(state_dict):
    names, plain = set(half_converted(state_dict)), set(diffusers_state(state_dict))
    assert 0 < len(names - plain) < len(names)


def test_native_names_stay_as_they_are(state_dict):
    assert {name: native_wan_name(name) for name in state_dict} == {name: name for name in state_dict}


def test_a_shard_stands_for_its_set(write):
    folder = write("sharded without index")
    one = open_checkpoint(folder / SHARD.format(2))
    assert len(one.files) == 3 and one.tensors.keys() == open_checkpoint(folder).tensors.keys()


@pytest.mark.parametrize("kind", ["sharded with index", "sharded without index"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_missing_shard_is_named(write, kind, number):
    folder = write(kind)
    (folder / SHARD.format(number)).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {SHARD.format(number)}: found 2 of 3 files"):
        open_checkpoint(folder)


def test_a_shard_without_the_tensors_that_the_index_names_is_refused(write, state_dict):
    folder = write("sharded with index")
    state = diffusers_state(state_dict)
    save({name: state[name] for name in sorted(state)[1::3][1:]}, folder / SHARD.format(2))
    with pytest.raises(CheckpointError, match="lacks 1 tensors that its index names"):
        open_checkpoint(folder)


def test_an_index_that_is_none_is_refused(write):
    folder = write("sharded with index")
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be read as an index of shards"):
        open_checkpoint(folder)


def test_a_tensor_in_two_files_is_refused(write, state_dict):
    folder = write("sharded without index")
    state = diffusers_state(state_dict)
    save(state, folder / SHARD.format(3))
    with pytest.raises(CheckpointError, match="wanted every tensor once"):
        open_checkpoint(folder)


def test_one_tensor_under_two_names_is_refused(tmp_path, state_dict):
    state = {**state_dict, "condition_embedder.time_proj.weight": state_dict["time_projection.1.weight"] + 1}
    save(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="two names for one tensor"):
        plan_of(open_checkpoint(tmp_path / "model.safetensors"))


def test_a_folder_of_unrelated_files_lists_them(tmp_path, state_dict):
    for name in ("a", "b"):
        save({name: state_dict["head.modulation"]}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="holds a.safetensors, b.safetensors: wanted diffusion_pytorch_model"):
        open_checkpoint(tmp_path)


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "none")


def test_shards_of_a_native_file_are_one_model_too(tmp_path, state_dict):
    (tmp_path / "config.json").write_text(json.dumps({}))
    write_shards(state_dict, tmp_path, count=4, index=False)
    assert set(plan_of(open_checkpoint(tmp_path)).names) < set(state_dict)


def test_only_headers_are_read(write, monkeypatch):
    path, read = write("native file"), []
    import builtins
    original = builtins.open

    class Counting:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size=-1):
            data = self.file.read(size)
            read.append(len(data))
            return data

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr(builtins, "open", lambda file, *args, **kwargs: Counting(original(file, *args, **kwargs)))
    plan_of(open_checkpoint(path))
    assert 0 < sum(read) < path.stat().st_size / 20
