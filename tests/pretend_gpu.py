"""A GPU that is pretended on a CPU: it computes, refuses mixed devices, and counts waits.

Its tensors wrap tensors of the CPU. A wait is where the CPU stands still until a GPU has done all
that it was told to do.
"""

import linecache
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
OURS = "this project"
LIBRARIES = ("accelerate", "transformers", "whisper")
REASONS = {
    aten._local_scalar_dense: "a value is read",
    # how many there are, a GPU can say only when it is done
    aten.nonzero: "non-zeros are counted",
    aten.masked_select: "what a mask selects is counted",
    aten._unique2: "different values are counted",
    aten.unique_dim: "different values are counted",
    aten.unique_consecutive: "different values are counted",
    # their kernels for GPUs copy the lengths
    aten._ctc_loss: "torch's kernel of the CTC loss",
    aten._ctc_loss_backward: "torch's kernel of the CTC loss, backward",
}
KERNELS = {aten._ctc_loss, aten._ctc_loss_backward}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class GpuTensor(Tensor):
    """A tensor on the pretended GPU, whose values are those of `values`, on the CPU.

    C++ is told that it is on the device "meta", which needs no driver.
    """

    is_cuda = True
    is_meta = False
    device = DEVICE

    @staticmethod
    def __new__(cls, values: Tensor):
        options = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        options |= {"dtype": values.dtype, "device": "meta"}
        return Tensor._make_wrapper_subclass(cls, values.shape, **options)

    def __init__(self, values: Tensor):
        self.values = values

    def tolist(self) -> list:
        return self.cpu().tolist()

    def new_tensor(self, values, dtype=None, device=DEVICE) -> Tensor:
        return torch.tensor(values, dtype=dtype or self.dtype, device=device)

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(map(make_index, parts)))

    def __repr__(self, **options) -> str:
        return f"GpuTensor({self.values})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), options=None):
        raise RuntimeError(f"{function} of a tensor on a pretended GPU that is gone")


@dataclass
class Wait:
    """Why the CPU waits, whose code makes it wait, and the lines that lead there."""

    reason: str
    owner: str  # OURS, or the name of a library
    places: list[str]  # the innermost first

    def __str__(self) -> str:
        return f"{self.owner}: {self.reason}: {self.places[0]}"


class PretendGpu(TorchDispatchMode):
    """Within it there is a GPU, DEVICE; `waits` are those for it so far."""

    def __init__(self):
        super().__init__()
        self.waits: list[Wait] = []

    def __enter__(self):
        self.before = (
            torch.cuda._lazy_init,
            torch._C._only_lift_cpu_tensors(),
            torch.__future__.get_swap_module_params_on_conversion(),
        )
        start = torch.cuda._lazy_init
        if not torch.cuda.is_available():
            start = start_nothing
        # shows torch.tensor(..., device=DEVICE), and keeps the class of modules' parameters
        self.configure(start, lifts=True, swaps=True)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.configure(*self.before)

    def configure(self, start, lifts: bool, swaps: bool) -> None:
        torch.cuda._lazy_init = start
        torch._C._set_only_lift_cpu_tensors(lifts)
        torch.__future__.set_swap_module_params_on_conversion(swaps)

    def __torch_dispatch__(self, function, types, args=(), options=None):
        options = options or {}
        operation = function.overloadpacket
        if operation is aten._use_cudnn_ctc_loss:
            return False
        tensors = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
        on_gpu = any(isinstance(x, GpuTensor) for x in tensors)
        if options.get("device") is not None:
            from_gpu, on_gpu = on_gpu, options["device"].type in ("cuda", "meta")
            options = {**options, "device": torch.device("cpu")}
        elif operation is aten.copy_:
            from_gpu, on_gpu = (isinstance(x, GpuTensor) for x in (args[1], args[0]))
        else:
            from_gpu = on_gpu
            if on_gpu:
                check_devices(function, args, tensors)
        reason = find_reason(operation, args, options, from_gpu, on_gpu)
        if reason is not None:
            wait = make_wait(reason)
            if operation in KERNELS:
                wait.owner = "torch"
            self.waits.append(wait)

        wrappers = {id(x.values): x for x in tensors if isinstance(x, GpuTensor)}
        args, options = tree_map(unwrap, (args, options))
        values = function(*args, **options)

        def wrap(x):
            if not on_gpu or not isinstance(x, Tensor):
                return x
            if id(x) in wrappers:  # computed in place
                return wrappers[id(x)]
            return GpuTensor(x)

        return tree_map(wrap, values)


def start_nothing() -> None:
    """In place of the start of CUDA, which would look for a driver."""


def make_index(part):
    if isinstance(part, list):
        return torch.tensor(part)
    return part


def unwrap(x):
    if isinstance(x, GpuTensor):
        return x.values
    assert not is_empty_shell(x), "torch made a tensor without values, past PretendGpu"
    return x


def is_empty_shell(x) -> bool:
    return isinstance(x, Tensor) and x.is_meta


def check_devices(function, args, tensors: list[Tensor]) -> None:
    """Refuse mixed devices, but for numbers, indices and CTC's lengths, as torch does."""
    free = on_any_device(function.overloadpacket, args)
    for x in tensors:
        if not isinstance(x, GpuTensor) and x.dim() > 0 and id(x) not in free:
            raise RuntimeError(f"{function}: some tensors are on {DEVICE} and some on the CPU")


def on_any_device(operation, args) -> set[int]:
    """The ids of arguments that torch also takes from the CPU."""
    if operation in INDEXING and isinstance(args[0], GpuTensor):
        return {id(x) for x in args[1]}
    if operation is aten._ctc_loss:
        return {id(x) for x in args[2:4]}
    if operation is aten._ctc_loss_backward:
        return {id(x) for x in args[3:5]}
    return set()


def find_reason(operation, args, options, from_gpu: bool, on_gpu: bool) -> str | None:
    """Why the CPU waits for this operation, or None."""
    if from_gpu and not on_gpu:
        return "a copy to the CPU"
    if on_gpu and not from_gpu and operation in (aten._to_copy, aten.copy_):
        return find_copy_reason(operation, args, options)
    if on_gpu and operation in INDEXING:
        return find_index_reason(args[1])
    if on_gpu:
        return REASONS.get(operation)
    return None


def find_copy_reason(operation, args, options) -> str | None:
    source = args[0] if operation is aten._to_copy else args[1]
    if source.numel() == 0 or options.get("non_blocking") or args[2:] == (True,):
        return None
    return "a copy from the CPU"


def find_index_reason(indices) -> str | None:
    for index in indices:
        if index is None:
            continue
        if not isinstance(index, GpuTensor):
            return "an index is copied from the CPU"
        if index.dtype in (torch.bool, torch.uint8):
            return "what a mask selects is counted"
    return None


def make_wait(reason: str) -> Wait:
    """A wait for what runs now; frames of torch and of this file say nothing."""
    owner = OURS
    places = []
    for frame, number in traceback.walk_stack(None):
        library = frame.f_globals["__name__"].split(".")[0]
        if library in ("torch", "pretend_gpu"):
            continue
        if not places and library in LIBRARIES:
            owner = library
        path = frame.f_code.co_filename
        line = linecache.getline(path, number).strip()
        places.append(f"{Path(path).name}:{number}: {line}")
    return Wait(reason, owner, places)
