"""Checkpoints as users have them: what is refused, what is used, and the one line that says so."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import GLUE, ROOT, TINY_BERT, load_model
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer

import run_glue
from bitfit.data.splits import TextColumns
from bitfit.data.tasks import TASKS
from bitfit.data.tokens import Split, tokenize
from bitfit.model import loading, tokenizer_checks
from bitfit.study import cost
from glue_evaluator import GLUEvaluator
from utils import UserError

sys.path.insert(0, str(ROOT / "scripts"))
import predict

RTE, MNLI, STSB = (TASKS[name] for name in ("rte", "mnli", "stsb"))
WORDS = "bert.embeddings.word_embeddings.weight"
LAYER = "bert.encoder.layer.0.attention.self.value.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
OLDER_DEBERTA = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # transformers 5.17's
CODE = "import pathlib\npathlib.Path('ran').touch()\n"


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


def folder_named(name):
    def replace(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return replace


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


def add_token(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["@user"])
    tokenizer.save_pretrained(folder)


def add_special_token(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "[\u00c91]"})
    tokenizer.save_pretrained(folder)


def adapter(folder):
    """An adapter of peft: beside the base model."""
    write("adapter_config.json", json.dumps({"peft_type": "LORA"}))(folder)
    save_file({"base_model.model.x": torch.zeros(1)}, folder / "adapter_model.safetensors")


def adapter_alone(folder):
    adapter(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()


WRONG = {
    "nan": (changed(with_nan), f"1 of its tensors hold NaN or infinite values .the first: {LAYER}"),
    "inf": (changed(lambda t: with_nan(t, float("inf"))), "hold NaN or infinite values"),
    "float16-overflow": (
        changed(lambda t: {n: v.half() for n, v in with_nan(t, 1e6).items()}),
        "hold NaN or infinite values",
    ),
    "fewer-layers": (configured(num_hidden_layers=1), r"has 32 weights in its layers .*: 1; the"),
    "fewer-layers-no-prefix": (
        lambda f: (change(f, renamed("", "bert.")), set_json(f, num_hidden_layers=2)),
        "has 16 weights in its layers",
    ),
    "more-layers": (configured(num_hidden_layers=4), "lacks 16 encoder weights"),
    "no-layers": (configured(num_hidden_layers=0), "gives it 0 layers"),
    "unmerged": (
        changed(lambda t: t | {LAYER.replace("weight", "lora_A.weight"): torch.ones(2, 128)}),
        "has 1 weights in its layers for which its config.json has no place",
    ),
    "sizes": (configured(max_position_embeddings=64), r"\(128, 128\), and \(64, 128\) by its conf"),
    "module": (changed(renamed("module.")), "all names in it begin with `module.`"),
    "module-no-prefix": (changed(renamed("module.", "bert.")), "begin with `module.`"),
    "compiled": (changed(renamed("_orig_mod.")), "begin with `_orig_mod.`"),
    "bin": (only_bin, r"convert them in .*model with python -c \"import glob, torch"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "there is no model.safetensors"),
    "truncated": (cut("model.safetensors", 9000), "model.safetensors is cut off or damaged"),
    "empty": (cut("model.safetensors", 0), "model.safetensors is cut off or damaged"),
    "page": (write("model.safetensors", "<!doctype html>"), "is cut off or damaged"),
    "shard": (shards, "model-00002-of-00002.safetensors is missing"),
    "pointer": (write("model.safetensors", POINTER), "model.safetensors is a git-lfs pointer, not"),
    "pointer-config": (write("config.json", POINTER), "config.json is a git-lfs pointer"),
    "pointer-tokenizer": (write("tokenizer.json", POINTER), "tokenizer.json is a git-lfs pointer"),
    "json": (cut("config.json", 100), "config.json is not JSON"),
    "json-tokenizer": (cut("tokenizer_config.json", 50), "tokenizer_config.json is not JSON"),
    "json-vocabulary": (cut("tokenizer.json", 500), "tokenizer.json is not JSON"),
    "no-config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "unknown": (configured(model_type="bertt"), "has model type `bertt` but Transformers does not"),
    "no-type": (configured(model_type=None), "Should have a `model_type` key"),
    "quantized": (configured(quantization_config={"quant_method": "gptq"}), "are quantized"),
    "adapter": (adapter, "holds an adapter of peft"),
    "adapter-alone": (adapter_alone, "holds an adapter of peft"),
    "added-token": (add_token, r"goes up to token 345 \('@user'\), but the model has embeddings f"),
    "special-token": (add_special_token, r"goes up to token 345 \('\[\u00c91\]'\), but"),
    "int8": (changed(lambda t: t | {LAYER: t[LAYER].to(torch.int8)}), "are quantized .*is I8"),
    "folder": (folder_named("config.json"), "config.json cannot be read .Is a directory"),
    "folder-tokenizer": (folder_named("tokenizer.json"), "tokenizer.json cannot be read"),
    "no-object": (write("config.json", "null"), "config.json is not JSON .it holds no object"),
    "typed": (configured(num_hidden_layers="3"), "'num_hidden_layers' expected int, got str"),
    "no-merges": (
        lambda f: (
            set_json(f, "tokenizer_config.json", tokenizer_class="RobertaTokenizer"),
            (f / "tokenizer.json").unlink(),
            write("vocab.json", json.dumps({"<pad>": 0, "<unk>": 1, "a": 2}))(f),
        ),
        "merges.txt, without which vocab.json cannot be used, is missing: fetch it",
    ),
    "no-unknown-token": (
        lambda f: ((f / "tokenizer.json").unlink(), write("vocab.txt", "")(f)),
        "Missing .UNK. token from the vocabulary",
    ),
    "small-embeddings": (configured(vocab_size=300), "has embeddings for 300 tokens"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_would_be_misread_is_refused_in_one_line(folder, kind):
    damage, message = WRONG[kind]
    damage(folder)
    with pytest.raises(UserError, match=message) as raised:
        loading.check_max_length(folder, RTE, 32)
        loading.load_tokenizer(folder)
        loading.load_model(folder, RTE)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_the_control_of_a_random_encoder_needs_no_weights(folder):
    (folder / "model.safetensors").unlink()
    model, initialized = loading.load_model(folder, RTE, random_encoder=True)
    assert initialized == {"classifier.weight", "classifier.bias"}
    assert model.config.num_hidden_layers == 3


def test_pickled_weights_are_converted_as_the_message_says(folder):
    expected = load_file(folder / "model.safetensors")
    only_bin(folder)
    with pytest.raises(UserError) as raised:
        loading.load_model(folder, RTE)
    program = re.search(r'python -c "(.*)"', str(raised.value))[1]
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)
    assert all(
        torch.equal(t, expected[n]) for n, t in load_file(folder / "model.safetensors").items()
    )
    loading.load_model(folder, RTE)


def save_qwen2(folder):
    """Save a Qwen2 beside the tiny BERT's tokenizer, without an embedding of `<|endoftext|>`."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Qwen2Config(
        vocab_size=345, num_key_value_heads=2, intermediate_size=64, pad_token_id=0, **sizes
    )
    transformers.Qwen2ForSequenceClassification(config).save_pretrained(folder)


