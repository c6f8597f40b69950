"""A simulated GPU: real numbers on the CPU, but what CUDA would reject is rejected.

    with simulated_gpu() as gpu:
        run_glue.main([...])
    gpu.copies, gpu.waits

Every tensor lies in the host's memory. A tensor that the program puts on `cuda:0` is noted, by its
storage, as lying there: it says so when asked for its device, and it may not meet tensors of the
host in one operation, become an array, or be filled from a generator of the host. The backward pass
is checked too. FakeTensorMode cannot do that: without CUDA, autograd has no queue for its devices.

Not simulated: kernels that CUDA lacks for a type, the order of sums, memory, time, and streams.
"""

import collections
import contextlib
import sys
import types
from unittest import mock

import torch
from plain_attention import plain_varlen_kernel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
Tensor, aten = torch.Tensor, torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}  # between any two devices
INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
# Elsewhere tensors of the host without dimensions may meet a GPU's; not in these.
NO_SCALARS = {"index_select", "index_add", "index_copy", "mm", "bmm", "addmm", "addmm_", "baddbmm",
              "cat", "gather", "scatter", "embedding", "native_layer_norm"}  # fmt: skip
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2"}


class RejectedByCUDA(RuntimeError):
    """What CUDA would refuse."""


class GPU:
    """Which storages lie on the GPU, which copies were made, what made the host wait."""

    def __init__(self):
        self.storages, self.factories = {}, 0
        self.clear()

    def clear(self):
        self.copies: list[tuple] = []
        self.waits: collections.Counter[str] = collections.Counter()

    def has(self, tensor):
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self.storages

    def put(self, tensor):
        if len(self.storages) > 20_000:
            self.storages = {k: r for k, r in self.storages.items() if not r.expired()}
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        # The weak reference keeps its number from being given to another storage.
        self.storages[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def wait(self, cause):
        self.waits[f"{cause} at {project_line()}"] += 1


def project_line():
    """The innermost line of the project on the stack."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame:
        name = frame.f_code.co_filename
        if "/bitfit/" in name or name.endswith(("run_glue.py", "glue_evaluator.py")):
            return f"{name.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class Functions(TorchFunctionMode):
    """Devices as attributes, moves, factories, and what leaves torch."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, gpu = dict(kwargs or {}), self.gpu
        first = args[0] if args and isinstance(args[0], Tensor) else None
        on = first is not None and gpu.has(first)
        if function == Tensor.device.__get__:
            return CUDA if on else function(*args)
        if function == Tensor.is_cuda.__get__:
            return on
        if function == Tensor.is_cpu.__get__:
            return not on
        if function in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self.move(function, *args, **kwargs)
        if function in (Tensor.numpy, Tensor.__array__) and on:
            raise RejectedByCUDA(f"a tensor on cuda:0 as an array: {project_line()}")
        if function in (Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__,
                        Tensor.__float__, Tensor.__index__) and on:  # fmt: skip
            gpu.wait(function.__name__)
        kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return function(*args, **kwargs)
        gpu.factories += 1
        try:
            made = function(*args, **kwargs | {"device": CPU})
        finally:
            gpu.factories -= 1
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                gpu.put(tensor)
        if function in (torch.tensor, torch.as_tensor):
            gpu.wait(f"{function.__name__}(device=cuda)")
        return made

    def move(self, function, tensor, *args, **kwargs):
        gpu, on, dtype = self.gpu, self.gpu.has(tensor), None
        blocking = not kwargs.get("non_blocking", False)
        if function is not Tensor.to:
            target = CPU if function is Tensor.cpu else CUDA
        elif args and isinstance(args[0], Tensor):
            target, dtype = (CUDA if gpu.has(args[0]) else CPU), args[0].dtype
        else:
            copy = kwargs.pop("copy", False)
            target, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
            if target is None and not copy:
                return function(tensor, dtype) if dtype else tensor
        to_gpu = target is not None and target.type == "cuda"
        if target is None or to_gpu == on:
            return tensor if dtype in (None, tensor.dtype) else tensor.to(dtype)
        moved = tensor.to(dtype or tensor.dtype).clone()
        gpu.copies.append(("to the GPU" if to_gpu else "to the host", project_line()))
        if to_gpu:
            gpu.put(moved)
            if blocking:
                gpu.wait("a copy to the GPU")
        else:
            with torch._C.DisableTorchFunction():
                gpu.storages.pop(moved.untyped_storage()._cdata, None)
            gpu.wait("a copy to the host")
        return moved


class Operations(TorchDispatchMode):
    """Which tensors meet, in the backward pass too."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, gpu = kwargs or {}, self.gpu
        with torch._C.DisableTorchFunction():
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            there = [gpu.has(x) for x in tensors]
            if any(there):
                self.check(function, args, kwargs, tensors, there)
            out = function(*args, **kwargs)
            if (any(there) or gpu.factories) and function is not aten.copy_.default:
                for tensor in tree_leaves(out):
                    if isinstance(tensor, Tensor):
                        gpu.put(tensor)
        return out

    def check(self, function, args, kwargs, tensors, there):
        gpu, name = self.gpu, function.overloadpacket.__name__
        sources = [kwargs.get("generator"), *args]
        generator = next((a for a in sources if isinstance(a, torch.Generator)), None)
        if generator is not None and generator.device.type == "cpu":
            raise RejectedByCUDA(f"{function} with a generator of the host: {project_line()}")
        if name in WAITS:
            gpu.wait(name)
        if function in COPIES:
            if not all(there) and function is aten.copy_.default:
                gpu.copies.append(("to the GPU" if there[0] else "to the host", project_line()))
                non_blocking = bool(args[2]) if len(args) > 2 else False
                if not (there[0] and non_blocking):
                    gpu.wait("a copy_ between devices")
            return
        if name in INDEXED:
            self.check_index(function, args, there)
            return
        strangers = [x for x, on in zip(tensors, there, strict=True) if not on]
        if any(x.dim() or name in NO_SCALARS for x in strangers):
            raise RejectedByCUDA(f"{function} with tensors of two devices: {project_line()}")

    def check_index(self, function, args, there):
        places = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
        if not there[0]:
            raise RejectedByCUDA(f"{function}: only the index is on the GPU: {project_line()}")
        if any(x.dtype in (torch.bool, torch.uint8) for x in places):
            self.gpu.wait("an index by a mask")
        if not all(map(self.gpu.has, places)):
            self.gpu.wait("an index on the host")
        values = args[2] if len(args) > 2 else None
        if isinstance(values, Tensor) and values.dim() and not self.gpu.has(values):
            raise RejectedByCUDA(f"{function}: values on the host: {project_line()}")


class Kernel(torch.autograd.Function):
    """`plain_varlen_kernel` as one operation of the GPU, which waits for nothing."""

    @staticmethod
    def forward(ctx, query, key, value, gpu, *rest):
        ctx.gpu, ctx.rest = gpu, rest
        ctx.inputs = query, key, value
        with plainly():
            return gpu.put(plain_varlen_kernel(query, key, value, *rest))

    @staticmethod
    def backward(ctx, grad):
        with plainly(), torch.enable_grad():
            detached = [x.detach().requires_grad_() for x in ctx.inputs]
            torch.manual_seed(0)  # another dropout mask than forward: nothing compares these
            out = plain_varlen_kernel(*detached, *ctx.rest)
            grads = torch.autograd.grad(out, detached, grad)
        return *map(ctx.gpu.put, grads), None, None, None, None, None


@contextlib.contextmanager
def plainly():
    """Within: nothing is simulated."""
    modes = torch.utils._python_dispatch._disable_current_modes()
    with torch._C.DisableTorchFunction(), modes:
        yield


@contextlib.contextmanager
def simulated_gpu():
    gpu, state = GPU(), torch.zeros(16, dtype=torch.uint8)
    groups = torch.optim.Optimizer._group_tensors_by_device_and_dtype

    def groups_by_device(lists, with_indices=False):
        return {
            (CUDA if gpu.has(group[0][0][0]) else device, dtype): group
            for (device, dtype), group in groups(lists, with_indices).items()
        }

    def capture(work, pool=None):  # what CUDA repeats is the same work on the same tensors
        result = work()
        return lambda: result.copy_(work()), result

    patches = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.device": lambda *_: contextlib.nullcontext(),
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.get_device_name": lambda *_: "a simulated GPU",
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.cuda.get_rng_state": lambda *_: state.clone(),
        "torch.cuda.set_rng_state": lambda new, *_: None,
        "torch.cuda.max_memory_allocated": lambda *_: 0,
        "torch.cuda.memory_allocated": lambda *_: 0,
        "torch.cuda.memory_reserved": lambda *_: 0,
        "torch.cuda.mem_get_info": lambda *_: (2**33, 2**34),
        "torch.cuda.reset_peak_memory_stats": lambda *_: None,
        "torch.cuda.graph_pool_handle": lambda: None,
        "torch.cuda.is_current_stream_capturing": lambda: False,
        "bitfit.training.graphs.capture_on_gpu": capture,
        "bitfit.model.attention.varlen_kernel": lambda q, k, v, **options: Kernel.apply(
            q,
            k,
            v,
            gpu,
            *options.values(),  # in the order of the parameters
        ),
        "torch.optim.Optimizer._group_tensors_by_device_and_dtype": staticmethod(groups_by_device),
    }
    with contextlib.ExitStack() as held:
        for name, value in patches.items():
            held.enter_context(mock.patch(name, value))
        held.enter_context(Operations(gpu))
        held.enter_context(Functions(gpu))
        yield gpu
