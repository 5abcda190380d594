"""The errors of attnzoo: a leaf module, so that everything may import it."""

from __future__ import annotations


class AttnzooError(Exception):
    """Base of every error that attnzoo raises on purpose."""


class ShapeError(AttnzooError, ValueError):
    """Shapes, dtypes, devices or layout values that do not fit together."""


class ConfigError(AttnzooError, ValueError):
    """A configuration that describes no layer, or a request that matches nothing."""


class UnsupportedError(AttnzooError, NotImplementedError):
    """A request that is meaningful but that the named implementation cannot run.

    Attributes:
        reasons: One sentence for each obstacle.
    """

    def __init__(self, message: str, reasons: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.reasons = reasons or (message,)


class KernelError(UnsupportedError):
    """A kernel that did not compile, or that does not fit the device."""


class ConversionError(AttnzooError, RuntimeError):
    """A model conversion or a checkpoint that cannot be carried out; nothing was changed."""
