# SPDX-License-Identifier: Apache-2.0
"""Errors caused by user input. A message is one line with the object, the value received and a remedy.

The command line prints the line and exits with 1 (failure) or 2 (usage error).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# messages of the native writers of PyTorch and safetensors
FULL_DISK = ("No space left on device", "File too large", "PytorchStreamWriter failed", "inline_container.cc")

SHARED_MEMORY = ("/torch_", "shared memory", "insufficient shm")  # in messages of PyTorch's data loader


class SamdaError(Exception):
    """Base class of all errors of samda; the command line exits with 1."""


class UsageError(SamdaError):
    """A wrong argument, key or combination of options; the command line exits with 2."""


class InputError(SamdaError):
    """A file, scan or data set that cannot be used."""


class WeightsError(SamdaError):
    """Base weights that are missing, damaged or of another backbone."""


class AdapterError(SamdaError):
    """An adapter that cannot be attached, merged, saved or loaded as asked."""


def printable(text: object) -> str:
    """The text with control characters and halves of surrogate pairs written out, as they could drive a terminal."""
    return re.sub(r"[^\n\t\x20-\x7e\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]", _escape, str(text))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def one_line(text: object) -> str:
    """The text in one printable line; "no message" for none."""
    return printable(" ".join(str(text).split())) or "no message"


def nearest(name: str, valid: Iterable[str]) -> str:
    """The remedy for a mistyped name: `did you mean 'x'?`, or the list of valid names if none is similar."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(valid)}"


def check_keys(given: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Refuse unknown keys; `where` is the prefix of the message, for example "adapter 'salt'"."""
    valid = list(valid)
    for key in given:
        if key not in valid:
            raise UsageError(f"{where}: unknown key {key!r}; {nearest(str(key), valid)}")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from a mapping; refuse unknown keys."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{where}: settings must be a mapping, got {values!r}; write {{KEY: VALUE}}")
    fields = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    check_keys(values, fields, where)
    try:
        return cls(**values)
    except TypeError as error:  # a required field is missing
        raise UsageError(f"{where}: {error}") from error


def is_finite(value: Any) -> bool:
    """Is it a finite real number? Booleans are not: `strength: true` is a mistake."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def check_numbers(settings: Any, where: str) -> None:
    """Require finite numbers in the fields of a dataclass whose defaults are numbers."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if is_finite(field.default) and not is_finite(value):
            raise UsageError(
                f"{where}: {field.name} must be a finite number, got {value!r}; the default is {field.default}"
            )


def cause_of(error: BaseException) -> SamdaError | None:
    """The samda error in the chain of `error`, or None: MONAI wraps errors of transforms in RuntimeErrors."""
    return next((known for known in _chain(error) if isinstance(known, SamdaError)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its chain of causes, each once."""
    seen: set[int] = set()
    behind: BaseException | None = error
    while behind is not None and id(behind) not in seen:
        seen.add(id(behind))
        yield behind
        behind = behind.__cause__ or behind.__context__


def disk_trouble(error: BaseException) -> str | None:
    """One-line message for disk errors (full, read-only, no permission); None for other errors."""
    for known in _chain(error):
        if any(words in str(known) for words in SHARED_MEMORY):
            return "shared memory (/dev/shm) is too small for worker processes; use workers=0, or make it larger"
        if isinstance(known, OSError) and known.errno in DISK_ERRORS:
            where = known.filename or "a file"
            return f"{where} cannot be written or read ({known.strerror}); make room, or choose another folder"
        text = str(known)
        if any(words in text for words in FULL_DISK):
            return "a file cannot be written (is the disk full?); make room, or choose another folder"
    return None


def is_disk_full(error: BaseException) -> bool:
    """Did a full disk or quota cause it? Then every further case would fail, too."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return any(isinstance(known, OSError) and known.errno in full for known in _chain(error)) or any(
        FULL_DISK[0] in str(known) for known in _chain(error)
    )


@contextlib.contextmanager
def muted(names: Iterable[str], level: int = logging.ERROR) -> Iterator[None]:
    """Within the block, these loggers of other packages show nothing below `level`."""
    chatty = [logging.getLogger(name) for name in names]
    levels = [other.level for other in chatty]
    for other in chatty:
        other.setLevel(level)
    try:
        yield
    finally:
        for other, before in zip(chatty, levels, strict=True):
            other.setLevel(before)


def log_failed(case: str, error: BaseException) -> str:
    """Log the failure of a case (traceback at debug level) and return :func:`reason_of`."""
    reason = reason_of(error)
    logger.debug("case %s failed", case, exc_info=error)
    logger.error("case %s: %s", case, reason)
    return reason


def reason_of(error: BaseException) -> str:
    """One-line reason of a failure: the samda error in the chain of `error`, else type and message."""
    known = cause_of(error) or disk_trouble(error)
    return one_line(known) if known else f"unexpected {type(error).__name__}: {one_line(error)}"
