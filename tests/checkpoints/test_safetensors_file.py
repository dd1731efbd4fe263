"""Headers of good files, and a sentence for every bad one."""
import json
import os

import pytest
import safetensors.torch
import torch

from pack.checkpoints.safetensors_file import CheckpointError, read_header


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path,
                                metadata={"k": "v"})
    return path


def test_a_header_names_every_tensor_with_its_place(file):
    header = read_header(file)
    assert header.metadata == {"k": "v"} and set(header.tensors) == {"a", "b"}
    info = header.tensors["a"]
    assert (info.dtype, info.shape, info.numel) == ("F32", (2, 3), 6)
    content = bytearray(file.read_bytes()[info.start:info.end])
    assert torch.frombuffer(content, dtype=torch.float32).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("bytes_kept", [0, 4, 8, 40, -1])
def test_a_file_cut_anywhere_is_refused(file, bytes_kept):
    content = file.read_bytes()
    file.write_bytes(content[:bytes_kept])
    with pytest.raises(CheckpointError, match="cut short|no safetensors file"):
        read_header(file)


def test_a_truncated_file_says_how_much_is_missing(file):
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=rf"cut short: {size - 3} bytes, its header names {size}. Download it"):
        read_header(file)


@pytest.mark.parametrize(("start", "name"), [
    (b"GGUF\x03\x00\x00\x00" + b"\0" * 64, "a GGUF file"), (b"PK\x03\x04" + b"\0" * 64, r"a PyTorch file"),
    (b"<!DOCTYPE html><html>", "a web page"), (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    (b"\xff" * 64, "something else"), (b"", "an empty file")])
def test_another_format_is_named(tmp_path, start, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(start)
    with pytest.raises(CheckpointError, match=f"no safetensors file: found {name}"):
        read_header(path)


@pytest.mark.parametrize("header", [b"not json, not at all", b"[]", b'{"a": {"dtype": "F32"}}',
                                    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
                                    b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
                                    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
                                    b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
                                    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4.5, 8]}}',
                                    b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}}',
                                    b'{"a": 1}', b'{"a": null}', b"[" * 100_000, b"\xff\xfe{}"])
def test_a_header_that_is_none_is_refused(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="its header cannot be read"):
        read_header(path)


def with_header(path, header):
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 4)
    return path


@pytest.mark.parametrize(("metadata", "found"), [("text", "str"), (["k", "v"], "list"), ([], "list"), (7, "int"),
                                                 (False, "bool"), ("", "str")])
def test_metadata_that_are_no_object_are_refused_with_what_they_are(tmp_path, metadata, found):
    header = {"__metadata__": metadata, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    with pytest.raises(CheckpointError, match=f"its __metadata__ is a JSON {found}, wanted an object of texts"):
        read_header(with_header(tmp_path / "model.safetensors", header))


def test_metadata_that_hold_more_than_texts_are_kept_as_json(tmp_path):
    header = {"__metadata__": {"config": {"transformer": {"dim": 8}}, "epoch": 3, "note": "text", "none": None}}
    assert read_header(with_header(tmp_path / "model.safetensors", header)).metadata == {
        "config": '{"transformer": {"dim": 8}}', "epoch": "3", "note": "text", "none": "null"}
    assert read_header(with_header(tmp_path / "model.safetensors", {"__metadata__": None})).metadata == {}


def test_a_tensor_whose_size_contradicts_its_shape_is_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"damaged: a is said to hold \[4\] F32 in 8 bytes"):
        read_header(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


def test_no_permission_is_said(file, monkeypatch):
    file.chmod(0)
    if os.geteuid() == 0:      # root reads everything: the refusal has to be played

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")
        monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CheckpointError, match="cannot be read: no permission"):
        read_header(file)
