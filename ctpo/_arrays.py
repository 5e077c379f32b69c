"""What the numerical modules share: namespaces, dtypes, input checks and scans over the last axis.

Everything here is written against the Python array API standard, so NumPy, torch, JAX and array-api-strict
take the same path. No function mutates its input.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from numbers import Real
from typing import Any

import array_api_compat

# The standard defines arrays, namespaces and dtypes by behavior, not by a common base class.
Array = Any
Namespace = Any
DType = Any


def _torch() -> Any:
    """The module torch if something has imported it, else None."""
    return sys.modules.get("torch")


def _torch_is_tracing() -> bool:
    """Whether torch.compile records what is done, so that looking at a value would break its graph."""
    torch = _torch()
    return torch is not None and torch.compiler.is_compiling()


def is_tensor(x: object) -> bool:
    """Whether `x` is torch's."""
    torch = _torch()
    return torch is not None and isinstance(x, torch.Tensor)


def is_array(x: object) -> bool:
    """Whether `x` is an array of NumPy, torch, JAX or another array API library."""
    # Tensors first: torch.compile warns of the caches on the general way.
    return is_tensor(x) or array_api_compat.is_array_api_obj(x)


def device(x: Array) -> Any:
    """Where the array is, to create others beside it."""
    return x.device if is_tensor(x) else array_api_compat.device(x)


def namespace(*, mask: Array | None = None, turn_ids: Array | None = None, **required: Array) -> Namespace:
    """Array API namespace common to the named arrays, of which mask and turn_ids may be None."""
    optional = {"mask": mask, "turn_ids": turn_ids}
    given = required | {name: x for name, x in optional.items() if x is not None}
    for name, x in given.items():
        if not is_array(x):
            raise ValueError(
                f"{name} must be an array of NumPy, torch, JAX or another array API library; got {type(x).__name__}"
            )
    if all(is_tensor(x) for x in given.values()):
        import array_api_compat.torch as torch_namespace

        return torch_namespace
    try:
        return array_api_compat.array_namespace(*given.values())
    except TypeError:
        kinds = ", ".join(f"{name}: {type(x).__module__}.{type(x).__name__}" for name, x in given.items())
        raise ValueError(f"{', '.join(given)} must be arrays of one and the same library; got {kinds}") from None


def working_dtype(xp: Namespace, *arrays: Array) -> DType:
    """Widest floating dtype of the arrays, float32 at least; integer and boolean arrays do not count."""
    floating = [x.dtype for x in arrays if xp.isdtype(x.dtype, "real floating")]
    # Not result_type, which torch.compile cannot trace for half precision: only what is wider than float32 matters.
    return max([xp.float32, *floating], key=lambda dtype: xp.finfo(dtype).bits)


def default_float(xp: Namespace, x: Array) -> DType:
    """The namespace's default floating dtype on the device of `x`."""
    info = xp.__array_namespace_info__()
    return info.default_dtypes(device=device(x))["real floating"]


def check_floating(xp: Namespace, **arrays: Array) -> None:
    """Raise unless every named array has a real floating dtype."""
    for name, x in arrays.items():
        if not xp.isdtype(x.dtype, "real floating"):
            raise ValueError(f"{name} must have a real floating-point dtype; got {x.dtype}")


def check_numeric(xp: Namespace, **arrays: Array) -> None:
    """Raise unless every named array is boolean, integer or real floating."""
    for name, x in arrays.items():
        if not xp.isdtype(x.dtype, ("bool", "integral", "real floating")):
            raise ValueError(f"{name} must have a real dtype (floating, integer or bool); got {x.dtype}")


def check_shape(shape: tuple[int, ...], like: str, **arrays: Array | None) -> None:
    """Raise unless every named array has `shape`, the shape of the argument called `like`."""
    for name, x in arrays.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must have the shape of {like}, {shape}; got {tuple(x.shape)}")


def check_sequence_or_token(name: str, x: Array, shape: tuple[int, ...]) -> bool:
    """Whether `x` has a value per token, shape (..., T), or else per sequence, (...,); raise if neither."""
    got = tuple(x.shape)
    if got not in (shape, shape[:-1]):
        raise ValueError(
            f"{name} must have the shape of logp, {shape}, or one value per sequence, {shape[:-1]}; got {got}"
        )
    return got == shape


def check_mask(xp: Namespace, mask: Array | None, shape: tuple[int, ...], like: str) -> None:
    """Raise unless `mask` is None or a boolean array of `shape`."""
    if mask is not None:
        if not xp.isdtype(mask.dtype, "bool"):
            raise ValueError(f"mask must have dtype bool, True at policy tokens; got {mask.dtype}")
        check_shape(shape, like, mask=mask)


def check_finite(
    xp: Namespace,
    name: str,
    x: Array,
    mask: Array | None,
    *,
    where: str,
    minus_infinity: bool = False,
    validate: bool | None = None,
) -> None:
    """Raise if an entry where `mask` is True is NaN or infinite (-inf may be allowed), naming the first.

    `validate` says whether to look. None: only where that is free; on an accelerator or in a trace it would force a
    synchronization.
    """
    if 0 in x.shape or not (has_readable_values(x) if validate is None else validate):
        return
    # Extremes propagate NaN and cost much less than a test of every entry, which only a failure needs.
    if float(xp.max(x)) < math.inf and (minus_infinity or float(xp.min(x)) > -math.inf):
        return
    bad = ~(x < math.inf) if minus_infinity else ~xp.isfinite(x)
    bad = bad if mask is None else bad & mask
    if bool(xp.any(bad)):
        index = tuple(int(i[0]) for i in xp.nonzero(bad)) if x.ndim else ()
        allowed = "a number below +inf" if minus_infinity else "finite"
        raise ValueError(f"{name} must be {allowed} {where}; got {float(x[index])} at index {index}")


