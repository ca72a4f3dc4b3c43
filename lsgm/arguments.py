"""Checks of the arguments that callers pass to the library: numbers, names, images and latents.

Each check returns its argument in the form that the library computes with, or raises :class:`LSGMError` with one line
that names the argument, what was expected and what was found.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lsgm.errors import LSGMError

LARGEST = 2**63 - 1  # largest seed, and largest length of a Python range
ROUNDING = 1e-3  # tolerance for values outside of their range: a quarter of the step between 256 levels


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Check that ``value`` is one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise LSGMError(f"{name}: expected one of {', '.join(allowed)}, found {_shown(value)}{hint}")


def check_device(name: object) -> torch.device:
    """An available device: cpu, cuda, cuda:1, mps ..."""
    try:
        device = torch.device(name)  # type: ignore[call-overload]
        torch.empty(1, device=device)
        usable = device.type != "meta"
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        usable = False
    if not usable:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise LSGMError(f"device: expected cpu{', or cuda' if gpus else ' (PyTorch finds no GPU)'}, found "
                        f"{_shown(name) if not isinstance(name, torch.device) else name}")  # fmt: skip
    return device


def check_known(names: Iterable[str], allowed: Sequence[str]) -> None:
    """Check that the ``names`` of keyword arguments are all among ``allowed``."""
    for name in names:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the arguments are {', '.join(allowed)}"
            raise LSGMError(f"{name}: unknown argument; {hint}")


def check_count(name: str, value: object) -> int:
    """A whole number of at least 1."""
    return _whole(name, value, 1, "of at least 1")


def check_seed(value: object, name: str = "seed") -> int:
    """A whole number from 0 to 2^63 - 1."""
    return _whole(name, value, 0, "from 0 to 2^63 - 1")


def check_tol(value: object) -> float:
    """The tolerance of an adaptive solver; its error control is meaningless above 1."""
    return _real("tol", value, "above 0 and at most 1", lambda tol: 0 < tol <= 1)


def check_time_eps(value: object) -> float:
    """The end time of the ODE near the data, where sigma_t must not vanish."""
    return _real("time_eps", value, "above 0 and below 1", lambda time_eps: 0 < time_eps < 1)


def check_temperature(value: object) -> float:
    """The factor of all normal noise; 0 gives the mode of each normal distribution."""
    return _real("temperature", value, "of at least 0", lambda factor: 0 <= factor <= sys.float_info.max)


def check_times(t0: object, t1: object) -> tuple[float, float]:
    """The start and end of an integration: two different finite times."""
    start, end = (_real(name, t, "that is finite", _is_finite) for name, t in (("t0", t0), ("t1", t1)))
    if start == end:
        raise LSGMError(f"t0, t1: expected two different times, found {start:g} twice")
    return start, end


def check_images(
    x: object, channels: int, sizes: Sequence[int], like: Tensor, *, binary: bool, gray: bool = True
) -> Tensor:
    """Images [B, channels, size, size] with values in [0, 1], in the dtype of ``like``.

    Accepts any floating-point dtype, uint8 (0..255), and bool if the images are ``binary``. Values that rounding left
    slightly outside of the range are clamped. Makes one pass over the values and one transfer to the host.

    Args:
        sizes: the allowed sizes, the usual one first.
        like: a weight of the model; the images must be on its device.
        binary: whether the model is for binary images.
        gray: whether images for a binary model may have values between 0 and 1, such as the means of samples.
    """
    gray = gray or not binary
    size = f"{channels}, {sizes[0]}, {sizes[0]}"
    expected = f"x: expected images [B, {size}] {'in [0, 1]' if gray else 'of zeros and ones'}"
    x = _tensor(expected, x, like)
    if x.dim() != 4 or tuple(x.shape[1:]) not in {(channels, side, side) for side in sizes}:
        raise LSGMError(f"{expected}, found the shape {list(x.shape)}{_shape_hint(x.shape, channels)}")
    if len(x) == 0:
        raise LSGMError(f"{expected}, found an empty batch")
    if not (x.is_floating_point() or x.dtype == torch.uint8 or (binary and x.dtype == torch.bool)):
        raise LSGMError(
            f"{expected}, found the type {x.dtype}; use floating-point numbers, or torch.uint8 for values from 0 to 255"
        )
    taken = x.to(like.dtype) / 255 if x.dtype == torch.uint8 else x.to(like.dtype)
    values = taken.detach()
    facts = [*values.aminmax()]
    if not gray:
        facts.append((values - values.round()).abs().max())
    low, high, *off = torch.stack(facts).tolist()  # NaN if any value is NaN
    if binary and x.dtype == torch.uint8 and round(255 * high) == 1:
        raise LSGMError(f"{expected}, found bytes of 0 and 1, but in uint8 the value 255 stands for 1; use x.bool()")
    if not (_is_finite(low) and _is_finite(high)):
        raise LSGMError(f"{expected}, found values that are not finite")
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise LSGMError(f"{expected}, found values from {low:.4g} to {high:.4g}; {_range_hint(low, high)}")
    if off and off[0] > ROUNDING:
        raise LSGMError(f"{expected}, found values in between; binarize them with torch.bernoulli(x) or x > 0.5")
    if off and off[0] > 0:
        return taken.round()
    return taken.clamp(0, 1) if low < 0 or high > 1 else taken


def check_latents(
    given: Mapping[str, object], shapes: Sequence[tuple[int, ...]], like: Tensor, batch: int | None = None
) -> list[Tensor]:
    """The tensors ``given`` by name, one for each of ``shapes``: [B, *shape], finite, in the dtype of ``like``.

    Args:
        like: a weight of the model; the tensors must be on its device.
        batch: B; None: the batch size of the first tensor.
    """
    taken: list[Tensor] = []
    for (name, value), shape in zip(given.items(), shapes, strict=True):
        size = ", ".join(map(str, shape))
        expected = f"{name}: expected a tensor [{'B' if batch is None else batch}, {size}]"
        tensor = _tensor(expected, value, like)
        if tensor.dim() != 1 + len(shape) or tensor.shape[1:] != shape or batch not in (None, len(tensor)):
            raise LSGMError(f"{expected}, found the shape {list(tensor.shape)}")
        batch = len(tensor)
        if batch == 0:
            raise LSGMError(f"{expected}, found an empty batch")
        if not tensor.is_floating_point():
            raise LSGMError(f"{expected} of floating-point numbers, found the type {tensor.dtype}")
        taken.append(tensor.to(like.dtype))
    finite = torch.stack([tensor.isfinite().all() for tensor in taken]).tolist() if taken else []
    for name, good in zip(given, finite, strict=True):
        if not good:
            raise LSGMError(f"{name}: expected finite values, found some that are not")
    return taken


def each(name: str, tensors: object, count: int) -> dict[str, object]:
    """Name each of a sequence of ``count`` tensors, for :func:`check_latents`."""
    if not isinstance(tensors, (list, tuple)) or len(tensors) != count:
        number = f" of {len(tensors)}" if isinstance(tensors, (list, tuple)) else ""
        raise LSGMError(f"{name}: expected a list of {count} tensors, found a {type(tensors).__name__}{number}")
    return {f"{name}[{i}]": tensor for i, tensor in enumerate(tensors)}


def _whole(name: str, value: object, least: int, expected: str) -> int:
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= LARGEST:
        raise LSGMError(f"{name}: expected a whole number {expected}, found {_shown(number)}")
    return number


def _real(name: str, value: object, expected: str, fits: Callable[[float], bool]) -> float:
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not fits(number):
        raise LSGMError(f"{name}: expected a number {expected}, found {_shown(number)}")
    return float(number)


def _is_finite(number: float) -> bool:
    return abs(number) <= sys.float_info.max


def _plain(value: object) -> object:
    """Convert NumPy scalars and zero-dimensional tensors to Python numbers."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _shown(value: object) -> str:
    """``value`` as quoted in a one-line message."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    return repr(value) if plain else f"a value of type {type(value).__name__}"


def _tensor(expected: str, value: object, like: Tensor) -> Tensor:
    """Check that ``value`` is a tensor on the device of ``like``."""
    if not isinstance(value, Tensor):
        hint = "; torch.from_numpy makes one" if type(value).__name__ == "ndarray" else ""
        raise LSGMError(f"{expected}, found {_shown(value)}{hint}")
    if value.device != like.device:
        raise LSGMError(f"{expected} on {like.device}, the model's device, found it on {value.device}; use .to(device)")
    return value


def _shape_hint(shape: torch.Size, channels: int) -> str:
    if len(shape) == 3:
        return f"; {'x[None]' if shape[0] == channels else 'x[:, None]'} adds a dimension"
    if len(shape) == 4 and shape[1] != channels and shape[3] == channels:
        return "; x.movedim(-1, 1) puts the channels first"
    return ""


def _range_hint(low: float, high: float) -> str:
    if low >= 0 and high <= 65535:
        return f"divide by {255 if high <= 255 else 65535}"
    if low >= -1 - ROUNDING and high <= 1 + ROUNDING:
        return "(x + 1) / 2 if they are in [-1, 1]"
    return "undo their normalization"
