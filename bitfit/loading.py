"""Check a model's folder, tokenizer and checkpoint, and decide where its head starts.

Input that would give wrong results is refused with one line. One more line says which weights of a
checkpoint are used.
"""

import importlib
import inspect
import json
import logging
import re
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer

from bitfit import hub
from bitfit.tables import POINTER
from bitfit.trainable import head_names, in_encoder
from utils import UserError, one_line

LOGGER = logging.getLogger("bitfit")
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
JSON_FILES = (
    "config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "model.safetensors.index.json",
)  # fmt: skip
WRAPPERS = (
    "module.",
    "_orig_mod.",
    "model.",
    "base_model.model.",
)  # of DataParallel, compile, peft
# Buffers of older checkpoints, which transformers computes today.
BUFFERS = r"\.(position_ids|inv_freq|masked_bias|attn\.bias|attention\.bias|(cos|sin)_cached)$"
# A tokenizer may leave rows of the embeddings unused: Phi-2's leaves 1.8 %, mDeBERTa-v3's 0.4 %.
USUAL_VOCABULARY = 0.9
SAMPLE = "The film isn't GOOD, in 2023: caf\u00e9, $9.95 (http://a.b/c-d_e)"
CONVERT = (
    "import glob, torch; from safetensors.torch import save_file; "
    "w = {k: v for f in glob.glob('pytorch_model*.bin') "
    "for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}; "
    "save_file({k: v.clone().contiguous() for k, v in w.items()}, 'model.safetensors', "
    "{'format': 'pt'})"
)


def cannot_load(model_name, error, revision=None):
    """Return the `UserError` for what transformers raised about a model."""
    if isinstance(error, UserError):
        return error
    name, message = str(model_name), str(error)
    local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not Path(name).is_dir() and (local or ("/" in name and Path(name).parent.is_dir())):
        return UserError(f"there is no model folder {name}: check --model-name")
    name += f" at revision {revision}" if revision else ""
    if "trust_remote_code" in message:
        what = "it needs code of its own (auto_map), and custom code is not supported: none was run"
        return UserError(f"cannot load the model {name}: {what}; give another --model-name")
    if ("sentencepiece" in message or "tiktoken" in message) and lacks_sentencepiece():
        what = "it has no tokenizer.json, and the packages that make one of spm.model are missing"
        advice = "pip install sentencepiece protobuf"
        return UserError(f"cannot load the model {name}: {what}: {advice}")
    folder = Path(model_name)
    if "merges" in message and (folder / "vocab.json").exists() > (folder / "merges.txt").exists():
        what = "merges.txt, without which vocab.json cannot be used, is missing: fetch it"
        return UserError(f"cannot load the model {name}: {what}")
    if "does not appear to have a file named" in message and not Path(model_name).is_dir():
        where = f"in the folder that `hf download {model_name} --local-dir <folder>` makes"
        return UserError(f"cannot load the model {name}: {one_line(error)}: {unconverted(where)}")
    if found := broken_file(Path(model_name), error):
        return UserError(f"cannot load the model {name}: {found}")
    return UserError(
        f"cannot load the model {name}: {reason(error)}; give a name on the Hub (network "
        "or cache needed) or a folder with config.json, model.safetensors and tokenizer files: "
        "--model-name <folder>"
    )


def lacks_sentencepiece():
    try:
        for module in ("sentencepiece", "google.protobuf"):
            importlib.import_module(module)
    except ImportError:
        return True
    return False