def test_a_token_that_only_the_class_adds_is_no_fault(folder):
    """Qwen2's adds `<|endoftext|>`, which no text of the task holds."""
    save_qwen2(folder)
    tokenizer = loading.load_tokenizer(folder)
    assert max(tokenizer.get_vocab().values()) == 345
    tokenizer.save_pretrained(folder)  # as with an exported model
    loading.load_tokenizer(folder)


def test_a_token_beyond_the_embeddings_is_refused_in_later_texts(folder, tmp_path, capsys):
    save_qwen2(folder)
    evaluator = GLUEvaluator("cola", str(folder), None, 0, GLUE)
    evaluator.preprocess_dataset("longest", 32, 8, train_size=16)
    evaluator.prepare("frozen", 1e-3, verbose=False)
    evaluator.train_and_evaluate(1)
    evaluator.save(tmp_path / "evaluator")
    text = TextColumns((["film <|endoftext|>"],), None)
    tokens = tokenize(text, evaluator.loaded.tokenizer, 32)
    evaluator.loaded.dataset.splits["test"] = Split(tokens, {})
    message = f"a text has token 345, but the model {folder} has embeddings for 345"
    with pytest.raises(UserError, match=message):
        evaluator.predict("test")
    (tmp_path / "texts.txt").write_text(f"{text.columns[0][0]}\n")
    words = [str(tmp_path / "evaluator"), "--input", str(tmp_path / "texts.txt")]
    assert predict.main(words) == 2
    assert message in capsys.readouterr().err


