"""The state of one training: all that changes from step to step, and how it is serialized."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack
from bitfit.model.token_budget import random_state, set_random_state
from bitfit.training.graphs import StepGraphs
from bitfit.training.plan import Plan
from utils import CorruptFile, as_list

TIMERS = ("training", "evaluation", "checkpoints")


@dataclass
class Record:
    """The measurements of one run beside its scores."""

    run: Run
    train_loss: list[float] = field(default_factory=list)  # per epoch
    # A run's share of the time of all runs.
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TIMERS, 0.0))
    diverged: str | None = None  # where the loss or gradient was not finite
    stopped: str | None = None  # after which epoch and why, by `stop_worse_half`


@dataclass
class TrainState:
    """One training: its plan, and all that changes from step to step.

    K runs train n values each; C is the number of labels.
    """

    plan: Plan
    stack: RunStack  # the trained values, their gradients, and which runs have ended
    optimizer: torch.optim.Optimizer
    optimized: list[torch.nn.Parameter]  # of each group of runs, see `init_state`
    rates: torch.Tensor  # (K,) the learning rates of this step
    records: list[Record]  # of each run
    scores: list[tuple]  # (name of the run, epoch, split, metric, value)
    logits: dict[str, np.ndarray]  # {validation split: (evaluations, K, labels, C)}, NaN if missing
    best: torch.Tensor | None  # (K, n) values at each run's best evaluation, if they are kept
    loss_sum: torch.Tensor  # (K,) over the labels of this epoch: of examples, or of words
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the next epoch
    seconds: float = 0.0  # of training in this epoch
    graphs: StepGraphs | None = None  # whole steps as CUDA graphs

    @property
    def evaluation_count(self) -> int:
        """Return the number of evaluations so far."""
        return len({epoch for _, epoch, *_ in self.scores})

    def state_dict(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return (metadata for JSON, tensors on the host) that `load_state_dict` needs.

        They include the random generators. All ranks of the group call it together.
        """
        tensors = {"values": self.stack.params, "bad_step": self.stack.last_step}
        tensors["loss_sum"] = self.loss_sum
        if self.best is not None:
            tensors["best"] = self.best
        for k, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{k}.{name}": value for name, value in slots.items()}
        for split, logits in self.logits.items():
            tensors[f"logits.{split}"] = torch.from_numpy(logits[: self.evaluation_count])
        group = self.plan.group
        generators = group.all_gather(random_state(self.stack.params.device))
        tensors |= {f"random.{i}": generator for i, generator in enumerate(generators)}
        limits = group.all_gather([torch.tensor([self.plan.token_budget.max_tokens])])
        metadata = {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "scores": self.scores,
            "max_tokens": [limit.item() for limit in limits],
            "records": [asdict(record) for record in self.records],
        }
        host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return metadata, host

    def load_state_dict(self, metadata: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Load what `state_dict` returned for the same runs on the same model.

        Raises:
            CorruptFile: it belongs to other runs or to another model; nothing has changed.
        """
        stack = self.stack
        records = [
            Record(**record | {"run": Run(*record["run"])}) for record in metadata["records"]
        ]
        if [r.run for r in records] != stack.runs or tensors["values"].shape != stack.params.shape:
            raise CorruptFile("it is of other runs or another model")
        stack.params.copy_(tensors["values"])
        stack.last_step.copy_(tensors["bad_step"])
        if self.best is not None:
            self.best.copy_(tensors["best"])
        self._load_optimizer(tensors)
        self._load_random_state(tensors)
        group, budget = self.plan.group, self.plan.token_budget
        budget.max_tokens = min(budget.max_tokens, as_list(metadata["max_tokens"])[group.rank])
        self.records = records
        self.loss_sum.copy_(tensors["loss_sum"])
        self.scores = [tuple(score) for score in metadata["scores"]]
        for split, logits in self.logits.items():
            saved = tensors[f"logits.{split}"].numpy()
            logits[: len(saved)] = saved
        self.epoch, self.step = metadata["epoch"], metadata["step"]
        self.seconds = metadata["seconds"]

    def _load_optimizer(self, tensors: dict[str, torch.Tensor]) -> None:
        device = self.stack.params.device
        for k, param_group in enumerate(self.optimizer.param_groups):
            prefix = f"optimizer.{k}."
            slots = {
                name.removeprefix(prefix): tensor.to(device)
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            if slots:
                self.optimizer.state[param_group["params"][0]] = slots

    def _load_random_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Set the random generators of this rank: each rank has saved equally many."""
        group = self.plan.group
        count = sum(name.startswith("random.") for name in tensors) // group.size
        first = group.rank * count
        generators = [tensors[f"random.{first + i}"] for i in range(count)]
        set_random_state(self.stack.params.device, generators)


def init_state(plan: Plan, stack: RunStack, optimizer: str = "adamw") -> TrainState:
    """Return the `TrainState` before the first step.

    AdamW has no weight decay and eps 1e-6, as the released code's `transformers.AdamW` had. One
    kernel updates all runs of a group, but knows one learning rate. Without decay a step is
    proportional to it. So the optimizer updates zeros at rate 1, and `optimizer_step` multiplies
    the result by the rate of each run.
    """
    is_single, rates = len(stack.runs) == 1, torch.zeros_like(stack.params[:, 0])
    # On a CPU the optimizer multiplies by a tensor in float64; on a GPU it reads only float32.
    rates = rates.double() if rates.device.type == "cpu" else rates
    optimized = []
    for group in stack.groups:
        values = stack.params[group.entries]
        param = torch.nn.Parameter(stack.params if is_single else torch.zeros_like(values))
        param.grad = stack.grads if len(stack.groups) == 1 else torch.zeros_like(values)
        optimized.append(param)
    make, settings = {
        "adamw": (torch.optim.AdamW, {"weight_decay": 0.0, "eps": 1e-6}),
        "adam": (torch.optim.Adam, {}),
    }[optimizer]
    settings["capturable"] = stack.params.is_cuda
    param_groups = [{"params": [param]} for param in optimized]
    return TrainState(
        plan=plan,
        stack=stack,
        optimizer=make(param_groups, lr=rates[0] if is_single else 1.0, fused=True, **settings),
        optimized=optimized,
        rates=rates,
        records=[Record(run) for run in stack.runs],
        scores=[],
        logits=plan.empty_logits(len(stack.runs)),
        best=stack.params.clone() if plan.options.keep == "best" else None,
        loss_sum=torch.zeros_like(stack.params[:, 0]),
    )
