"""The program on a simulated GPU: what CUDA would reject or wait for, at the line where it is.

`benchmarks/gpu.sh` does the same on a real one.
"""

import json
import signal

import numpy as np
import pytest
import torch
from conftest import GLUE, TINY_BERT, forward_of
from moments import at_file, at_passes, send
from simulated_gpu import CUDA, RejectedByCUDA, simulated_gpu

import run_glue
from bitfit.data import splits
from bitfit.data.tasks import TASKS
from bitfit.data.tokens import Split, tokenize
from bitfit.model import attention, loading
from bitfit.model.forward_trials import select_forward
from bitfit.model.predict import predict_runs
from bitfit.model.run import Run
from bitfit.model.run_stack import RunStack
from bitfit.model.token_budget import TokenBudget
from bitfit.model.trainable import select_trainable
from bitfit.options import FINE_TUNE_TYPES
from bitfit.training import loop, memory
from bitfit.training.graphs import USES_BEFORE_CAPTURE
from bitfit.training.plan import Plan, TrainOptions
from bitfit.training.state import init_state
from glue_evaluator import GLUEvaluator

COLA = TASKS["cola"]
FLAGS = ["-t", "cola", "-m", str(TINY_BERT), "--data-dir", str(GLUE), "--train-size", "16", "-e",
         "2", "-q"]  # fmt: skip
STACKED = ("bitfit", "frozen")


def command(folder, *flags):
    return run_glue.main(["-o", str(folder), *FLAGS, *flags])


def new_state(method, count, dtype, packed):
    """A training of the tiny BERT on the simulated GPU, of `count` runs."""
    model, _ = loading.load_model(str(TINY_BERT), COLA)
    model.to(CUDA)
    texts = splits.read_split(COLA, "train", GLUE).take(range(24))
    tokens = tokenize(texts, loading.load_tokenizer(str(TINY_BERT)), 48).to(CUDA)
    forward = select_forward(model, "tiny", tokens, dtype) if packed else forward_of(model, False)
    kind = "bitfit" if method == "mixed" else method
    trainable = select_trainable(model, kind, ["bias"] if kind == "bitfit" else [], 1000,
                    np.random.default_rng(0))  # fmt: skip
    runs = [Run(1e-3, seed) for seed in range(count)]
    frozen = select_trainable(model, "frozen")
    # In a mixed stack, every second run trains the classifier alone.
    selections: list[tuple] = [(frozen if k % 2 else trainable, {}) for k in range(count)]
    selections = selections if method == "mixed" else []
    stack = RunStack(model, trainable, runs, loading.init_head, selections=selections)
    split = Split(tokens, dict.fromkeys(range(count), np.arange(24)))
    plan = Plan(COLA, forward, split, {}, TokenBudget(2000, CUDA), TrainOptions(8, 9))
    return init_state(plan, stack)


def train_steps(state, count):
    rows = np.stack([np.arange(8) + k for k in range(len(state.stack.runs))])
    for _ in range(count):
        loop.train_step(state, np.arange(len(rows)), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "count"),
    [(method, n) for method in FINE_TUNE_TYPES for n in ((1, 3) if method in STACKED else (1,))]
    + [("mixed", 4)],
)
def test_a_packed_step_waits_for_nothing_and_needs_one_copy(method, count, dtype):
    with simulated_gpu() as gpu:
        state = new_state(method, count, dtype, packed=True)
        before = state.stack.params.clone()
        assert state.plan.forward.packed_encoder and state.plan.forward.uses_varlen == (
            dtype != torch.float
        )
        with state.stack.patched(dtype):
            state.graphs = loop.step_graphs(state)
            assert bool(state.graphs) == state.plan.forward.uses_varlen
            train_steps(state, 1)  # makes the optimizer's state
            gpu.clear()
            train_steps(state, USES_BEFORE_CAPTURE - 1)
            assert not gpu.waits
            assert len(gpu.copies) == USES_BEFORE_CAPTURE - 1
            if state.graphs:
                train_steps(state, 1)  # copies once to capture a graph, and once to use it
                gpu.clear()
                train_steps(state, 1)
                assert len(state.graphs.graphs) == 1 and not gpu.waits and len(gpu.copies) == 1
            rows = {k: np.arange(5) for k in range(count)}
            found = dict(predict_runs(state.plan.forward, state.stack, state.plan.train.tokens,
                                      state.plan.token_budget, rows))  # fmt: skip
        assert state.stack.params.device == CUDA
        assert (state.stack.params != before).any()
    assert all(np.isfinite(logits).all() and len(logits) == 5 for logits in found.values())