# Heads


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


@OLDER_DEBERTA
@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("roberta", ["classifier.dense.weight", "classifier.dense.bias"]),
        ("deberta-v2", ["pooler.dense.weight", "pooler.dense.bias"]),
        ("modernbert", ["head.dense.weight", "head.norm.weight"]),
    ],
)
def test_what_a_checkpoint_has_of_a_head_is_kept(folder, kind, kept):
    """Three labels in the checkpoint, two in the task; each run draws the rest."""
    original = dict(model_with_head(folder, kind, 3).named_parameters())
    first, again, other = (dict(load_model(folder, RTE, s).named_parameters()) for s in (1, 1, 2))
    for name in kept:
        assert torch.equal(first[name], original[name])
        assert torch.equal(other[name], original[name])
    (output,) = (n for n in first if n.startswith("classifier.") and first[n].shape[:1] == (2,)
                 and first[n].dim() == 2)  # fmt: skip
    assert torch.equal(first[output], again[output])
    assert not torch.equal(first[output], other[output])
    _, initialized = loading.load_model(folder, RTE)
    assert initialized == {output, output.replace("weight", "bias")}


def test_each_run_of_a_sweep_draws_only_what_is_absent(folder):
    original = model_with_head(folder, "roberta", 3, type_vocab_size=2)
    evaluator = GLUEvaluator("rte", str(folder), None, [1, 2], GLUE)
    evaluator.preprocess_dataset("longest", 12, 8, train_size=16)
    evaluator.training_preparation(1e-30, "adamw", False, verbose=False)
    evaluator.train_and_evaluate(1)
    heads = []
    for number in range(2):
        evaluator.select(number)
        heads.append({n: p.detach().clone() for n, p in evaluator.model.named_parameters()})
    for seed, head in zip((1, 2), heads, strict=True):
        assert torch.equal(head["classifier.dense.weight"], original.classifier.dense.weight)
        alone = load_model(folder, RTE, seed)
        assert torch.equal(head["classifier.out_proj.weight"], alone.classifier.out_proj.weight)
    assert not torch.equal(*(head["classifier.out_proj.weight"] for head in heads))


ORDERS = [  # the checkpoint's labels; for each of the task's, which output it was; None: no match
    (MNLI, ["entailment", "neutral", "contradiction"], [0, 1, 2]),
    (MNLI, ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], [2, 1, 0]),
    (MNLI, ["contradiction", "entailment", "neutral"], [1, 2, 0]),
    (MNLI, ["LABEL_0", "LABEL_1", "LABEL_2"], None),
    (MNLI, ["negative", "neutral", "positive"], None),
    (MNLI, ["neutral", "Neutral", "entailment"], None),
    (RTE, ["Not-Entailment", "entailment"], [1, 0]),
    (RTE, ["LABEL_0", "LABEL_1"], None),
    (STSB, ["score"], [0]),
    (STSB, ["LABEL_0"], None),
]