def reason(error):
    """Return what an error says in one line, with its kind where the text alone is no sentence."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    plain = isinstance(error, (OSError, ValueError, ImportError)) and text
    return text if plain else f"{type(error).__name__}: {text}"


def broken_file(folder, error):
    """Return which file of a model folder made loading fail and what to do, or None."""
    for path in (folder / name for name in JSON_FILES if (folder / name).exists()):
        try:
            if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
                raise ValueError("it holds no object")
        except OSError as fault:  # a folder of that name, or no permission
            return f"{path.name} cannot be read ({fault.strerror}): fetch or save it again"
        except (ValueError, RecursionError) as fault:
            return f"{path.name} is not JSON ({one_line(fault)}): fetch or save it again"
    if "safetensors" not in f"{type(error)} {error}".lower():
        return None
    weights = sorted(folder.glob("model*.safetensors"))
    for path in weights:
        if fault := unreadable(path):
            return f"{path.name} is cut off or damaged ({fault}): fetch or save it again"
    if not weights and any(folder.glob("pytorch_model*.bin")):
        return f"there is no model.safetensors in it, and {unconverted(f'in {folder}')}"
    missing = missing_shards(folder)
    if missing:
        return f"{missing[0]} is missing, which model.safetensors.index.json names: fetch it"
    return None if weights else "there is no model.safetensors in it: fetch it, or save the model"


def unconverted(where):
    """Return why pickled weights are not read, and how to convert them."""
    what = "pickled weights (pytorch_model.bin) are not read, for they can hold code: convert them"
    return f'{what} {where} with python -c "{CONVERT}"'


def unreadable(path):
    """Return why a safetensors file cannot be read, or None."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except Exception as error:  # an OSError or safetensors' own
        return one_line(error)


def missing_shards(folder):
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    shards = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    return sorted(shard for shard in shards if not (folder / shard).exists())


def check_files(model_name, revision=None):
    """Refuse what transformers would pass over or misread without a word.

    Raises:
        UserError: a folder without config.json, pointers of git-lfs, an adapter of peft.
    """
    folder = Path(model_name)
    if folder.is_dir() and not (folder / "config.json").exists() and not is_adapter(folder):
        hides = "; it hides a model of that name on the Hub" * could_be_on_the_hub(model_name)
        what = f"the folder {folder.absolute()} has no config.json{hides}"
        raise UserError(f"cannot load the model {folder}: {what}: give another --model-name, "
                        "or start the command in another folder")  # fmt: skip
    if hub.find_file(model_name, "adapter_config.json", revision):
        what = "holds an adapter of peft (adapter_config.json), which would not be applied: save "
        what += "the model that `merge_and_unload()` gives, or remove the adapter's files"
        raise UserError(f"cannot load the model {model_name}: it {what}")
    if folder.is_dir():
        check_pointers(folder)


def is_adapter(folder):
    return (folder / "adapter_config.json").exists()


def check_pointers(folder):
    """Refuse a folder that was cloned without git-lfs."""
    whole = (folder / "tokenizer.json").exists()  # then no other vocabulary is read
    patterns = ["*.json", "model*.safetensors", *([] if whole else ["*.txt", "*.model"])]
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                what = f"{path.name} is a git-lfs pointer, not the file: run `git lfs pull` there"
                raise UserError(f"cannot load the model {folder}: {what}")


def could_be_on_the_hub(model_name):
    """Whether a folder's name could as well be that of a model on the Hub."""
    name = str(model_name)
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)) and name.count("/") < 2


def warn_of_shadow(model_name):
    """Log that a folder is used where its name could mean a model on the Hub."""
    if not Path(model_name).is_dir() or not could_be_on_the_hub(model_name):
        return
    if hub.is_cached(model_name) or "/" not in str(model_name):
        what = "is the folder of that name here, not a model on the Hub"
        LOGGER.warning("--model-name %s %s (./%s says so)", model_name, what, model_name)


