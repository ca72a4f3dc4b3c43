"""CUDA graphs: a function's kernels recorded once and launched together, where launching them one by one is slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

WARM_UP = 3  # runs before recording, in which libraries choose and load their kernels
KEPT = 4  # recordings of a model: of its batch sizes


class Recorded:
    """``function`` of tensors, recorded for tensors of these shapes; returns copies.

    The function must do the same for any values: no value may reach the host.
    """

    def __init__(self, function: Callable[..., Tensor], *examples: Tensor) -> None:
        self.inputs = [example.clone() for example in examples]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(*self.inputs)

    def __call__(self, *values: Tensor) -> Tensor:
        for own, value in zip(self.inputs, values, strict=True):
            own.copy_(value)
        self.graph.replay()
        return self.output.clone()


_recordings: WeakKeyDictionary[nn.Module, dict[Any, Recorded]] = WeakKeyDictionary()


def recorded(module: nn.Module, z: Tensor, t: Tensor) -> Recorded:
    """The recording of ``module`` (z, t) for tensors like these; made at the first call and kept with the module.

    It is made again where the module was moved or compiled, or its weights are other tensors. (Values may change.)
    """
    places = tuple(x.data_ptr() for x in (*module.parameters(), *module.buffers()))
    compiled = id(module._compiled_call_impl)
    key = (z.shape, z.dtype, t.shape, module.training, compiled, places)
    kept = _recordings.setdefault(module, {})
    if key not in kept:
        while len(kept) >= KEPT:
            del kept[next(iter(kept))]
        kept[key] = Recorded(module, z, t)
    return kept[key]
