"""Which files of a folder are one model, and what its JSON files say, however they are written."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from make_checkpoints import diffusers_state, write_shards
from make_tiny import save
from pack.checkpoints.folder import DIFFUSERS_NAME, files_of_model, models_in, set_of
from pack.checkpoints.plan import plan_of
from pack.checkpoints.safetensors_file import CheckpointError
from pack.checkpoints.source import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SHARD = "diffusion_pytorch_model-0000{}-of-00003.safetensors"


def second_set(folder, state, stem, index=False):
    """Another sharded set beside what is in the folder, under names that start with `stem`."""
    (folder / "made").mkdir(parents=True)
    write_shards(state, folder / "made", index=index)
    for path in (folder / "made").iterdir():
        path.rename(folder / path.name.replace("diffusion_pytorch_model", stem))
    (folder / "made").rmdir()
    if index:
        path = folder / f"{stem}.safetensors.index.json"
        path.write_text(path.read_text().replace("diffusion_pytorch_model", stem))


def test_extensions_in_capitals_are_weights_too(write, tmp_path):
    plain = open_checkpoint(write("diffusers file")).tensors.keys()
    folder = write("sharded without index")
    for path in list(folder.glob("*.safetensors")):
        path.rename(path.with_name(path.name.upper()))
    found = open_checkpoint(folder)
    assert found.tensors.keys() == plain and [path.suffix for path in found.files] == [".SAFETENSORS"] * 3
    assert open_checkpoint(found.files[1]).files == found.files
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(write("native file"), single / "Model.SafeTensors")
    assert open_checkpoint(single).files == (single / "Model.SafeTensors",)


@pytest.mark.parametrize("name", [DIFFUSERS_NAME.upper(), "Diffusion_Pytorch_Model.sft".replace("sft", "safetensors")])
def test_diffusers_own_name_in_capitals_decides_too(write, tmp_path, state_dict, name):
    folder = write("diffusers file")
    (folder / DIFFUSERS_NAME).rename(folder / name)
    save(state_dict, folder / "another.safetensors")
    assert files_of_model(folder) == [name]


def test_the_set_of_a_shard_keeps_the_form_of_its_name():
    assert set_of("A-0002-OF-0003.SFT") == [f"A-000{n}-OF-0003.SFT" for n in (1, 2, 3)]
    assert set_of("plain.safetensors") == ["plain.safetensors"]


@pytest.mark.parametrize("index", [False, True])
def test_two_sharded_sets_in_one_folder_are_two_models(tmp_path, state_dict, index):
    low = {name: value + 1 for name, value in state_dict.items()}
    second_set(tmp_path, state_dict, "high", index)
    second_set(tmp_path, low, "low", index)
    with pytest.raises(CheckpointError, match="wanted diffusion_pytorch_model.safetensors, one safetensors file"):
        open_checkpoint(tmp_path)
    assert models_in(tmp_path) == (False, ["high-00001-of-00003.safetensors", "low-00001-of-00003.safetensors"])
    for name in models_in(tmp_path)[1]:
        found = open_checkpoint(tmp_path / name)
        assert len(found.files) == 3 and found.tensors.keys() == state_dict.keys()
        assert all(path.name.startswith(name[:3]) for path in found.files)


def test_a_set_of_diffusers_name_is_the_folders_and_a_variant_is_a_file_of_its_own(write, state_dict):
    folder = write("sharded with index")
    second_set(folder, diffusers_state(state_dict), "diffusion_pytorch_model.fp16", index=True)
    assert models_in(folder) == (True, ["diffusion_pytorch_model.fp16-00001-of-00003.safetensors"])
    assert [path.name for path in open_checkpoint(folder).files] == [SHARD.format(n) for n in (1, 2, 3)]
    variant = open_checkpoint(folder / models_in(folder)[1][0])
    assert all(".fp16-" in path.name for path in variant.files) and len(variant.files) == 3


def test_a_single_file_beside_shards_is_a_model_of_its_own(write, state_dict):
    folder = write("sharded with index")
    save(state_dict, folder / "native.safetensors")
    assert models_in(folder) == (True, ["native.safetensors"]) and len(open_checkpoint(folder).files) == 3


def test_an_index_whose_shards_are_gone_does_not_hide_the_merged_file(write, state_dict):
    folder = write("sharded with index")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {SHARD.format(1)}"):
        open_checkpoint(folder)
    save(diffusers_state(state_dict), folder / DIFFUSERS_NAME)
    assert [path.name for path in open_checkpoint(folder).files] == [DIFFUSERS_NAME]


def test_files_stand_for_themselves_where_the_folder_cannot(write):
    folder = write("sharded with index")
    assert models_in(folder) == (True, []) and models_in(folder, as_folder=False) == (False, [SHARD.format(1)])
    (folder / SHARD.format(1)).unlink()
    assert models_in(folder, as_folder=False) == (False, [SHARD.format(2)])
    assert models_in(write("diffusers file"), as_folder=False) == (False, [DIFFUSERS_NAME])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_configs_and_indexes_are_read_in_every_encoding_of_json(write, encoding):
    folder = write("sharded with index")
    for path in (folder / "config.json", folder / "diffusion_pytorch_model.safetensors.index.json"):
        content = {**json.loads(path.read_text()), "note": "größer als früher"}
        path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    found = open_checkpoint(folder)
    assert found.config["note"] == "größer als früher" and not found.remark
    assert json.loads(plan_of(found).metadata["config"])["transformer"]["num_heads"] == 2


def test_a_config_is_read_under_a_locale_that_is_not_utf_8(write):
    folder = write("diffusers file")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_bytes(json.dumps({**config, "note": "größer"}, ensure_ascii=False).encode())
    code = ("import locale, sys\n"
            "from pathlib import Path\n"
            "from checkpoints.source import open_checkpoint\n"
            "assert 'utf' not in locale.getpreferredencoding(False).lower()\n"
            f"assert open_checkpoint(Path({str(folder)!r})).config['num_attention_heads'] == 2\n")
    done = subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 0, done.stderr


def test_a_strategy_file_may_start_with_a_byte_order_mark(tmp_path):
    from pack.vsa_core.strategy import Strategy
    from pack.vsa_core.strategy_files import load_strategy, to_json
    strategy = Strategy.of_windows([[[(1, 1, 1), (2, 2, 2)]]], (2, 2, 2))
    (tmp_path / "x.json").write_text(to_json(strategy), encoding="utf-8-sig")
    assert load_strategy(tmp_path / "x.json") == strategy