def check_config(config, raw, model_name):
    """Refuse a config of a model without layers.

    Args:
        raw: the dictionary in config.json.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        what = f"its config.json gives it {layers} layers (num_hidden_layers)"
        raise UserError(f"cannot load the model {model_name}: {what}: give at least 1")
    if isinstance(raw.get("quantization_config"), dict):
        what = "its weights are quantized (quantization_config)"
        raise UserError(f"cannot load the model {model_name}: {what}: give the float model")


def check_tokenizer(tokenizer, config, model_name):
    """Compare a tokenizer with the model's embeddings, and its vocabulary with its lower-casing.

    Raises:
        UserError: it has no padding token, or tokens that the embeddings lack.
    """
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {model_name} has no padding token: BERT's family does")
    tokens = tokenizer.get_vocab()
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(rows, int):
        return
    beyond = [token for token in tokens if tokens[token] >= rows]
    if beyond and not are_of_the_class(beyond, tokenizer, rows):
        last = max(beyond, key=tokens.get)
        what = f"the tokenizer of {model_name} goes up to token {tokens[last]} ({last!r}), but the "
        what += f"model has embeddings for {rows} tokens, from 0 (vocab_size in config.json)"
        raise UserError(f"{what}: give each model its own tokenizer, or save the model after "
                        "`model.resize_token_embeddings(len(tokenizer))`")  # fmt: skip
    if len(tokens) < USUAL_VOCABULARY * rows:
        what = "tokens, and the model embeddings for %d: is it the tokenizer of this model?"
        LOGGER.warning(f"the tokenizer of %s has %d {what}", model_name, len(tokens), rows)
    warn_of_case(tokenizer, tokens, model_name)


def are_of_the_class(beyond, tokenizer, rows):
    """Whether transformers' class alone added tokens beyond the embeddings, which it never gives.

    Qwen2's adds `<|endoftext|>` to every vocabulary, whatever the model's files hold.
    """
    parameters = inspect.signature(type(tokenizer).__init__).parameters.values()
    defaults = {str(parameter.default) for parameter in parameters}
    ids = tokenizer("a", "A \u2603 \ufdd0")["input_ids"]
    return defaults.issuperset(beyond) and max(*ids, tokenizer.pad_token_id) < rows


def warn_of_case(tokenizer, tokens, model_name):
    """Log that a vocabulary of cased texts is read in lower case, or the other way round."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    text = normalizer.normalize_str("A") if normalizer else "A"
    special = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    words = [token for token in tokens if token not in special]
    if any("\u0120" in word for word in words):
        # Vocabularies of bytes write a space as this capital, and have all 256 bytes.
        words = [word for word in (w.replace("\u0120", "") for w in words) if len(word) > 1]
    capitals = sum(word != word.lower() for word in words)
    if "a" in text and capitals > 0.02 * len(tokens):
        what = f"lower-cases all texts, but {capitals} tokens of its vocabulary have capitals"
        advice = 'give it "do_lower_case": false in tokenizer_config.json'
    elif "A" in text and not capitals and unknown(tokenizer, "A"):
        what = "keeps capitals, but no token of its vocabulary has any: they become unknown"
        advice = 'give it "do_lower_case": true in tokenizer_config.json'
    else:
        return
    LOGGER.warning("the tokenizer of %s %s: %s", model_name, what, advice)


def warn_of_file(tokenizer, model_name, revision=None):
    """Log that transformers reads texts otherwise than tokenizer.json describes.

    Most of its classes take the vocabulary alone from the file. Where both normalize as BERT does,
    tokenizer_config.json decides on lower-casing and accents.
    """
    path = hub.find_file(model_name, "tokenizer.json", revision)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if path is None or backend is None:
        return
    file = Tokenizer.from_file(str(path))
    file.no_truncation()
    file.no_padding()
    if isinstance(file.normalizer, BertNormalizer):
        file.normalizer = backend.normalizer or file.normalizer
    if file.encode(SAMPLE, add_special_tokens=False).ids != tokenizer.encode(
        SAMPLE, add_special_tokens=False
    ):
        what = "takes the vocabulary alone from tokenizer.json of %s and reads texts otherwise than"
        advice = 'the file says; with "tokenizer_class": "PreTrainedTokenizerFast" in '
        advice += "tokenizer_config.json most models follow the file"
        LOGGER.warning(f"transformers' %s {what} {advice}", type(tokenizer).__name__, model_name)


