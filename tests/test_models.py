import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import TINY_BERT, load_model
from torch.utils._python_dispatch import TorchDispatchMode

from bitfit.data.tasks import TASKS
from bitfit.data.tokens import TokenizedSplit
from bitfit.model.fingerprints import fingerprint, sha256
from bitfit.model.forward import Forward, check_ids
from bitfit.model.forward_trials import select_forward
from bitfit.model.loading import init_head, load_tokenizer, position_limit
from utils import UserError

RTE = TASKS["rte"]


def copy(tmp_path, leave_out):
    shutil.copytree(TINY_BERT, tmp_path / "m", ignore=shutil.ignore_patterns(*leave_out))
    return str(tmp_path / "m")


def test_the_head_comes_from_the_seed_and_the_encoder_does_not(tiny_bert):
    first, again, other = (load_model(tiny_bert, RTE, seed) for seed in (1, 1, 2))
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert not first.classifier.bias.any()
    assert fingerprint(first) == fingerprint(other)
    assert first.config.id2label == {0: "entailment", 1: "not_entailment"}


class RejectsOtherGenerators(TorchDispatchMode):
    """As CUDA does: a tensor is filled by a generator of its own device alone."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        rng = (kwargs or {}).get("generator")
        assert rng is None or rng.device == args[0].device, function
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_head_is_sampled_on_the_cpu_whatever_the_device(tiny_bert, device):
    model = load_model(tiny_bert, RTE, 1)
    expected = torch.empty(2, 128).normal_(std=0.02, generator=torch.Generator().manual_seed(3))
    with RejectsOtherGenerators():
        init_head(model.to(device), 3)
    if device == "cpu":
        assert torch.equal(model.classifier.weight, expected)


def test_loading_draws_nothing_from_the_global_generator(tiny_bert):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    load_model(tiny_bert, RTE, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_missing_pooler_is_the_same_in_every_run(tmp_path, tiny_bert):
    transformers.BertForMaskedLM.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    first, second = load_model(tmp_path, RTE, 1), load_model(tmp_path, RTE, 2)
    assert torch.equal(first.bert.pooler.dense.weight, second.bert.pooler.dense.weight)


def test_a_trained_head_of_the_right_shape_is_kept(tmp_path, tiny_bert):
    model = load_model(tiny_bert, RTE, 5)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_model(tmp_path, RTE, 0).classifier.weight, model.classifier.weight)
    first, second = (load_model(tmp_path, TASKS["mnli"], seed) for seed in (0, 1))
    assert first.classifier.weight.shape[0] == 3  # another shape: drawn anew, by the seed
    assert not torch.equal(first.classifier.weight, second.classifier.weight)


def test_random_encoder(tiny_bert):
    loaded, drawn = load_model(tiny_bert, RTE, 0), load_model(tiny_bert, RTE, 0, True)
    assert fingerprint(drawn) != fingerprint(loaded)
    assert torch.equal(drawn.classifier.weight, loaded.classifier.weight)
    assert fingerprint(drawn) == fingerprint(load_model(tiny_bert, RTE, 9, True))


@pytest.mark.parametrize(
    ("leave_out", "message"),
    [
        (["tokenizer.json", "vocab.txt"], "has no tokenizer"),
        (["*.safetensors"], "cannot load the model .*no file named model.safetensors"),
        (["config.json"], "cannot load the model"),
    ],
)
def test_an_incomplete_folder(tmp_path, leave_out, message):
    folder = copy(tmp_path, leave_out)
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)
        load_model(folder, RTE, 0)


def test_pickled_weights_are_refused(tmp_path):
    folder = copy(tmp_path, ["*.safetensors"])
    torch.save({}, Path(folder) / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(folder, RTE, 0)


def test_torn_weights(tmp_path):
    folder = copy(tmp_path, [])
    weights = Path(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(folder, RTE, 0)


def test_weights_of_another_architecture(tmp_path, tiny_roberta):
    folder = copy(tmp_path, ["*.safetensors"])
    shutil.copy(Path(tiny_roberta) / "model.safetensors", folder)
    with pytest.raises(UserError, match=r"lacks \d+ encoder weights"):
        load_model(folder, RTE, 0)


def test_names_that_are_nowhere():
    with pytest.raises(UserError, match=r"there is no model folder \./nowhere"):
        load_tokenizer("./nowhere")
    with pytest.raises(UserError, match="--model-name <folder>"):
        load_tokenizer("no-such-model-on-the-hub")


def test_position_limits(tiny_bert, tiny_roberta):
    assert position_limit(load_model(tiny_bert, RTE, 0)) == 128
    roberta = load_model(tiny_roberta, RTE, 0)
    assert position_limit(roberta) == 128  # 130 less the two that padding takes
    ids = torch.full((1, 128), 5)
    roberta(input_ids=ids)
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 129), 5))


def tokens(*lengths):
    """Rows of so many random tokens."""
    counts = np.array(lengths)
    return TokenizedSplit(
        ids=torch.randint(5, 60, (counts.sum(),)), types=None, labels=None,
        starts=counts.cumsum() - counts, lengths=counts, pad_id=1,
    )  # fmt: skip


def test_no_example_is_longer_than_the_positions(tiny_bert):
    model = load_model(tiny_bert, RTE, 0)
    check_ids(model, "tiny", tokens(128, 5))
    message = "has 129 tokens, but the model tiny has 128 positions: give --max-seq-length 128"
    with pytest.raises(UserError, match=message):
        check_ids(model, "tiny", tokens(5, 129))


def random_model(name, **more):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    config = transformers.AutoConfig.for_model(name, vocab_size=60, pad_token_id=1, **sizes, **more)
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert", "modernbert"])
@pytest.mark.parametrize("padded", [False, True])
def test_each_forward_pass_is_transformers_own(name, padded):
    model, rows = random_model(name), tokens(9, 4, 6)
    forward = select_forward(model, name, rows)
    assert (forward.packed_encoder is None) == (name == "modernbert")  # its layers see windows
    forward = Forward(model) if padded else forward
    mask = torch.arange(9) < torch.tensor([[9], [4], [6]])
    ids = torch.full((3, 9), 1).masked_scatter(mask, rows.ids)
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask.long()).logits
        assert torch.allclose(forward.logits(rows, np.arange(3)), plain, atol=1e-6)
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks for m in model.modules())


def test_hashes_know_where_one_value_ends():
    pairs = [
        (["ab", "c"], ["a", "bc"]),
        ([np.zeros((2, 3))], [np.zeros((3, 2))]),
        ([np.zeros(2, np.int64)], [np.zeros(2)]),
        ([np.zeros(2), np.zeros(2)], [np.zeros(4)]),
        ([None], ["-"]),
        ([None], [""]),
        ([torch.zeros(2)], [torch.zeros(1, 2)]),
    ]
    for first, second in pairs:
        assert sha256(first) != sha256(second)
        assert sha256(first) == sha256(first)
