"""Errors of the store: each message says what failed, where, what was found and expected, and what to do."""

from potstill.common.errors import PreemptedError, UserError


class StoreError(UserError):
    """Base of every error that the storage room raises on purpose."""


class NotAStoreError(StoreError):
    """The path holds no readable run.json."""


class StoreExistsError(StoreError):
    """The path already holds a store or something else that may not be overwritten."""


class MismatchError(StoreError):
    """Two things that must agree (run, tokenizer, tokens, order, state) do not; the message names the field."""


class UnsealedError(StoreError):
    """The store is not sealed yet, or cannot be sealed yet."""


class CorruptError(StoreError):
    """Bytes on disk are not what their checksum, size or structure says."""


class TornError(CorruptError):
    """A file ends before its checksum: whoever wrote it was killed, or it was cut."""


class VersionError(StoreError):
    """The store was written by an unknown major version or needs an unknown feature."""


class WriteFailedError(StoreError):
    """A durable write did not succeed (no space, quota, I/O error, read-only); nothing was committed."""


class ReadFailedError(StoreError):
    """A read did not succeed after the allowed number of attempts."""


class GaveUpError(ReadFailedError):
    """As ReadFailedError, after retries; the caller should not retry again."""


class HungReadError(GaveUpError):
    """A read has not come back within the limit: the file system or the server does not answer."""


class StoppedReadError(GaveUpError, PreemptedError):
    """A signal asked to stop while a read did not come back."""


# Whoever looks on after an error of one file does not after these: the next file would be waited for as long.
NO_ANSWER = (HungReadError, StoppedReadError)
