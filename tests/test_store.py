"""Facts and tensors: as they were written, or one clear error."""

import random
import stat
from pathlib import Path

import pytest
import torch
from moments import raises

from bitfit.training import store
from utils import CorruptFile

FACTS = {"name": "é\u2028", "numbers": [1, 0.1, 1e-300, None], "inner": {"a": True}}


@pytest.fixture
def entry(tmp_path):
    tensors = {"a": torch.randn(30, 4), "b": torch.arange(7)}
    store.write_entry(tmp_path / "entry.json", FACTS, tensors)
    return tmp_path / "entry.json", tensors


def test_what_is_read_is_what_was_written(entry):
    path, tensors = entry
    metadata, found = store.read_entry(path)
    assert metadata == {"format": store.FORMAT} | FACTS
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_tensors_may_have_a_name_of_their_own_or_be_none(tmp_path):
    store.write_entry(tmp_path / "facts.json", FACTS, {"a": torch.ones(2)}, "delta.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta.safetensors", "facts.json"]
    assert torch.equal(store.read_entry(tmp_path / "facts.json")[1]["a"], torch.ones(2))
    store.write_entry(tmp_path / "alone.json", FACTS, {})
    assert store.read_entry(tmp_path / "alone.json") == ({"format": store.FORMAT} | FACTS, {})


def damages(data):
    """A file cut at every kind of place, and with a flipped bit here and there."""
    rng = random.Random(0)
    cuts = [0, 1, 7, 8, 9, 50, len(data) // 2, len(data) - 1]
    yield from (data[:cut] for cut in cuts)
    yield data + b"\n"
    yield bytes(len(data))
    for place in [*range(20), len(data) - 1, *(rng.randrange(len(data)) for _ in range(150))]:
        yield data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_nothing_damaged_is_accepted(entry, suffix):
    path, _ = entry
    file = path.with_suffix(suffix)
    for damaged in damages(file.read_bytes()):
        file.write_bytes(damaged)
        with pytest.raises(CorruptFile, match=r"entry\.json is damaged: "):
            store.read_entry(path)
    file.unlink()
    with pytest.raises(CorruptFile):
        store.read_entry(path)


def test_another_format_says_so(entry):
    path, _ = entry
    path.write_text(path.read_text().replace(f'"format": {store.FORMAT}', '"format": 1'))
    with pytest.raises(
        CorruptFile, match=rf"another version of this program \(format 1, not {store.FORMAT}\)"
    ):
        store.read_entry(path)


def test_what_was_there_stays_when_there_is_no_room(entry, monkeypatch):
    """The disk is full while the facts are written over others: both files are the old ones."""
    path, tensors = entry
    monkeypatch.setattr(Path, "write_text", raises(OSError("no space")))
    with pytest.raises(OSError):
        store.write_entry(path, {"name": "new"}, {"a": torch.zeros(3)})
    assert store.read_entry(path)[0]["name"] == FACTS["name"]
    assert torch.equal(store.read_entry(path)[1]["a"], tensors["a"])
    assert not list(path.parent.glob(".*"))


def test_a_group_may_read_what_the_umask_lets_it(entry):
    """safetensors makes its files 0600: others could not read a colleague's results."""
    path, _ = entry
    plain = path.with_name("plain")
    plain.touch()
    for file in (path, path.with_suffix(".safetensors")):
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
