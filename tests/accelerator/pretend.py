"""An accelerator that does not exist: torch runs the product's code on it and this file notes what the host waits for.

Tensors of the device ``pretend`` have shapes, types and a device, but no values; tensors of the host are real. So
every operation is dispatched as on a real device: what mixes the two fails, and what makes the host wait for the
device (a value read, a shape that depends on values, a copy to or from ordinary memory) is recorded with the line of
the product that asked for it. Values, the order of streams and the kernels' own limits are not shown.

It changes torch for the whole process, and takes functions of torch that may change with its version.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from automodel.distributed.runtime.stall_report import is_wait

NAME = "pretend"
ROOT = Path(__file__).parents[2]
_SHAPE_DEPENDS_ON_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
                            "repeat_interleave"}  # fmt: skip
_OF_DISPATCH = ("/torch/_compile.py", "/torch/_dynamo/", "/torch/_ops.py", "/torch/utils/", "/contextlib.py")


@dataclass(frozen=True)
class Wait:
    """One time that the host waits for the device.

    Attributes:
        what: the operation.
        callers: the functions of the product that asked for it, ``FILE:FUNCTION``, the innermost first.
        step: the step that the host is at, from 1.
        is_seen: whether the watchdog, which sees the innermost Python frame alone, takes it for a wait.
    """

    what: str
    callers: list[str]
    step: int
    is_seen: bool


class _WithoutKernels(FakeTensorMode):
    avoid_device_init = True  # nothing could fill a constant on the device


class Watch(TorchDispatchMode):
    """Runs what touches the device without values, and notes the waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self.collectives: list[str] = []
        self.num_steps = 0
        self._fake = _WithoutKernels(allow_non_fake_inputs=True)

    def __enter__(self) -> Watch:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is then a copy that is seen here
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        torch._C._set_only_lift_cpu_tensors(False)

    def note(self, what: str) -> None:
        """Note that the host waits, here."""
        frames = list(_frames(sys._getframe(1)))
        ours = [frame for frame in frames if Path(frame.f_code.co_filename).is_relative_to(ROOT / "automodel")]
        callers = [f"{_relative(frame)}:{frame.f_code.co_name}" for frame in ours]
        self.waits.append(Wait(what, callers, self.num_steps, bool(frames) and is_wait(frames[0])))

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it unwraps itself first
        kwargs = dict(kwargs or {})
        name = function.overloadpacket.__name__ if hasattr(function, "overloadpacket") else str(function)
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device.type == NAME]
        if kwargs.pop("pin_memory", None):  # there is no driver to pin it, and what will be copied there is 0
            return function(*args, **kwargs).zero_()
        if name in ("_pin_memory", "is_pinned"):
            return args[0] if name == "_pin_memory" else True
        if function.namespace in ("c10d", "_c10d_functional"):
            self.collectives.append(name)
        is_for_device = any(isinstance(leaf, torch.device) and leaf.type == NAME for leaf in leaves)
        if not on_device and not is_for_device:
            return function(*args, **kwargs)
        return self._run(name, function, args, kwargs, tensors)

    def _run(self, name: str, function: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
        if name == "_local_scalar_dense":
            self.note("a value is read")
            return False if tensors[0].dtype == torch.bool else (0.0 if tensors[0].dtype.is_floating_point else 0)
        if name in _SHAPE_DEPENDS_ON_VALUES or (name.startswith("index") and _has_mask(args)):
            self.note(f"the shape of {name} depends on values")
        if name == "_to_copy":
            target = torch.device(kwargs.get("device") or tensors[0].device)
            if not kwargs.get("non_blocking") and target.type != tensors[0].device.type:
                self.note("a copy to the host" if target.type == "cpu" else "a copy to the device")
            if target.type == "cpu" and tensors[0].device.type == NAME:
                return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        if name == "copy_" and tensors[0].device.type != tensors[1].device.type:
            is_to_host = tensors[0].device.type == "cpu"
            if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                self.note("a copy to the host" if is_to_host else "a copy to the device")
            if is_to_host:
                return args[0]
        with self._fake:
            return function(*args, **kwargs)


class Event:
    """An event; waiting for one that was recorded in an earlier step keeps nobody."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._step = -1

    def record(self, stream: Any = None) -> None:
        """Note when it was recorded."""
        self._step = _watch.num_steps

    def wait(self, stream: Any = None) -> None:
        """Do nothing: it is a stream that waits."""

    def query(self) -> bool:
        """Return whether the device has come so far."""
        return self._step < _watch.num_steps

    def synchronize(self) -> None:
        """Wait for it, after which it has happened."""
        if not self.query():
            _watch.note("an event of the same step")
        self._step = -1

    def elapsed_time(self, end: Event) -> float:
        """Return milliseconds between two events, which must both have happened."""
        assert end.query(), "torch raises here"
        return 250.0


class Stream:
    """A stream on which nothing is ever done."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Do nothing: it is a stream that waits."""

    def wait_event(self, event: Event) -> None:
        """Do nothing: it is a stream that waits."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event recorded now."""
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        """Wait for all that the stream was given."""
        _watch.note("a whole stream")


class _Backend:
    Event, Stream = Event, Stream
    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 8)
    current_device = staticmethod(lambda: 0)
    set_device = manual_seed_all = staticmethod(lambda *args: None)
    get_device_index = staticmethod(lambda *args, **options: 0)
    current_stream = staticmethod(lambda *args: Stream())
    stream = device = staticmethod(lambda *args: nullcontext())
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    get_rng_state = staticmethod(lambda *args: torch.zeros(16, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda *args: None)

    @staticmethod
    def synchronize(*args: Any) -> None:
        _watch.note("the whole device")


_watch = Watch()


def install() -> Watch:
    """Make the device known to this process, for good, and return what watches it."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    fallthrough = torch.library.Library("_", "IMPL")
    fallthrough.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _watch.kept = fallthrough
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers the backend "fake"

    dist.Backend.backend_capability["fake"].append(NAME)
    return _watch


@contextmanager
def job(world_size: int) -> Iterator[Any]:
    """Be rank 0 of ``world_size`` that do not exist; yields the DistInfo."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from automodel.distributed.runtime.dist_info import DistInfo

    dist.init_process_group(f"cpu:fake,{NAME}:fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield DistInfo("fake", 0, world_size, torch.device(NAME, 0), True)
    finally:
        dist.destroy_process_group()


def _has_mask(args: Any) -> bool:
    indices = tree_leaves(args[1:2])
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames from the innermost outwards, without those of this file and of torch's dispatch to it."""
    while frame is not None:
        if not any(part in frame.f_code.co_filename for part in (__file__, *_OF_DISPATCH)):
            yield frame
        frame = frame.f_back


def _relative(frame: FrameType) -> str:
    return str(Path(frame.f_code.co_filename).relative_to(ROOT / "automodel"))
