"""Files are written whole or not at all, where they can be written."""

import os

import pytest

from bilens.errors import ArgumentError
from bilens.files import destination, write_atomically


def test_folders_are_made(tmp_path):
    path = tmp_path / "figures" / "new" / "page.html"
    write_atomically(path, lambda beside: beside.write_text("text"))
    assert path.read_text() == "text"
    assert os.listdir(path.parent) == ["page.html"]


def test_what_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("before")

    def fail(beside):
        beside.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["page.html"]


def test_places_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="is a folder"):
        destination(tmp_path)
    with pytest.raises(ArgumentError, match="no folder to be had"):
        destination(tmp_path / "file" / "page.html")
    # root may write anywhere, so permissions alone would not show it
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ArgumentError, match="read-only"):
        destination(tmp_path / "page.html")