def unknown(tokenizer, text):
    return tokenizer.unk_token_id in tokenizer(text, add_special_tokens=False)["input_ids"]


def check_weights(model, model_name, info):
    """Refuse a checkpoint whose encoder is not the one that config.json describes.

    A pooler may be absent (MLM checkpoints have none); any other encoder weight may not.

    Args:
        info: transformers' lists of missing, unexpected and mismatched names.
    """
    shapes = {name: (tuple(ours), tuple(own)) for name, ours, own in info["mismatched_keys"]}
    absent = sorted(
        n
        for n in info["missing_keys"] | shapes.keys()
        if in_encoder(model, n) and ".pooler." not in n
    )
    unexpected = sorted(info["unexpected_keys"])
    if absent:
        what = f"lacks {len(absent)} encoder weights (the first: {absent[0]})"
        why = "it is not a checkpoint of the architecture in its config.json"
        differing = next((n for n in absent if n in shapes), None)
        if wrapper := wrapper_of(absent[0], unexpected, model.base_model_prefix):
            why = f"all names in it begin with `{wrapper}`: save the model inside the wrapper, "
            why += "as with `model.module.save_pretrained(folder)`"
        elif differing:
            own, expected = shapes[differing]
            why = f"{differing} has the shape {own}, and {expected} by its config.json"
        raise UserError(f"{model_name} {what}: {why}")
    beyond = [n for n in unexpected if is_beyond(n, model)]
    if beyond:
        layers = getattr(model.config, "num_hidden_layers", "?")
        what = f"has {len(beyond)} weights in its layers for which its config.json has no place"
        why = f"(num_hidden_layers: {layers}; the first: {beyond[0]}): correct it, or save "
        raise UserError(f"{model_name} {what} {why}the model that is meant")


def wrapper_of(name, unexpected, base):
    """Return the wrapper's prefix under which a checkpoint has an absent weight, or ''."""
    endings = {name, name.removeprefix(f"{base}.")}
    found = (w for w in WRAPPERS for ending in endings if w + ending in unexpected)
    return next(found, "")


def is_beyond(name, model):
    """Whether an unused weight lies in a layer: one more layer, or one more weight in it."""
    if re.search(BUFFERS, name):
        return False
    base = f"{model.base_model_prefix}."
    ours = {first_layer(n.removeprefix(base)) for n, _ in model.named_parameters()
            if in_encoder(model, n)}  # fmt: skip
    layer = first_layer(name.removeprefix(base))
    return layer is not None and layer in ours


def first_layer(name):
    """`encoder.layer.3.output.dense.bias` -> `encoder.layer`; None outside of layers."""
    found = re.match(r"(.*?)\.\d+\.", name)
    return found and found[1]


def check_dtypes(model_name, revision=None):
    """Refuse integers and 8-bit floats where weights are meant: transformers would only cast them.

    Raises:
        UserError: they are quantized, and nothing says how.
    """
    for path in weight_files(model_name, revision):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                dtype = file.get_slice(name).get_dtype()
                weight = name.endswith((".weight", ".bias")) and not re.search(BUFFERS, name)
                if weight and dtype not in ("F64", "F32", "F16", "BF16"):
                    what = f"its weights are quantized ({name} is {dtype}): give the float model"
                    raise UserError(f"cannot load the model {model_name}: {what}")


def weight_files(model_name, revision=None):
    """The paths of a checkpoint's safetensors files, one or many."""
    index = hub.find_file(model_name, "model.safetensors.index.json", revision)
    single = hub.find_file(model_name, "model.safetensors", revision)
    if single or not index:
        return [single] if single else []
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [index.with_name(name) for name in sorted(set(named))]


