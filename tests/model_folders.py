"""Copies of the tiny BERT, and changes to their files."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import TINY_BERT
from safetensors.torch import load_file, save_file

from bitfit.data.tasks import TASKS

RTE, MNLI, STSB = (TASKS[name] for name in ("rte", "mnli", "stsb"))

WORDS = "bert.embeddings.word_embeddings.weight"

LAYER = "bert.encoder.layer.0.attention.self.value.weight"

OLDER_DEBERTA = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # transformers 5.17's


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny BERT."""
    return shutil.copytree(TINY_BERT, tmp_path / "model")


def set_json(folder, name="config.json", **values):
    """Set keys of a JSON file; None removes one."""
    path = folder / name
    new = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in new.items() if value is not None}))


def change(folder, function):
    """Replace the tensors of a checkpoint by what `function` makes of {name: tensor}."""
    tensors = function(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_nan(tensors, value=float("nan")):
    tensors[LAYER][3, 4] = value
    return tensors


def renamed(prefix, old=""):
    return lambda tensors: {prefix + n.removeprefix(old): t for n, t in tensors.items()}


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def configured(**values):
    return lambda folder: set_json(folder, **values)


def changed(function):
    return lambda folder: change(folder, function)


def only_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def shards(folder):
    """Two shards, the second of which is missing."""
    tensors = load_file(folder / "model.safetensors")
    index = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(tensors)}
    first = {n: t for n, t in tensors.items() if index[n].startswith("model-00001")}
    save_file(first, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    write("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": index}))(folder)


def adapter(folder):
    """An adapter of peft: beside the base model."""
    write("adapter_config.json", json.dumps({"peft_type": "LORA"}))(folder)
    save_file({"base_model.model.x": torch.zeros(1)}, folder / "adapter_model.safetensors")


def adapter_alone(folder):
    adapter(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()


def model_with_head(folder, kind, num_labels, **config):
    """Save a fine-tuned classifier of another architecture beside the tiny BERT's tokenizer."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = transformers.AutoConfig.for_model(
        kind, vocab_size=345, pad_token_id=0, num_labels=num_labels, **sizes, **config
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(made)
    model.save_pretrained(folder)
    return model
