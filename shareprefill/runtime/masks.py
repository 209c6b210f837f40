"""Causal masks as facts, in O(1) memory, and as tensors where one is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from inspect import getclosurevars
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from shareprefill.errors import ConfigError


@dataclass(frozen=True)
class Sequence:
    """One sequence of a batch, its padding cut off: plain causal attention, aligned at the end.

    Attributes:
        row: Index in the batch.
        query: Slice of the query rows that are no padding.
        key: Slice of the keys that are no padding and not after the last query row.
    """

    row: int
    query: slice
    key: slice

    @property
    def place(self) -> tuple[int, int]:
        """Tells a sequence from the others of its batch: its row, and where it starts there."""
        return self.row, self.query.start

    @property
    def lengths(self) -> tuple[int, int]:
        """Query rows and keys."""
        return self.query.stop - self.query.start, self.key.stop - self.key.start


@dataclass(frozen=True, eq=False)
class MaskFacts:
    """What a causal mask says, without its `[B, 1, Lq, Lk]` tensor.

    Key k may be read by query q of row b if `k + kv_offset <= q + q_offset`, and
    `k + kv_offset > q + q_offset - window` where there is a window, and `padding[b, k + kv_offset]`
    where there is padding, and `packed[b, k] == packed[b, q]` where sequences are packed.

    One object serves all layers of a forward pass, so its sequences are read from the device once.

    Attributes:
        q_offset: Absolute position of the first query row.
        kv_offset: Absolute position of the first key.
        padding: bool or int `[B, positions]`, true where a token is none; None for no padding.
        window: Keys that a query sees, itself among them; None for all.
        packed: int `[B, Lq]`, the number of each token's sequence in its row, ascending; only
            where queries and keys are the same tokens. None for one sequence a row.
    """

    q_offset: int
    kv_offset: int
    padding: Tensor | None
    window: int | None
    packed: Tensor | None = None
    _found: dict[tuple[int, int], list[Sequence] | None] = field(
        default_factory=dict, init=False, repr=False
    )
    _divided: list[tuple[Tensor, MaskFacts]] = field(default_factory=list, init=False, repr=False)

    def sequences(self, batch: int, n_query: int) -> list[Sequence] | None:
        """The batch as padding-free sequences; None if some padding lies inside a sequence.

        A sequence whose query rows are all padding is left out.

        Args:
            batch: Rows of the batch.
            n_query: Query rows, padding among them.
        """
        key = (batch, n_query)
        if key not in self._found:
            self._found[key] = self._find(batch, n_query)
        return self._found[key]

    @property
    def differ_by_row(self) -> bool:
        """Whether rows of a batch may have different masks."""
        return self.padding is not None or self.packed is not None

    @property
    def is_plain(self) -> bool:
        """Whether it is what SDPA's `is_causal` says."""
        hides_more = self.differ_by_row or self.window is not None
        return not hides_more and self.q_offset == self.kv_offset == 0

    def allow_all(self, keys: int) -> bool:
        """Whether the first query row may read all of so many keys."""
        if self.differ_by_row or self.kv_offset + keys > self.q_offset + 1:
            return False
        return self.window is None or self.kv_offset > self.q_offset - self.window

    def divided(self, cu_seq_lens: Tensor, keys: Tensor | None, n_query: int) -> MaskFacts:
        """The facts of one row that holds packed sequences, as varlen attention names them.

        Args:
            cu_seq_lens: int `[S + 1]`, the first token of each sequence, and the end.
            keys: The same of the keys, where it is given.
            n_query: Query rows of the call.

        Raises:
            ConfigError: it does not divide this row, or not as its positions do.
        """
        for known, facts in self._divided:
            if known is cu_seq_lens:
                return facts
        if keys is not None and not torch.equal(keys, cu_seq_lens):
            raise ConfigError(
                "cu_seq_lens_k differs from cu_seq_lens_q: a packed prefill holds whole sequences"
            )
        facts = self._divide(cu_seq_lens.tolist(), n_query)
        self._divided.append((cu_seq_lens, facts))
        return facts

    def _find(self, batch: int, n_query: int) -> list[Sequence] | None:
        end = self.q_offset + n_query
        if self.packed is not None:
            return _runs(self.packed)
        if self.padding is None:
            return [
                Sequence(row, slice(0, n_query), slice(0, end - self.kv_offset))
                for row in range(batch)
            ]
        seen = self.padding[:, :end].bool()
        lengths, firsts = seen.sum(-1), seen.int().argmax(-1)
        places = torch.arange(end, device=seen.device)
        inside = (places >= firsts[:, None]) & (places < (firsts + lengths)[:, None])
        whole = (inside <= seen).all(-1)
        found = []
        facts = torch.stack([firsts, lengths, whole], -1).tolist()
        for row, (first, length, has_no_hole) in enumerate(facts):
            last = first + length
            if not has_no_hole:
                return None
            if length == 0 or last <= self.q_offset:
                continue
            query = slice(max(first - self.q_offset, 0), last - self.q_offset)
            key = slice(max(first - self.kv_offset, 0), last - self.kv_offset)
            found.append(Sequence(row, query, key))
        return found

    def _divide(self, bounds: list[int], n_query: int) -> MaskFacts:
        lengths = [stop - start for start, stop in pairwise(bounds)]
        if not lengths or bounds[0] != 0 or bounds[-1] != n_query or min(lengths) < 0:
            raise ConfigError(
                f"cu_seq_lens_q = {bounds} is not allowed: it must ascend from 0 to the number of "
                f"tokens ({n_query})"
            )
        if self.q_offset or self.kv_offset or self.padding is not None:
            raise ConfigError(
                "packed sequences (cu_seq_lens_q) go without padding and without earlier chunks: "
                "leave attention_mask and past_key_values out"
            )
        packed = torch.repeat_interleave(torch.tensor(lengths, device="cpu"))[None]
        if self.packed is not None and _runs(self.packed) != _runs(packed):
            raise ConfigError(
                "cu_seq_lens_q and position_ids divide the tokens in different ways: let "
                "position_ids begin at 0 with every sequence"
            )
        return replace(self, packed=packed)


