"""A saved evaluator answers with the model that it was trained on, or refuses in one line."""

import json
import shutil

import deltas
import predict
import pytest
import transformers
from conftest import GLUE, TINY_BERT

from bitfit.artifacts import saved_evaluator
from bitfit.model.fingerprints import describe_change
from bitfit.tools import saved_evaluators
from bitfit.training import store
from glue_evaluator import GLUEvaluator
from utils import UserError

CONFIG, TOKENIZER, SETTINGS = "config.json", "tokenizer.json", "tokenizer_config.json"
VOCABULARY = json.loads((TINY_BERT / TOKENIZER).read_text())["model"]["vocab"]
ONE, OTHER = list(VOCABULARY)[-2:]
CHANGES = [  # file, keys on the way to a value, the value, what the message says
    (CONFIG, ["layer_norm_eps"], 1e-3, "config changed (layer_norm_eps was 1e-12 and is now 0.001"),
    (CONFIG, ["hidden_act"], "relu", "config changed (hidden_act was gelu and is now relu)"),
    (CONFIG, ["hidden_dropout_prob"], 0.3, "(hidden_dropout_prob was 0.1 and is now 0.3)"),
    (CONFIG, ["num_attention_heads"], 2, "(num_attention_heads was 4 and is now 2)"),
    (CONFIG, ["num_hidden_layers"], 2, "(num_hidden_layers was 3 and is now 2)"),
    (CONFIG, ["position_embedding_type"], "relative_key", "(position_embedding_type was None and"),
    (SETTINGS, ["do_lower_case"], False, "tokenizer changed (normalizer)"),
    (SETTINGS, ["strip_accents"], False, "tokenizer changed (normalizer)"),
    (TOKENIZER, ["model", "vocab"],
     VOCABULARY | {ONE: VOCABULARY[OTHER], OTHER: VOCABULARY[ONE]}, "changed (vocabulary)"),
    (TOKENIZER, ["added_tokens", 4, "normalized"], True, "tokenizer changed (added_tokens)"),
    (SETTINGS, ["pad_token"], "[MASK]", "tokenizer changed (special_tokens)"),
    (SETTINGS, ["padding_side"], "left", "tokenizer changed (padding_side)"),
    (SETTINGS, ["truncation_side"], "left", "tokenizer changed (truncation_side)"),
    (SETTINGS, ["model_input_names"], ["input_ids", "attention_mask"], "(model_input_names)"),
]  # fmt: skip
NAMES = [
    ("_name_or_path", "elsewhere"), ("transformers_version", "5.17.0"), ("architectures", ["A"]),
    ("id2label", {"0": "no", "1": "yes"}), ("dtype", "bfloat16"), ("use_cache", False),
]  # fmt: skip


def edit(path, keys, value):
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