@pytest.mark.parametrize(("task", "names", "order"), ORDERS)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_outputs_are_brought_into_the_tasks_order_by_name(folder, kind, task, names, order):
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    original = model_with_head(folder, kind, len(names), **labels)
    output = original.classifier if kind == "bert" else original.classifier.out_proj
    torch.nn.init.normal_(output.bias)
    original.save_pretrained(folder)
    model = load_model(folder, task, seed=1)
    ours = model.classifier if kind == "bert" else model.classifier.out_proj
    if order is None:
        assert not ours.bias.any()
        assert not torch.equal(ours.weight, output.weight)
        other = load_model(folder, task, seed=2)
        other = other.classifier if kind == "bert" else other.classifier.out_proj
        assert not torch.equal(ours.weight, other.weight)
    else:
        assert torch.equal(ours.weight, output.weight[order])
        assert torch.equal(ours.bias, output.bias[order])
        ids = torch.tensor([[2, 9, 8, 3]])
        with torch.no_grad():
            expected = original.eval()(input_ids=ids).logits[:, order]
            assert torch.allclose(model.eval()(input_ids=ids).logits, expected, atol=1e-6)
    if kind == "roberta":
        assert torch.equal(model.classifier.dense.weight, original.classifier.dense.weight)


def test_a_head_that_is_not_used_may_be_damaged(folder):
    def bad_head(tensors):
        return tensors | {"classifier.weight": torch.full((2, 128), float("nan"))}

    change(folder, bad_head)  # no labels in config.json: drawn from the seed
    assert load_model(folder, RTE).classifier.weight.isfinite().all()
    set_json(folder, id2label={"0": "entailment", "1": "not_entailment"})
    with pytest.raises(UserError, match=r"NaN or infinite values .the first: classifier.weight"):
        loading.load_model(folder, RTE)


REPORTS = {
    "plain": (
        lambda f: None,
        "kept the encoder; initialized from the run's seed: classifier; not used: "
        "cls.predictions, cls.seq_relationship",
    ),
    "no-pooler": (
        changed(lambda t: {n: v for n, v in t.items() if ".pooler." not in n}),
        "kept the encoder; bert.pooler.dense is absent: initialized at random, alike in all runs; "
        "initialized from the run's seed: classifier; not used: cls.predictions, "
        "cls.seq_relationship",
    ),
    "reordered": (
        lambda f: model_with_head(f, "bert", 2, id2label={0: "not_entailment", 1: "entailment"}),
        "kept the encoder, classifier; outputs reordered from not_entailment, entailment "
        "to entailment, not_entailment",
    ),
    "partly": (
        lambda f: model_with_head(f, "roberta", 3),
        "kept the encoder, classifier.dense; initialized from the run's seed: classifier.out_proj",
    ),
    "other-labels": (
        lambda f: model_with_head(f, "bert", 2, id2label={0: "ham", 1: "spam"}),
        "kept the encoder; initialized from the run's seed: classifier; the head's labels were "
        "ham, spam, not the task's",
    ),
    "no-bias": (
        lambda f: (
            change(f, lambda t: t | {"classifier.weight": torch.ones(2, 128)}),
            set_json(f, id2label={"0": "entailment", "1": "not_entailment"}),
        ),
        "kept the encoder, classifier.weight; initialized from the run's seed: classifier.bias; "
        "not used: cls.predictions, cls.seq_relationship",
    ),
}


@pytest.mark.parametrize("kind", REPORTS)
def test_one_line_says_which_weights_are_used(folder, caplog, kind):
    change_folder, expected = REPORTS[kind]
    change_folder(folder)
    evaluator = GLUEvaluator("rte", str(folder), None, [0, 1], GLUE)
    evaluator.preprocess_dataset("longest", 12, 8, train_size=16)
    caplog.set_level("INFO", logger="bitfit")
    for _ in range(2):  # as for runs one after the other
        evaluator.training_preparation(1e-3, "adamw", False, verbose=False)
    said = [m for m in caplog.messages if m.startswith("weights of ")]
    assert said == [f"weights of {folder}: {expected}"]


# Custom code


def code(folder, **config):
    for name in ("configuration_my", "modeling_my", "tokenization_my"):
        (folder / f"{name}.py").write_text(CODE)
    set_json(folder, **config)


