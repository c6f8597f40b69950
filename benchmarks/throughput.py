"""Compare our training loop with the released one, on the same examples in one process.

    python benchmarks/throughput.py --task-name cola --data-dir <GLUE folder> --model-name <folder>

The released loop is written again: every example padded to 128 tokens, one batch at a time,
float32, `.item()` and a print each step. Both train the same bias terms at the same batch size, in
turn (A B A B ...), after a warm-up of each. The clock covers training alone: no loading,
tokenizing or scoring. Without --model-name a random encoder of MiniLM-L6's size (22M) is used.
"""

import argparse
import os
from collections.abc import Callable

import torch
from common import (
    LENGTH,
    Ours,
    examples,
    make_parser,
    ratio,
    seconds,
    setup,
    spread,
    train_biases,
)
from transformers import PreTrainedModel

from bitfit.data.tokens import TokenizedSplit


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__, rows=256)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    return parser.parse_args()


def released_pass(model: PreTrainedModel, rows: dict[str, torch.Tensor], batch_size: int) -> None:
    """Train one epoch as the released code does; `rows` are padded tensors on the device."""
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


def make_released(
    model: PreTrainedModel, tokens: TokenizedSplit, batch_size: int
) -> Callable[[], float]:
    """Return a function that trains one epoch as the released code does and returns its seconds."""
    device = tokens.ids.device
    train_biases(model.to(device))
    columns: dict[str, list] = {"input_ids": [], "attention_mask": [], "token_type_ids": []}
    for row in examples(tokens):
        ids = row["input_ids"]
        left = LENGTH - len(ids)
        columns["input_ids"].append(ids + [tokens.pad_id] * left)
        columns["attention_mask"].append([1] * len(ids) + [0] * left)
        columns["token_type_ids"].append(row.get("token_type_ids", [0] * len(ids)) + [0] * left)
    if tokens.types is None:
        del columns["token_type_ids"]
    rows = {name: torch.tensor(values, device=device) for name, values in columns.items()}
    rows["labels"] = tokens.labels
    return lambda: seconds(lambda: released_pass(model, rows, batch_size), device)


def main() -> None:
    args = parse_args()
    task, _, make_model, tokens, _ = setup(args)
    device, count = tokens.ids.device, len(tokens.lengths)
    released = make_released(make_model(), tokens, args.batch_size)
    ours = Ours(make_model().to(device), tokens, task, batch_size=args.batch_size, runs=1)
    print(f"padding: released {1 - tokens.lengths.sum() / (LENGTH * count):.0%}, ours none")
    released()
    for precision in args.precision:
        ours.epoch(precision)
        pairs = [(released(), ours.epoch(precision)) for _ in range(args.rounds)]
        theirs, mine = (spread([count / pair[i] for pair in pairs]) for i in (0, 1))
        print(
            f"released fp32 {theirs} ex/s | ours {precision} {mine} ex/s | ratio {ratio(pairs)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
