"""Model folders of encoders without biases, with random weights and BERT's toy tokenizer."""

import pytest
import torch
import transformers
from conftest import TINY_BERT

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 160, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "modernbert": {"local_attention": 16, "cls_token_id": 2, "sep_token_id": 3},
    "eurobert": {"mask_token_id": 4},
}


def small_config(kind, **more):
    config = SIZES | CONFIGS.get(kind, {}) | {"vocab_size": 345} | more
    return transformers.AutoConfig.for_model(kind, **config)


def classifier(kind, **more):
    torch.manual_seed(0)
    config = small_config(kind, **more)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


@pytest.fixture(scope="session")
def modern(tmp_path_factory):
    """{model type: folder}."""
    folders = {kind: tmp_path_factory.mktemp("modern") / kind for kind in CONFIGS}
    for kind, folder in folders.items():
        torch.manual_seed(0)
        transformers.AutoModel.from_config(small_config(kind)).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(TINY_BERT).save_pretrained(folder)
    return folders