def train(model, folder, encoder_trainable=False):
    evaluator = GLUEvaluator("rte", str(model), None, seed=0, data_dir=GLUE)
    evaluator.preprocess_dataset("longest", 64, 8, train_size=8)
    terms = None if encoder_trainable else ["bias"]
    evaluator.training_preparation(1e-3, "adamw", encoder_trainable, terms, verbose=False)
    evaluator.train_and_evaluate(1)
    evaluator.save(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(TINY_BERT, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An evaluator that trained everything and has its own model."""
    return train(TINY_BERT, tmp_path_factory.mktemp("whole"), encoder_trainable=True)


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(TINY_BERT, tmp_path / "base")


@pytest.mark.parametrize(("file", "keys", "value", "message"), CHANGES)
def test_another_config_or_tokenizer_is_refused(trained, base, file, keys, value, message, capsys):
    edit(base / file, keys, value)
    with pytest.raises(UserError) as error:
        GLUEvaluator.load(trained, None, str(base))
    assert message in str(error.value) and "\n" not in str(error.value)
    (base / "texts").write_text("a\tb\n")
    assert predict.main([str(trained), "-m", str(base), "-i", str(base / "texts")]) == 2
    assert deltas.main(["show", str(trained), "-m", str(base)]) == 2
    text, asked = capsys.readouterr()
    assert text == "" and asked.count(message) == asked.count("error: ") == 2


@pytest.mark.parametrize(("key", "value"), NAMES)
def test_names_may_change(trained, base, key, value):
    edit(base / CONFIG, [key], value)
    GLUEvaluator.load(trained, None, str(base))


def test_members_of_bases_that_differ_in_config_alone(trained, base, tmp_path):
    edit(base / CONFIG, ["layer_norm_eps"], 1e-3)
    other = train(base, tmp_path / "other")
    with pytest.raises(UserError, match="base models, whose config changed"):
        saved_evaluators.read_evaluators([trained, other])


def test_another_version_of_transformers_may_know_other_keys(trained):
    metadata, _ = saved_evaluator.read_files(trained)
    other = {**metadata["model_config"], "transformers_version": "9.9", "new_in_that_version": 1}
    del other["chunk_size_feed_forward"]
    assert describe_change(metadata, metadata | {"model_config": other}) is None
    other["layer_norm_eps"] = 1.0
    change = describe_change(metadata, metadata | {"model_config": other})
    assert change and "layer_norm_eps" in change


@pytest.mark.parametrize("file", [CONFIG, TOKENIZER, SETTINGS])
def test_every_bit_of_a_whole_model_counts(whole, tmp_path, file):
    shutil.copytree(whole, tmp_path / "e")
    path = tmp_path / "e/model" / file
    content = path.read_bytes()
    for number in range(0, 8 * len(content), 8 * len(content) // 63 + 1):
        flipped = bytearray(content)
        flipped[number // 8] ^= 1 << number % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=f"{file} is not as it was written: train and save"):
            GLUEvaluator.load(tmp_path / "e", None)
    path.unlink()
    with pytest.raises(UserError, match=f"{file} is not as it was written"):
        GLUEvaluator.load(tmp_path / "e", None)


def test_a_file_added_to_a_whole_model(whole, tmp_path):
    model = shutil.copytree(whole, tmp_path / "e") / "model"
    (model / "README.md").write_text("mine")
    GLUEvaluator.load(tmp_path / "e", None)
    (model / "added_tokens.json").write_text('{"the": 300}')
    with pytest.raises(UserError, match=r"added_tokens\.json is not as it was written"):
        GLUEvaluator.load(tmp_path / "e", None)


def as_before(folder, copy):
    """A copy as earlier versions of this program wrote it: the same format, fewer facts."""
    shutil.copytree(folder, copy)
    metadata, tensors = store.read_entry(copy / saved_evaluator.EVALUATOR)
    for name in ("model_config", "tokenizer", "model_files"):
        metadata.pop(name, None)
    store.write_entry(copy / saved_evaluator.EVALUATOR, metadata, tensors, "delta.safetensors")
    return copy


@pytest.mark.parametrize("kind", ["trained", "whole"])
def test_what_an_earlier_version_saved_is_loaded_with_a_line(request, tmp_path, kind, caplog):
    folder = as_before(request.getfixturevalue(kind), tmp_path / "old")
    GLUEvaluator.load(folder, None)
    (record,) = caplog.records
    message = "was saved by an earlier version of this program: the config and the tokenizer"
    assert record.getMessage().startswith(f"{folder} {message}")


def test_a_folder_that_transformers_wrote_again_is_the_same(trained, tmp_path):
    """Config and tokenizer as transformers writes them again."""
    for kind in (transformers.AutoTokenizer, transformers.AutoModel):
        kind.from_pretrained(TINY_BERT).save_pretrained(tmp_path / "again")
    GLUEvaluator.load(trained, None, str(tmp_path / "again"))


def test_a_message_names_three_of_many_changes():
    """A model of another size differs in many values, and the error is one line."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    old, new = ({"model_config": dict.fromkeys(names, value)} for value in (1, 7))
    shown = ", ".join(f"{name} was 1 and is now 7" for name in names[:3])
    assert describe_change(old, new) == f"config changed ({shown}, 1 more)"
