"""What the tests share: no network, the toy examples, and tiny models made on the spot."""

import os
import shutil
import time

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers share the cores, torch's threads would fight

import json
from pathlib import Path

import pictures
import pytest
import safetensors.torch
import torch
import transformers

from bitfit.model import forward, loading
from bitfit.model.packed_encoder import packed_encoders

pytest_plugins = [  # modules with fixtures
    "documentation", "model_folders", "modern_encoders", "own_tasks", "quick_python", "resumable",
    "small_training", "toy_study", "tracked",
]  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent
GLUE = ROOT / "examples" / "glue"
TINY_BERT = ROOT / "examples" / "tiny_bert"

transformers.logging.disable_progress_bar()
pictures.use_placeholders()


@pytest.fixture(scope="session")
def no_dropout(tmp_path_factory):
    """A copy of the tiny BERT without dropout."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(TINY_BERT, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """One thread of torch for all tests of a module, which compare numbers bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def drawing(request):
    """Draw pictures in tests with the mark `pictures`; others write placeholders."""
    if not request.node.get_closest_marker("pictures"):
        yield
        return
    with pictures.real_pictures():
        yield


def pytest_collection_modifyitems(items):
    """Let long tests begin first, so that no process waits for one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def set_dropout(model, p):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p


def load_model(folder, task, seed=0, random_encoder=False):
    """A model with its head drawn, as a run of that seed starts."""
    model, initialized = loading.load_model(folder, task, random_encoder)
    loading.init_head(model, seed, initialized)
    return model


def forward_of(model, packed=True):
    """The model's `Forward` on packed rows, or on padded ones."""
    if not packed:
        return forward.Forward(model)
    return forward.Forward(model, packed_encoders(model)[0])


def forbid_loading(monkeypatch):
    """From now on the test fails where a tokenizer is loaded: nothing that takes time may begin."""

    def fail(*args, **options):
        raise AssertionError("a tokenizer is loaded")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)


def wait_for(condition):
    """What `condition()` gives, once it is true."""
    end = time.monotonic() + 120
    while not (result := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return result


@pytest.fixture
def tiny_bert():
    return str(TINY_BERT)


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory):
    """A RoBERTa folder with random weights and a byte-level tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("roberta")
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = ByteLevelBPETokenizer()
    lines = (GLUE / "RTE" / "train.tsv").read_text(encoding="utf-8").splitlines()
    bpe.train_from_iterator(lines, vocab_size=400, special_tokens=specials, show_progress=False)
    bpe.save_model(str(folder))
    tokenizer = transformers.RobertaTokenizerFast.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=130, type_vocab_size=1, pad_token_id=1,
        bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def few_glue(tmp_path_factory):
    """The toy data with 128 examples for training and 32 for validation; all test examples."""
    folder = tmp_path_factory.mktemp("few") / "glue"
    for path in GLUE.glob("*/*.tsv"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        few = folder / path.relative_to(GLUE)
        few.parent.mkdir(parents=True, exist_ok=True)
        most = {"train": 129, "dev": 33}.get(few.stem.split("_")[0], len(lines))
        few.write_text("".join(lines[:most]), encoding="utf-8")
    return folder


COMMITS = {"main": "b" * 40, "v1": "a" * 40}  # of the model org/tiny in `hub`


@pytest.fixture(scope="session")
def hub_home(tmp_path_factory):
    """What HF_HOME may be: a cache as the Hub's client leaves it, with two states of org/tiny.

    v1 is the tiny BERT; main differs in config, tokenizer and word embeddings.
    """
    home = tmp_path_factory.mktemp("hf_home")
    repo = home / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    for name, commit in COMMITS.items():
        (repo / "refs" / name).write_text(commit)
        shutil.copytree(TINY_BERT, repo / "snapshots" / commit)
    main = repo / "snapshots" / COMMITS["main"]
    for name, old, new in (
        ("config.json", '"initializer_range": 0.02', '"initializer_range": 0.03'),
        ("tokenizer_config.json", '"model_max_length": 128', '"model_max_length": 64'),
    ):
        text = (main / name).read_text()
        assert old in text
        (main / name).write_text(text.replace(old, new))
    weights = main / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["bert.embeddings.word_embeddings.weight"] += 0.1
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    return home


@pytest.fixture
def hub(hub_home, monkeypatch):
    """That home in use in this process."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_home / "hub"))
    return hub_home / "hub"


def on_meta(model_class, config):
    """A model without weights, for names and counts."""
    with torch.device("meta"):
        return model_class(config)


@pytest.fixture(scope="session")
def bert_base():
    return on_meta(
        transformers.BertForSequenceClassification, transformers.BertConfig(vocab_size=28996)
    )


@pytest.fixture(scope="session")
def roberta_base():
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1
    )
    return on_meta(transformers.RobertaForSequenceClassification, config)
