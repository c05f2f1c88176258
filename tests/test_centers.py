"""The center of a run that is over."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import easgd_local as easgd


@pytest.mark.parametrize("name", ["", "center.safetensors"])
def test_the_center_is_read_from_a_folder_or_its_file(tmp_path, name):
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "center.safetensors")
    center = easgd.load_center(tmp_path / name)
    assert torch.equal(center["weight"], torch.ones(2, 3)) and center.folder == tmp_path


@pytest.mark.parametrize("content", [None, b"no safetensors"])
def test_where_there_is_no_center_one_sentence_says_so(tmp_path, content):
    if content:
        (tmp_path / "center.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"center.safetensors: no center can be read there \(.*; give the folder"):
        easgd.load_center(tmp_path)
