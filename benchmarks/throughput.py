"""Our training loop beside the released one, on the same rows in one process.

    python benchmarks/throughput.py --task-name cola --data-dir <GLUE folder> --model-name <folder>

The released loop is re-created plainly: every row padded to 128, one batch at a time, float32,
`.item()` and a print each step. Both train the same bias terms at the same batch size, in turn
(A B A B ...), after a warm-up of one step each. The clock covers training alone: no loading,
tokenizing or scoring. Without --model-name a random encoder of MiniLM-L6's size (22M) is used.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification  # noqa: E402

from bitfit import models, sources  # noqa: E402
from bitfit.checkpoints import Saver  # noqa: E402
from bitfit.data import MAX_TOKENS, Split, tokenize  # noqa: E402
from bitfit.predict import Limit  # noqa: E402
from bitfit.runs import Run, Stack  # noqa: E402
from bitfit.tasks import TASKS  # noqa: E402
from bitfit.train import Plan, start, train_epoch  # noqa: E402
from bitfit.trainable import select  # noqa: E402

LENGTH = 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {  # hidden size, layers, heads, intermediate size
    "minilm": (384, 6, 12, 1536),
    "bert-base": (768, 12, 12, 3072),
}


def make_parser(description):
    """The flags that both benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--task-name", default="cola", choices=TASKS)
    parser.add_argument("--data-dir", default=str(ROOT / "examples/glue"))
    parser.add_argument("--model-name", help="a folder; None: a random encoder")
    parser.add_argument("--size", default="minilm", choices=SIZES, help="of the random encoder")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def parse_args():
    parser = make_parser(__doc__)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rows", type=int, default=256, help="training rows in one pass")
    return parser.parse_args()


def load(args, task):
    """(tokenizer, a function that makes the same fresh model each time)"""
    if args.model_name:
        tokenizer = models.load_tokenizer(args.model_name)
        return tokenizer, lambda: models.load(args.model_name, task)[0]
    hidden, layers, heads, inner = SIZES[args.size]
    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        num_labels=task.num_labels,
    )

    def make():
        torch.manual_seed(0)
        return BertForSequenceClassification(config)

    return AutoTokenizer.from_pretrained(ROOT / "examples/tiny_bert"), make


def released_pass(model, rows, batch_size):
    """One pass as the released code makes it; `rows` are padded tensors on the device."""
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*rows.values()), batch_size=batch_size, shuffle=True
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, eps=1e-6)
    criterion = torch.nn.CrossEntropyLoss() if model.config.num_labels > 1 else torch.nn.MSELoss()
    model.train()
    loss_sum = 0.0
    with open(os.devnull, "w") as screen:
        for step, (*inputs, labels) in enumerate(loader):
            logits = model(**dict(zip(rows, inputs, strict=False))).logits
            loss = criterion(logits.squeeze(-1), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            model.zero_grad()
            loss_sum += loss.item()
            print(f"STEP {step} LOSS {loss_sum / (step + 1):.3f}\r", end="", file=screen)


def make_released(make_model, tokenizer, texts, device):
    """A function that trains so many rows in the released way."""
    model = make_model().to(device)
    names = select(model, "bitfit", ["bias"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    rows = tokenizer(
        *texts.columns,
        padding="max_length",
        max_length=LENGTH,
        truncation=True,
        return_tensors="pt",
    )
    rows = {k: v.to(device) for k, v in rows.items()}
    rows["labels"] = torch.from_numpy(texts.labels).to(device)

    def train(count, batch_size):
        released_pass(model, {k: v[:count] for k, v in rows.items()}, batch_size)

    return train


def make_ours(make_model, tokenizer, texts, device, task, precision):
    """A function that trains so many rows in our way."""
    model = make_model().to(device)
    tokens = tokenize(texts, tokenizer, LENGTH).to(device)
    stack = Stack(model, select(model, "bitfit", ["bias"]), [Run(1e-3, 0)], models.draw_head)

    def train(count, batch_size):
        state = one_epoch(model, stack, tokens, task, batch_size, np.arange(count))
        return timed_epoch(state, precision)

    return train


def one_epoch(model, stack, tokens, task, batch_size, rows, max_tokens=None):
    """The `State` of an epoch over some rows, before its first step."""
    device = tokens.ids.device
    forward = models.find_forward(model, "the model", tokens)
    split = Split(tokens, {run.seed: rows for run in stack.runs})
    limit = Limit(max_tokens or MAX_TOKENS[device.type], device)
    return start(Plan(task, forward, split, {}, limit, batch_size, epochs=1), stack)


def timed_epoch(state, precision):
    """The seconds of training it."""
    device = state.stack.values.device
    with state.stack.bound(DTYPES[precision]):
        synchronize(device)
        begin = time.perf_counter()
        train_epoch(state, Saver(), tqdm(disable=True))
        synchronize(device)
        return time.perf_counter() - begin


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(train, count, batch_size, device):
    synchronize(device)
    begin = time.perf_counter()
    train(count, batch_size)
    synchronize(device)
    return time.perf_counter() - begin


def padding_share(texts, tokenizer):
    """The share of padding among the tokens that the released loop multiplies."""
    lengths = tokenize(texts, tokenizer, LENGTH).lengths
    return 1 - lengths.sum() / (LENGTH * len(lengths))


def machine(device):
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    threads = torch.get_num_threads()
    return f"torch {torch.__version__}, {threads} threads, {device.type} {name}".rstrip()


def spread(values, digits=1):
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def pick_rows(args, task):
    """(the training rows to work on, how many there are in all)"""
    texts = sources.read_split(task, "train", args.data_dir)
    picked = np.random.default_rng(0).permutation(len(texts))[: args.rows]
    return texts.take(picked), len(texts)


def pick_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main():
    args = parse_args()
    task, device = TASKS[args.task_name], pick_device()
    tokenizer, make_model = load(args, task)
    texts, _ = pick_rows(args, task)
    released = make_released(make_model, tokenizer, texts, device)
    print(
        f"{task.name}, {len(texts)} rows, batch {args.batch_size}, {args.rounds} rounds, "
        f"{machine(device)}\n"
        f"padding: released {padding_share(texts, tokenizer):.0%}, ours none"
    )
    for precision in args.precision:
        ours = make_ours(make_model, tokenizer, texts, device, task, precision)
        warm_up = min(args.batch_size, len(texts))
        timed(released, warm_up, args.batch_size, device)
        ours(warm_up, args.batch_size)
        pairs = [
            (
                timed(released, len(texts), args.batch_size, device),
                ours(len(texts), args.batch_size),
            )
            for _ in range(args.rounds)
        ]
        theirs = spread([len(texts) / a for a, _ in pairs])
        mine = spread([len(texts) / b for _, b in pairs])
        ratio = spread([a / b for a, b in pairs], 2)
        print(f"released fp32 {theirs} ex/s | ours {precision} {mine} ex/s | ratio {ratio}")


if __name__ == "__main__":
    main()