AUTO_MAP = {
    "AutoConfig": "configuration_my.MyConfig",
    "AutoModelForSequenceClassification": "modeling_my.MyModel",
}


def test_code_in_a_model_folder_is_never_run(folder, tmp_path, monkeypatch, capsys):
    """Nobody is asked on standard input, where the answer would be yes."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    monkeypatch.chdir(tmp_path)
    at = ["--gpu-device", "cpu", "--data-dir", str(GLUE), "--max-seq-length", "12"]
    argv = ["-t", "rte", "-f", "frozen", "-m", "./model", "-e", "1", "--train-size", "16", *at]
    assert run_glue.main(["-o", "out", *argv, "--save-evaluator"]) == 0
    capsys.readouterr()
    code(folder, auto_map=AUTO_MAP, model_type="my")
    for random in ([], ["--random-encoder"]):
        assert run_glue.main(["-o", "new", *argv, *random]) == 2
    assert predict.main(["out", "--gpu-device", "cpu"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert all("custom code is not supported" in line for line in said)
    with pytest.raises(UserError, match="custom code is not supported"):
        GLUEvaluator.load("out/evaluator", None)
    with pytest.raises(UserError, match="custom code is not supported"):
        cost.model_without_weights("./model", RTE)
    assert not asked
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_known_model_with_code_of_its_own_gets_a_warning(folder, caplog, name):
    set_json(folder, name, auto_map={"AutoModel": "modeling_my.M", "AutoTokenizer": ["t.T", None]})
    loading.load_tokenizer(folder)
    assert [r.getMessage() for r in caplog.records] == [
        f"{folder}: custom code is not supported: its own code (auto_map) was not run, "
        "transformers' bert is used"
    ]


# Names and tokenizers


def test_a_folder_that_hides_a_model_on_the_hub(tmp_path, monkeypatch, capsys, caplog, hub):
    monkeypatch.chdir(tmp_path)
    Path("bert-base-cased").mkdir()
    argv = ["-o", "out", "-t", "rte", "-f", "bitfit", "--data-dir", str(GLUE)]
    assert run_glue.main(argv) == 2  # the default model
    said = capsys.readouterr().err
    assert f"the folder {tmp_path}/bert-base-cased has no config.json; it hides a model of" in said
    assert len(said.splitlines()) == 1
    for name, warned in {"./own": 0, "some/folder": 0, "own": 1, "org/tiny": 1}.items():
        shutil.copytree(TINY_BERT, name, dirs_exist_ok=True)
        caplog.clear()
        loading.load_tokenizer(name)
        said = f"--model-name {name} is the folder of that name here, not a model on the Hub"
        assert [r.getMessage().startswith(said) for r in caplog.records] == [True] * warned


SMALL = list("abcdefghijklmnopqrstuvwxyz")
CAPITALS = [letter.upper() for letter in SMALL]


@pytest.mark.parametrize(
    ("letters", "lower", "message"),
    [
        (SMALL + CAPITALS, None, "lower-cases all texts, but 26 tokens of its vocabulary have"),
        (SMALL + CAPITALS, True, "lower-cases all texts"),
        (SMALL + CAPITALS, False, None),
        (SMALL, None, None),
        (SMALL, True, None),
        (SMALL, False, "keeps capitals, but no token of its vocabulary has any"),
    ],
)
def test_a_vocabulary_and_its_lower_casing(folder, caplog, letters, lower, message):
    """Without tokenizer_config.json BERT's tokenizer lower-cases, as bert-base-cased must not."""
    for path in folder.glob("tokenizer*"):
        path.unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"w{i}" for i in range(285))]
    (folder / "vocab.txt").write_text("\n".join(words))
    if lower is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    tokenizer = loading.load_tokenizer(folder)
    assert tokenizer.tokenize("a") == ["a"]
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == (message is not None)
    assert message is None or message in said[0]


