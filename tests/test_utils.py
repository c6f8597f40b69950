import numpy as np
import pytest
import torch

import utils


def test_each_purpose_has_its_own_stream():
    draws = {
        tuple(utils.generator(seed, purpose).integers(1000, size=4))
        for seed in (0, 1, 2**63 - 1)
        for purpose in ("mask", "data order of epoch 0", "data order of epoch 1")
    }
    assert len(draws) == 9
    again = utils.generator(1, "mask").integers(1000, size=4)
    assert np.array_equal(again, utils.generator(1, "mask").integers(1000, size=4))


def test_set_seed_reaches_torch_and_numpy():
    utils.set_seed(3)
    first = torch.rand(2), np.random.rand(2)
    utils.set_seed(3)
    assert torch.equal(first[0], torch.rand(2))
    assert np.array_equal(first[1], np.random.rand(2))
    assert torch.initial_seed() == 3


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "metrics.json"
    utils.write_text(path, "old")
    with pytest.raises(OSError), utils.whole_file(path) as temporary:
        temporary.write_text("half of the ne")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_such_gpu():
    assert utils.choose_device(None) == torch.device("cpu")
    with pytest.raises(utils.UserError, match="there is no GPU 99"):
        utils.choose_device(99)


def test_an_unreachable_hub_is_asked_once(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    utils.use_local_copies_when_offline()
    assert utils.os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_hub_that_is_not_needed_is_not_asked(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(utils.socket, "create_connection", None)  # a call would fail
    utils.use_local_copies_when_offline(needs_hub=False)
    assert utils.os.environ["HF_HUB_OFFLINE"] == "1"