def _runs(packed: Tensor) -> list[Sequence]:
    """Sequences of `[B, N]` sequence numbers."""
    found = []
    for row, numbers in enumerate(packed):
        lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        start = 0
        for length in lengths:
            place = slice(start, start + length)
            found.append(Sequence(row, place, place))
            start += length
    return found


class FactMask(torch.Tensor):
    """A mask that carries its facts and has no values until somebody asks for them.

    Models hand it through, move it to a layer's device, or cut it to a call's rows and keys; what
    comes of that still has its facts. Every other operation gets the real mask, a plain tensor that
    holds what transformers' own mask would hold: bool, or 0 and the lowest value of a dtype. All
    operations on one mask share that tensor, so that a layer sees what an earlier one wrote there.
    """

    facts: MaskFacts
    # As `shape`, which takes longer to ask for: every layer of a prefill does.
    sizes: tuple[int, ...]
    _real: Tensor | None
    _exposed: bool

    @staticmethod
    def make(
        shape: tuple[int, ...],
        device: torch.device | str,
        facts: MaskFacts,
        dtype: torch.dtype = torch.bool,
    ) -> FactMask:
        """A mask `[B, 1, Lq, Lk]`: bool (True may be read), or a dtype to be added to logits."""
        make = torch.Tensor._make_wrapper_subclass  # pyright: ignore[reportAttributeAccessIssue]
        mask = make(FactMask, shape, dtype=dtype, device=torch.device(device))
        mask.facts, mask.sizes, mask._real, mask._exposed = facts, (*shape,), None, False
        return mask

    def materialised(self) -> Tensor:
        """The plain tensor `[B, 1, Lq, Lk]` that this mask stands for."""
        if self._real is None:
            batch, _, rows, keys = self.shape
            # Inference tensors do not count what is written into them.
            with torch.inference_mode(False), torch.no_grad():
                seen = allowed_mask(self.facts, batch, slice(0, rows), slice(0, keys), self.device)
                # Of its own memory, row by row: layers may write into it.
                own = seen.contiguous() if self.dtype == torch.bool else as_added(seen, self.dtype)
                self._real = own
        return self._real

    @property
    def is_changed(self) -> bool:
        """Whether the real mask may say something else than the facts by now."""
        return self._exposed or (self._real is not None and self._real._version > 0)

    def of_call(self, batch: int, rows: int, keys: int) -> FactMask | Tensor | None:
        """What it says to a call of so many query rows and keys; None where that is nothing.

        Raises:
            ConfigError: it is of other numbers of rows or keys.
        """
        facts, (masks, _, height, width) = self.facts, self.sizes
        fits = width == keys or self._starts_with(rows, keys) or self._ends_with(keys)
        if height != rows or not fits:
            raise ConfigError(
                f"the attention mask is of {height} query rows and {width} keys, the "
                f"attention call of {rows} and {keys}: give an attention_mask as long as the "
                "tokens in the cache and the new ones together, or none"
            )
        if self.is_changed or (masks != batch and facts.differ_by_row):
            return self.materialised()
        if rows > 1:
            return self
        return None if facts.allow_all(keys) else self.materialised()

    def _starts_with(self, rows: int, keys: int) -> bool:
        """Whether SDPA has it as `is_causal`, which is the same for any number of later keys."""
        facts = self.facts
        if facts.differ_by_row or facts.window is not None or self.dtype != torch.bool:
            return False
        return facts.q_offset == facts.kv_offset and keys >= rows

    def _ends_with(self, keys: int) -> bool:
        """Whether all columns beyond so many keys are padding after the last token."""
        facts = self.facts
        if facts.padding is None or keys != facts.q_offset + self.shape[2] - facts.kv_offset:
            return False
        return not bool(facts.padding[:, facts.kv_offset + keys :].any())

    def _cut(self, index: Any) -> FactMask | None:
        """The mask of consecutive rows and keys; None where an index asks for anything else."""
        bounds = _slices(index, self.shape)
        if bounds is None or bounds[:2] != [(0, size) for size in self.shape[:2]]:
            return None
        (row, row_stop), (key, key_stop) = bounds[2:]
        if (row, row_stop, key, key_stop) == (0, self.shape[2], 0, self.shape[3]):
            return self
        facts = self.facts
        q_offset, kv_offset = facts.q_offset + row, facts.kv_offset + key
        sees_all = kv_offset <= q_offset and facts.q_offset + row_stop <= facts.kv_offset + key_stop
        if facts.packed is not None or row >= row_stop or not sees_all:
            return None
        if row or key:
            facts = replace(facts, q_offset=q_offset, kv_offset=kv_offset)
        shape = (*self.shape[:2], row_stop - row, key_stop - key)
        return FactMask.make(shape, self.device, facts, self.dtype)

    def _moved(self, *args: Any, copy: bool = False, **options: Any) -> FactMask | None:
        """The mask on another device; None where `Tensor.to` is asked for anything else."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **options)  # pyright: ignore[reportAttributeAccessIssue]
        if dtype not in (None, self.dtype):
            return None
        if device in (None, self.device) and not copy:
            return self
        return FactMask.make(self.shape, device or self.device, self.facts, self.dtype)

    def _kept(self, func: Any, args: Any, kwargs: Any) -> FactMask | None:
        """What an operation makes of it where that still has its facts; None for all others."""
        if self.is_changed:
            return None
        if func is torch.Tensor.__getitem__:
            return self._cut(*args)
        if func is torch.Tensor.to:
            return self._moved(*args, **kwargs)
        if func in (torch.Tensor.clone, torch.clone):
            return FactMask.make(self.shape, self.device, self.facts, self.dtype)
        return self if func is torch.Tensor.contiguous else None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            kwargs = kwargs or {}
            if func in _DESCRIPTIONS:
                return func(*args, **kwargs)
            mask = args[0] if args and isinstance(args[0], FactMask) else None
            if mask is None:
                return func(*_real(args), **_real(kwargs))
            if (kept := mask._kept(func, args[1:], kwargs)) is not None:
                return kept
            mask._exposed |= func in _EXPOSING
            out = func(*_real(args), **_real(kwargs))
            # What works in place gives back what it changed.
            return mask if out is mask._real else out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # For what goes past Python's part of torch: tracing, C++ functions.
        return func(*_real(args), **_real(kwargs or {}))


# What tells of a mask without its values.
_DESCRIPTIONS = frozenset(
    [
        *(getattr(torch.Tensor, name) for name in ("dim", "size", "numel", "nelement", "__hash__")),
        *(torch.Tensor.is_floating_point, torch.is_floating_point, torch.numel),
        *(
            getattr(torch.Tensor, name).__get__
            for name in (
                *("shape", "dtype", "device", "layout", "ndim", "requires_grad"),
                *("is_meta", "is_cpu", "is_cuda", "is_nested", "is_sparse", "is_quantized"),
            )
        ),
    ]
)
# What hands the memory of the real mask out, where writes to it are not counted.
_EXPOSING = frozenset(
    [
        *(
            getattr(torch.Tensor, name)
            for name in ("numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage")
        ),
        torch.Tensor.data.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    ]
)


def _real(arguments: Any) -> Any:
    """The arguments of an operation, with real masks where there were facts."""
    return tree_map_only(FactMask, FactMask.materialised, arguments)


def _slices(index: Any, shape: Iterable[int]) -> list[tuple[int, int]] | None:
    """First and end of each dimension; None where an index is more than slices of neighbours."""
    sizes = list(shape)
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        place = next(n for n, part in enumerate(parts) if part is Ellipsis)
        parts[place : place + 1] = [slice(None)] * (len(sizes) - len(parts) + 1)
    parts += [slice(None)] * (len(sizes) - len(parts))
    if len(parts) != len(sizes) or not all(isinstance(part, slice) for part in parts):
        return None
    bounds = [part.indices(size) for part, size in zip(parts, sizes, strict=True)]
    if any(step != 1 for *_, step in bounds):
        return None
    return [(start, stop) for start, stop, _ in bounds]


def as_added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as it is added to logits: 0 where a key may be read, else the lowest value."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def allowed_mask(
    facts: MaskFacts, batch: int, rows: slice, keys: slice, device: torch.device
) -> Tensor:
    """`[B, 1, rows, keys]` of the slices, True where a key may be read."""
    queries = torch.arange(rows.start, rows.stop, device=device)[:, None] + facts.q_offset
    columns = torch.arange(keys.start, keys.stop, device=device)[None, :] + facts.kv_offset
    mask = columns <= queries
    if facts.window is not None:
        mask &= columns > queries - facts.window
    mask = mask[None, None].expand(batch, 1, -1, -1)
    if facts.packed is not None:
        packed = facts.packed.to(device)
        mask = mask & (packed[:, None, rows, None] == packed[:, None, None, keys])
    if facts.padding is None:
        return mask
    present = torch.zeros(batch, keys.stop - keys.start, dtype=torch.bool, device=device)
    padding = facts.padding[:, facts.kv_offset + keys.start : facts.kv_offset + keys.stop].bool()
    present[:, : padding.shape[1]] = padding
    return mask & present[:, None, None, :]


def bool_mask(
    facts: MaskFacts, batch: int, rows: slice, keys: slice, device: torch.device
) -> Tensor:
    """`[B, 1, rows, keys]` of the slices, True where a key may be read.

    A row with nothing to read would be NaN; such rows are padding, so what they read is free.
    """
    mask = allowed_mask(facts, batch, rows, keys, device)
    return mask if facts.padding is None else mask | ~mask.any(-1, keepdim=True)


def mask_facts(*, additive: bool = False, **arguments: Any) -> Tensor | None:
    """Facts where a mask is plainly causal; transformers' own mask for all others.

    Args:
        additive: Whether masks are to be added to the logits, as eager attention has them, instead
            of bool.
        arguments: What transformers hands to a mask function.

    Returns:
        `[B, 1, Lq, Lk]`; None where all keys may be read, or where SDPA's `is_causal` says it.
    """
    from transformers.masking_utils import eager_mask, sdpa_mask

    # A bool mask of a decode step is none where all keys may be read, which is less than facts.
    if additive or arguments["q_length"] > 1:
        facts = _causal_facts(**arguments)
        if facts is not None:
            # Layers that treat a call without a mask apart are to see what they see without us.
            if facts.is_plain and not additive and arguments.get("allow_is_causal_skip", True):
                return None
            shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
            dtype = arguments.get("dtype", torch.float32) if additive else torch.bool
            return FactMask.make(shape, arguments.get("device", "cpu"), facts, dtype)
    if arguments.get("local_size") is not None and arguments["q_length"] > 1:
        # A chunked layer gets none while all is one chunk, and is no causal layer for that.
        arguments["allow_is_causal_skip"] = False
    return (eager_mask if additive else sdpa_mask)(**arguments)


def _causal_facts(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **_: Any,
) -> MaskFacts | None:
    """The facts of a mask; None where it is more than causal, a window, padding and packing."""
    from transformers.masking_utils import causal_mask_function

    # `local_size` is a window, except in models with chunked attention.
    if local_size is not None and getattr(config, "attention_chunk_size", None) is not None:
        return None
    function, packed = mask_function or causal_mask_function, None
    # Without the permission to skip, something may be laid over the causal mask.
    if not allow_is_causal_skip and function is not causal_mask_function:
        packed = _packed_sequences(function) if attention_mask is None else None
        if packed is None:
            return None
    # A static cache knows its offset on the device; where a graph is traced, it stays there.
    if isinstance(q_offset, Tensor) and (torch.compiler.is_compiling() or q_length == 1):
        return None
    end = int(q_offset) + q_length
    padding = attention_mask
    if padding is not None:
        # Tokens that a mask is too short for may be read by none, but are no padding for it.
        if padding.shape[0] != batch_size or padding.shape[1] < end:
            return None
        # Without a cache a mask tells the number of keys, and is compared with that later on. A
        # mask on the meta device has no values to look at.
        is_exact = padding.shape[1] == end or padding.shape[1] != kv_length
        if not padding.is_meta and is_exact and bool(padding[:, :end].all()):
            padding = None
    return MaskFacts(int(q_offset), int(kv_offset), padding, local_size, packed)


def _packed_sequences(mask_function: Callable[..., Any]) -> Tensor | None:
    """Sequence numbers `[B, N]`, if a mask function says causal (or window) and packed alone.

    Transformers hands a mask over as a function composed of known ones. They are told apart by
    their code, and what they hold is read from their closures; whatever is not known is not taken
    for packed sequences, and its mask is then made by transformers.
    """
    found: list[Tensor] = []
    return found[0] if _is_packed_causal(mask_function, found) and len(found) == 1 else None


def _is_packed_causal(function: Callable[..., Any], found: list[Tensor]) -> bool:
    """Whether only known functions are in it; the numbers of packed sequences go to `found`."""
    from transformers import masking_utils as known

    causal = known.causal_mask_function
    if function is causal:
        return True
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    held = getclosurevars(function).nonlocals
    if code is known.and_masks(causal).__code__:
        return all(_is_packed_causal(part, found) for part in held["mask_functions"])
    if (
        code
        is known.packed_sequence_mask_function(
            torch.empty(0, dtype=torch.float32, device="cpu")
        ).__code__
    ):
        found.append(held["packed_sequence_mask"])
        return True
    # Newer versions count rows from the start of each sequence, which is the same where a sequence
    # is one run of positions.
    remap = getattr(known, "remap_positions_for_packed_sequence", None)
    if (
        remap is not None
        and code is remap(causal, torch.empty(0, dtype=torch.float32, device="cpu")).__code__
    ):
        return _is_packed_causal(held["mask_function"], found)
    # The window itself is named in `local_size` too.
    return code is known.sliding_window_overlay(1).__code__