def has_readable_values(x: Array) -> bool:
    """Whether looking at the values is free: a concrete array in CPU memory."""
    if _torch_is_tracing() or array_api_compat.is_lazy_array(x):
        return False
    place = device(x)
    return "cpu" in str(getattr(place, "type", place)).lower()


def real_number(owner: str, name: str, value: object, allowed: str) -> float:
    """`value` as a Python float; ValueError unless it is a real number, which a bool is not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{owner}: {name} must be {allowed}; got {value!r}")
    return float(value)


def positive_fields(owner: object, *names: str) -> None:
    """Raise unless the named fields of a frozen dataclass are positive finite numbers; store them as floats."""
    kind, allowed = type(owner).__name__, "a positive finite number"
    for name in names:
        value = getattr(owner, name)
        number = real_number(kind, name, value, allowed)
        if not 0 < number < math.inf:
            raise ValueError(f"{kind}: {name} must be {allowed}; got {value!r}")
        object.__setattr__(owner, name, number)


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise unless `value` is one of the allowed names, suggesting the nearest."""
    allowed = tuple(allowed)
    if not (isinstance(value, str) and value in allowed):
        from difflib import get_close_matches  # only on the way to an error: keeps `import ctpo` light

        near = get_close_matches(str(value), allowed, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}{hint}")


def only_where(xp: Namespace, mask: Array | None, x: Array, fill: float = 0.0) -> Array:
    """`x` where `mask` is True, `fill` elsewhere. Selected, never multiplied: NaN * 0 is NaN."""
    return x if mask is None else xp.where(mask, x, fill)


def either(xp: Namespace, condition: Array, yes: float, no: float, like: Array) -> Array:
    """One number or the other, in the dtype and on the device of `like`; two plain numbers would have neither."""
    # Filled in, not copied from the host: a copy to an accelerator waits for it.
    return xp.where(condition, xp.full((), yes, dtype=like.dtype, device=device(like)), no)


def prefix_sum(xp: Namespace, x: Array) -> Array:
    """Sum of x[..., 0..t] for every t."""
    if is_tensor(x):
        return x.cumsum(-1)  # torch.compile warns of the caches on array_api_compat's way
    return xp.cumulative_sum(x, axis=-1)


def delay(xp: Namespace, x: Array, steps: int, fill: float) -> Array:
    """`x` moved `steps` places towards the end of the last axis, `fill` in the places left free."""
    length = x.shape[-1]
    steps = min(steps, length)
    return xp.concat([xp.full_like(x[..., :steps], fill), x[..., : length - steps]], axis=-1)


def advance(xp: Namespace, x: Array, steps: int, fill: float) -> Array:
    """`x` moved `steps` places towards the start of the last axis, `fill` in the places left free."""
    length = x.shape[-1]
    steps = min(steps, length)
    return xp.concat([x[..., steps:], xp.full_like(x[..., length - steps :], fill)], axis=-1)


def running_minimum(xp: Namespace, x: Array) -> Array:
    """Minimum of x[..., 0..t] for every t, by log2(T) doubling passes."""
    step = 1
    while step < x.shape[-1]:
        x = xp.minimum(x, delay(xp, x, step, math.inf))
        step *= 2
    return x


def windowed_sum(xp: Namespace, x: Array, window: int) -> Array:
    """Sum of the last `window` entries up to t, fewer at the start, by log2(window) doubling passes.

    Sums of blocks of 1, 2, 4, ... entries are put together along the binary digits of `window`. Unlike a
    difference of prefix sums it cancels nothing: -inf entries leave the window again, and no digits are lost.
    """
    total, block, offset, size = None, x, 0, 1
    window = min(window, x.shape[-1])
    while size <= window:
        if window & size:
            part = delay(xp, block, offset, 0.0)
            total = part if total is None else total + part
            offset += size
        size *= 2
        if size <= window:
            block = block + delay(xp, block, size // 2, 0.0)
    return x if total is None else total


def run_sum(xp: Namespace, x: Array, starts: Array) -> Array:
    """Sum over the run that t belongs to, at every t; `starts` is True where a run begins.

    A segmented doubling scan gives the sum from the start of the run; its value at the run's end is the
    total.
    """
    length = x.shape[-1]
    barrier, step = starts, 1
    while step < length:
        x = xp.where(barrier, x, x + delay(xp, x, step, 0.0))
        barrier = barrier | delay(xp, barrier, step, True)
        step *= 2
    index = xp.arange(length, device=device(x))
    last = xp.where(advance(xp, starts, 1, True), xp.astype(index, x.dtype), float(length))
    ends = xp.flip(running_minimum(xp, xp.flip(last, axis=-1)), axis=-1)
    return xp.take_along_axis(x, xp.astype(ends, index.dtype), axis=-1)


def backward_recurrence(xp: Namespace, factor: Array, term: Array) -> Array:
    """y_t = term_t + factor_t y_{t+1}, y after the end being 0, by log2(T) doubling passes."""
    step = 1
    while step < term.shape[-1]:
        term = term + factor * advance(xp, term, step, 0.0)
        factor = factor * advance(xp, factor, step, 0.0)
        step *= 2
    return term