@pytest.mark.parametrize("broken", [torch.zeros_like, torch.logdet])
def test_the_grouped_attention_where_flashattention_fails(broken):
    """In bf16 alone: one that gives wrong numbers, and one that cannot run."""
    with simulated_gpu(), pytest.MonkeyPatch.context() as patch:
        kernel = attention.varlen_kernel

        def only_in_float32(*tensors, **options):
            out = kernel(*tensors, **options)
            return out if out.dtype == torch.float32 else broken(out)

        patch.setattr(attention, "varlen_kernel", only_in_float32)
        state = new_state("bitfit", 3, torch.bfloat16, packed=True)
        assert state.plan.forward.packed_encoder and not state.plan.forward.uses_varlen


def test_flashattention_is_tried_on_several_sequences_in_bf16():
    with simulated_gpu(), pytest.MonkeyPatch.context() as patch:
        kernel = attention.varlen_kernel

        def mixes_sequences(query, key, value, cu_seqlens, **options):
            out = kernel(query, key, value, cu_seqlens=cu_seqlens, **options)
            several = len(cu_seqlens[1]) > 2 and out.dtype != torch.float32
            return torch.zeros_like(out) if several else out

        patch.setattr(attention, "varlen_kernel", mixes_sequences)
        state = new_state("bitfit", 3, torch.bfloat16, packed=True)
        assert state.plan.forward.packed_encoder and not state.plan.forward.uses_varlen


def test_a_limit_lowered_to_the_free_memory_is_logged(caplog):
    caplog.set_level("INFO", "bitfit")
    with simulated_gpu():
        state = new_state("bitfit", 1, torch.bfloat16, packed=True)
        with state.stack.patched(torch.bfloat16):
            memory.fit_token_budget_to_memory(state, 2**33)
            assert "--max-tokens" not in caplog.text
            memory.fit_token_budget_to_memory(state, 2**21)
    assert state.plan.token_budget.max_tokens < 2000
    assert f"--max-tokens {state.plan.token_budget.max_tokens}: more does not fit" in caplog.text


def test_graphs_give_their_memory_back_where_it_runs_out():
    with simulated_gpu():
        state = new_state("bitfit", 1, torch.bfloat16, packed=True)
        with state.stack.patched(torch.bfloat16):
            state.graphs = loop.step_graphs(state)

            def fail(number, ids):
                if number == 1:
                    raise torch.OutOfMemoryError("CUDA out of memory")

            with at_passes(fail, evaluation=True):
                train_steps(state, 1)
        assert state.graphs is None and state.plan.token_budget.max_tokens == 1000


@pytest.mark.parametrize("count", [1, 3])
def test_padded_steps(count):
    with simulated_gpu():
        state = new_state("bitfit", count, torch.bfloat16, packed=False)
        with state.stack.patched(torch.bfloat16):
            assert loop.step_graphs(state) is None
            train_steps(state, 2)


@pytest.mark.parametrize(
    ("method", "flags"),
    [("bitfit", ["--predict-test", "--export-model"]), ("full_ft", []),
     ("frozen", ["-s", "0", "1", "--precision", "fp32"]), ("rand_uniform", []),
     ("rand_row_col", ["--precision", "fp32"])],
)  # fmt: skip
def test_commands(method, flags, tmp_path, capsys):
    with simulated_gpu():
        assert command(tmp_path / "out", "-f", method, "--save-evaluator", *flags) == 0
        folder = next((tmp_path / "out").rglob("evaluator"))
        loaded = GLUEvaluator.load(folder, gpu_device=0)
        scores = loaded.evaluate("validation")
    assert json.loads((tmp_path / "out/args.json").read_text())["device"] == "a simulated GPU"
    assert scores["MCC"] == loaded.evaluations["validation"]["MCC"][-1]
    capsys.readouterr()


def test_a_sweep_stopped_and_resumed(tmp_path, capsys):
    flags = ["-f", "bitfit", "-l", "1e-3", "2e-3", "--keep", "best"]
    with simulated_gpu():
        with at_file("checkpoints/*.json", 1, send(signal.SIGTERM)):
            assert command(tmp_path / "out", *flags) == 128 + signal.SIGTERM
        assert command(tmp_path / "out", *flags, "--resume") == 0
    found = sorted((tmp_path / "out").rglob("metrics.json"))
    assert [len(json.loads(path.read_text())["train_loss"]) for path in found] == [2, 2]
    capsys.readouterr()


def test_what_cuda_rejects_is_found():
    """Draws from a generator of the host, tensors on two devices, and waits for values."""
    with simulated_gpu() as gpu:
        weights = torch.ones(3, 4).to(CUDA)
        gpu.clear()
        with pytest.raises(RejectedByCUDA, match="generator of the host"):
            torch.nn.init.normal_(weights, generator=torch.Generator().manual_seed(0))
        with pytest.raises(RejectedByCUDA, match=r"on the host|two devices"):
            weights @ torch.ones(4, 2)
        assert not gpu.waits
        assert weights.norm().item() > 0
        assert any("item" in wait for wait in gpu.waits)