def check_finite(model, model_name, initialized):
    """Refuse NaN and infinite weights, apart from those that are initialized later."""
    bad = [
        name
        for name, value in model.state_dict().items()
        if name not in initialized and value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        what = f"{len(bad)} of its tensors hold NaN or infinite values (the first: {bad[0]})"
        raise UserError(f"cannot load the model {model_name}: {what}: fetch or save it again")


def start_head(model, task, absent, raw):
    """Decide what of a checkpoint's head is used, and bring its outputs into the task's order.

    As in transformers only absent parts are initialized. Its outputs are used where config.json
    names the task's labels, in whatever order.

    Args:
        absent: the names that the checkpoint lacks or has in another shape.
        raw: the dictionary in config.json.

    Returns:
        (names of the parameters to initialize, what was done with the outputs as text)
    """
    names = head_names(model)
    initialized, outputs = {n for n in names if n in absent}, set(output_names(model, task))
    if not outputs or outputs <= initialized:
        return initialized, ""
    old, new = label_names(raw), task.labels or ("score",)
    order = order_of(old, new)
    if order is None:
        given = ", ".join(map(str, old[:4])) or "unnamed"
        return initialized | outputs, f"the head's labels were {given}, not the task's"
    if order == sorted(order):
        return initialized, ""
    with torch.no_grad():
        for name in outputs - initialized:
            parameter = model.get_parameter(name)
            parameter.copy_(parameter[order])
    return initialized, f"outputs reordered from {', '.join(old)} to {', '.join(new)}"


def output_names(model, task):
    """The names of the parameters of the head's last layer, which has an output per label."""
    last = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not in_encoder(model, name)
        and module.out_features == task.num_labels
    ][-1:]
    return [n for n in head_names(model) if n.rpartition(".")[0] in last]


def label_names(raw):
    """The labels in a config.json, by their numbers; none where it does not number all."""
    try:
        named = {int(number): str(name) for number, name in raw["id2label"].items()}
    except (LookupError, ValueError, TypeError, AttributeError):
        return []
    return [named[n] for n in range(len(named))] if set(named) == set(range(len(named))) else []


def order_of(old, new):
    """Where each new label is among the old ones; None where they are not the same labels.

    Names may differ in case and punctuation (`NOT-ENTAILMENT`, `not_entailment`).
    """
    for key in (str, lambda name: re.sub(r"[\W_]+", " ", name.casefold()).strip()):
        a, b = [*map(key, old)], [*map(key, new)]
        if len(set(a)) == len(a) and sorted(a) == sorted(b):
            return [a.index(name) for name in b]
    return None


def report(model, model_name, info, absent, initialized, outputs):
    """Log one line: what of a checkpoint was kept, initialized, reordered and left unused.

    Args:
        initialized, outputs: what `start_head` gave.
    """
    kept = {n for n in head_names(model) if n not in initialized}
    both = {owner_of(n) for n in kept} & {owner_of(n) for n in initialized}
    alike = modules_of(n for n in absent if in_encoder(model, n))
    unused = sorted({".".join(owner_of(n).split(".")[:2]) or n for n in info["unexpected_keys"]})
    parts = ["kept the encoder" + "".join(f", {name}" for name in modules_of(kept, both))]
    if alike:
        parts.append(f"{', '.join(alike)} is absent: initialized at random, alike in all runs")
    if initialized:
        parts.append(f"initialized from the run's seed: {', '.join(modules_of(initialized, both))}")
    parts += [outputs] if outputs else []
    if unused:
        more = f" and {len(unused) - 4} more" * (len(unused) > 4)
        parts.append(f"not used: {', '.join(unused[:4])}{more}")
    lost = any(in_encoder(model, n) and ".pooler." not in n and not re.search(BUFFERS, n)
               for n in info["unexpected_keys"])  # fmt: skip
    level = logging.WARNING if alike or outputs or lost else logging.INFO
    LOGGER.log(level, "weights of %s: %s", model_name, "; ".join(parts))


def owner_of(name):
    """The module of a parameter."""
    return name.rpartition(".")[0]


def modules_of(names, partly=()):
    """The modules of some parameters, each once; of those in `partly` the parameters."""
    return sorted({n if owner_of(n) in partly else owner_of(n) or n for n in names})
