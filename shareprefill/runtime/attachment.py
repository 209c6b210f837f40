"""Which handler computes a model's attention: attached and detached in any order, in any thread.

A handler holds in the context (thread or asyncio task) that attached it; of several, the last
attached that is still there. Contexts that attached none, as worker threads, take the last one that
any context attached.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self
from weakref import WeakKeyDictionary

from torch import Tensor, nn

IMPLEMENTATION = "shareprefill"
# The same for models that ran with eager attention, whose masks are added to the logits: layers
# that compute with a mask get it in the form in which they would have it without us.
ADDED_MASKS = "shareprefill_eager"
IMPLEMENTATIONS = (IMPLEMENTATION, ADDED_MASKS)

# Called with the layer and the query rows of a call that a model computes by itself.
Note = Callable[[int, int], None]


class Replacement(str):
    """The name of our implementation in a configuration, with the one that it stands for.

    A copy of the configuration belongs to no session: it gets the name that was replaced.
    """

    __slots__ = ("replaced",)
    replaced: str | None

    @classmethod
    def of(cls, name: str, replaced: str | None) -> Self:
        """`name`, standing for `replaced`."""
        made = cls(name)
        made.replaced = replaced
        return made

    def __deepcopy__(self, _memo: Any) -> str | None:
        return self.replaced

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return copy.copy, (self.replaced,)


@dataclass(slots=True, eq=False)
class Attachment:
    """One handler that is attached to a model.

    Attributes:
        handler: Computes the attention; None where the model does so by itself.
        note: Told of every call that the model computes by itself.
        follows_caches: Whether the handler asks what is known of a pass's cache.
        modules: The decoder and its attention modules; none once detached.
        configs: The configurations that name their implementation; none once detached.
        replaced: The implementation that the decoder had before all attachments.
        watch: Remove the checks before and after the model's forward passes.
        joined: Whether a layer has called it.
        unwatched: Whether masks were made for it in a pass that the checks did not see.
    """

    handler: Callable[[Any], Tensor] | None
    note: Note | None = None
    follows_caches: bool = False
    modules: list[nn.Module] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)
    replaced: str | None = None
    watch: list[Any] = field(default_factory=list)
    joined: bool = False
    unwatched: bool = False

    @property
    def own(self) -> bool:
        """Whether the model computes its attention by itself."""
        return self.handler is None

    def attach(
        self, decoder: nn.Module, switch: Callable[[], None], before: Any, after: Any
    ) -> None:
        """Makes it hold for a model.

        Args:
            decoder: A transformers decoder.
            switch: Sets the decoder's attention implementation.
            before: Runs before every forward pass of the decoder, as its hook.
            after: Runs after every forward pass of the decoder that raised nothing, as its hook.
        """
        attention = [m for m in decoder.modules() if getattr(m, "layer_idx", None) is not None]
        with _lock:
            self.modules = [decoder, *attention]
            for module in self.modules:
                _of_module[module] = (*_of_module.get(module, ()), self)
            self.configs = list(_configs(decoder))
            for config in self.configs:
                use = _uses.setdefault(id(config), _Use(config, config._attn_implementation))
                use.attachments = (*use.attachments, self)
            self.replaced = _uses[id(decoder.config)].replaced
            self.watch = [
                decoder.register_forward_pre_hook(before, with_kwargs=True),
                decoder.register_forward_hook(after),
            ]
            try:
                switch()
            except BaseException:
                self.detach()
                raise
            for config in self.configs:
                name, replaced = config._attn_implementation, _uses[id(config)].replaced
                if name != replaced and not isinstance(name, Replacement):
                    config._attn_implementation_internal = Replacement.of(name, replaced)
        _entered.set((*_present(), self))

    def detach(self) -> None:
        """Ends that; with the last attachment a model gets its own implementation back."""
        with _lock:
            for handle in self.watch:
                handle.remove()
            for module in self.modules:
                rest = tuple(a for a in _of_module.get(module, ()) if a is not self)
                if rest:
                    _of_module[module] = rest
                else:
                    _of_module.pop(module, None)
            for config in self.configs:
                use = _uses[id(config)]
                use.attachments = tuple(a for a in use.attachments if a is not self)
                if not use.attachments:
                    del _uses[id(config)]
                    # The public setter would also set the configurations inside this one.
                    config._attn_implementation_internal = use.replaced
            self.modules, self.configs = [], []
        _entered.set(_present())


@dataclass(slots=True)
class _Use:
    """A configuration that attachments have switched, and what it named before."""

    config: Any
    replaced: str | None
    attachments: tuple[Attachment, ...] = ()


_entered: ContextVar[tuple[Attachment, ...]] = ContextVar("shareprefill_attachments", default=())
_of_module: WeakKeyDictionary[nn.Module, tuple[Attachment, ...]] = WeakKeyDictionary()
_uses: dict[int, _Use] = {}
# A generator that holds a session may be collected, and detach it, while its thread has the lock.
_lock = threading.RLock()


class _Calls(threading.local):
    """Attention calls that a thread has made."""

    made = 0


_calls = _Calls()


def count_call() -> None:
    """Notes that a layer called our attention in this thread."""
    _calls.made += 1


def calls_made() -> int:
    """How often layers called our attention in this thread."""
    return _calls.made


def is_attached(decoder: nn.Module) -> bool:
    """Whether something is attached to the very decoder: its copies are free."""
    return decoder in _of_module


def follows_caches(decoder: nn.Module) -> bool:
    """Whether anything attached to the very decoder asks what is known of a pass's cache."""
    return any(attachment.follows_caches for attachment in _of_module.get(decoder, ()))


def latest(attachments: Iterable[Attachment]) -> Attachment:
    """The last of them that this context attached; of others' where it attached none."""
    ordered = list(attachments)
    entered = _entered.get()
    return next((a for a in reversed(ordered) if a in entered), ordered[-1])


def attachment_of(module: nn.Module) -> Attachment | None:
    """What computes an attention module's calls in this context."""
    return _holding(_of_module.get(module, ()))


def use_of(config: Any) -> tuple[Attachment | None, str | None]:
    """What computes a configuration's model in this context, and what that named before."""
    use = _uses.get(id(config))
    return (None, None) if use is None else (_holding(use.attachments), use.replaced)


def _holding(attached: tuple[Attachment, ...]) -> Attachment | None:
    for attachment in reversed(_entered.get()):
        if attachment in attached:
            return attachment
    # A model computes by itself in the context alone that asked for it.
    return next((a for a in reversed(attached) if not a.own), None)


def _present() -> tuple[Attachment, ...]:
    """This context's attachments, without those that another context has detached."""
    return tuple(a for a in _entered.get() if a.modules)


def _configs(decoder: nn.Module) -> Iterator[Any]:
    """The configurations in which a decoder and its parts find their implementation."""
    seen: set[int] = set()
    waiting = [getattr(module, "config", None) for module in decoder.modules()]
    while waiting:
        config = waiting.pop(0)
        if not hasattr(config, "_attn_implementation") or id(config) in seen:
            continue
        seen.add(id(config))
        yield config
        waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