def test_a_vocabulary_of_bytes_has_no_capitals_for_its_spaces(tmp_path, caplog):
    bpe = ByteLevelBPETokenizer(lowercase=True)
    words = [a + b for a in "abcdefghij" for b in "klmnopqrst"]
    bpe.train_from_iterator([" ".join(words)] * 9, 600, special_tokens=["<pad>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()), pad_token="<pad>"
    )
    tokens = tokenizer.get_vocab()
    assert sum("\u0120" in token for token in tokens) > 50
    tokenizer_checks.warn_of_case(tokenizer, tokens, tmp_path)
    assert not caplog.records


def set_tokenizer(folder, **parts):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


def test_a_tokenizer_file_that_transformers_reads_otherwise(folder, caplog):
    """Its class takes the vocabulary alone: here numbers are no longer read digit by digit."""
    loading.load_tokenizer(folder)
    assert not caplog.records
    steps = [{"type": "BertPreTokenizer"}, {"type": "Digits", "individual_digits": True}]
    set_tokenizer(folder, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    assert loading.load_tokenizer(folder).tokenize("20") == ["2", "##0"]
    (record,) = caplog.records
    assert "BertTokenizer takes the vocabulary alone from tokenizer.json" in record.getMessage()
    caplog.clear()
    set_json(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert loading.load_tokenizer(folder).tokenize("20") == ["2", "0"]
    assert not caplog.records


def test_the_generic_class_keeps_the_token_types_of_pairs(folder, tmp_path):
    """As before transformers 5, unless a model has no embeddings for them or a file says so."""
    expected = loading.load_tokenizer(folder)("a film", "a cat")
    assert 1 in expected["token_type_ids"]
    set_json(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    tokenizer = loading.load_tokenizer(folder)
    assert dict(tokenizer("a film", "a cat")) == dict(expected)
    tokenizer.save_pretrained(tmp_path / "exported")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert dict(exported("a film", "a cat")) == dict(expected)
    set_json(folder, type_vocab_size=1)
    assert "token_type_ids" not in loading.load_tokenizer(folder)("a film", "a cat")
    set_json(folder, type_vocab_size=2)
    set_json(folder, "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    assert "token_type_ids" not in loading.load_tokenizer(folder)("a film", "a cat")


def test_a_much_smaller_vocabulary_than_the_embeddings(folder, caplog):
    change(folder, lambda t: t | {WORDS: torch.randn(400, 128)})
    set_json(folder, vocab_size=400)
    loading.load_tokenizer(folder)
    (said,) = (r.getMessage() for r in caplog.records)
    assert "has 345 tokens, and the model embeddings for 400" in said


@OLDER_DEBERTA
def test_a_sentencepiece_model_needs_its_packages(folder, monkeypatch):
    """As DeBERTa-v3 lies on the Hub."""
    for path in folder.glob("tokenizer*"):
        path.unlink()
    model_with_head(folder, "deberta-v2", 2)
    (folder / "spm.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    write("tokenizer_config.json", '{"do_lower_case": false, "vocab_type": "spm"}')(folder)
    for package in ("sentencepiece", "tiktoken"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="pip install sentencepiece protobuf"):
        loading.load_tokenizer(folder)


# The same through the programs


def test_bad_models_end_the_programs_with_one_line(folder, tmp_path, capsys, monkeypatch):
    output, at = tmp_path / "out", ["--data-dir", str(GLUE), "--gpu-device", "cpu"]
    argv = ["-t", "rte", "-f", "frozen", "-m", str(folder), "-e", "1", "--train-size", "16", *at]
    argv += ["--max-seq-length", "12"]
    assert run_glue.main(["-o", str(output), *argv, "--save-evaluator"]) == 0
    change(folder, with_nan)
    capsys.readouterr()
    assert run_glue.main(["-o", str(tmp_path / "new"), *argv]) == 2
    assert predict.main([str(output), "--gpu-device", "cpu"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said[-2:]] == ["run_glue.py", "predict.py"]
    assert all("1 of its tensors hold NaN or infinite values" in line for line in said[-2:])
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="NaN or infinite"):
        GLUEvaluator.load(output / "evaluator", None)
