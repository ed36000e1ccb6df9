# SPDX-License-Identifier: Apache-2.0
"""The command `samda`: dispatch to a command; print errors as one line and return an exit code.

Exit codes: see :data:`EXIT_CODES`; 130 and 141 follow the convention of shells for SIGINT and SIGPIPE.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any, TextIO

from samda.cli.options import Parser
from samda.errors import UsageError, cause_of, disk_trouble, one_line, printable, reason_of
from samda.processes import keep_freed_memory
from samda.version import __version__

NAMES = "check train predict adapt evaluate commission erf site export pack unpack push pull info weights bundle demo"
COMMANDS = {name: f"samda.cli.{name}" for name in NAMES.split()}  # name -> module, in the order of the help

EXIT_CODES = {
    0: "success",
    1: "the job failed, or one of its cases did",
    2: "usage error: invalid option, key or combination",
    130: "interrupted (Ctrl-C)",
    141: "the output pipe was closed",
}

# MONAI's DICOM reader, which samda does not use, says on import or construction that a decoder of NVIDIA is missing
MONAI_READER = re.compile(r"(?i)(.*\W)?nvim(age|g)codec")

# what MONAI imports where it is there, and takes most of its time to start; none of it serves these commands
OPTIONAL = (
    *("huggingface_hub", "ignite", "matplotlib", "pandas"),
    *("scipy.signal", "skimage.morphology", "tensorboard", "torchvision"),
)
QUICK = ("check", "predict", "adapt", "evaluate", "info")

DESCRIPTION = "SAM adapters for medical image segmentation. Research use only."
EPILOG = """\
`samda COMMAND --help` shows the options of a command. Exit codes: 0 success, 1 failure, 2 usage error.
The environment variable SAMDA_CACHE sets the folder of downloaded weights and example scans.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; None takes the process's own) and return the exit code."""
    if argv is None and sys.argv[1:2] and sys.argv[1] in QUICK:  # another process may need all of MONAI later on
        sys.meta_path.insert(0, _Spared())
    if argv is None:
        keep_freed_memory()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _terminable(), contextlib.redirect_stdout(_Printable(sys.stdout)):
            code = _run(argv)
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # by `| head`, for example; avoid a second error in the interpreter's last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def build_parser() -> Parser:
    """The parser with all commands."""
    parser = Parser(prog="samda", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"samda {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name in COMMANDS:
        module = _module(name)
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(name, help=text.partition("\n")[0], description=text)
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _run(argv: list[str]) -> int:
    debug = "--debug" in argv
    name = f"samda {argv[0]}" if argv and argv[0] in COMMANDS else "samda"
    try:
        parser = build_parser()
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help(sys.stderr)
            return 2
        with _line_logging(debug, getattr(args, "quiet", False)), _profile(getattr(args, "profile", False)):
            _module(args.command).run(args)
        return 0
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except Terminated:
        return _report(f"{name}: terminated", 143, debug)
    except KeyboardInterrupt:
        return _report(f"{name}: interrupted", 130, debug)
    except BrokenPipeError:
        raise
    except Exception as error:
        usage, hint = isinstance(cause_of(error), UsageError), ""
        if usage and name != "samda":
            hint = f" (see {name} --help)"
        elif not (cause_of(error) or disk_trouble(error)):
            hint = " (--debug shows where)"
        return _report(f"{name}: {reason_of(error)}{hint}", 2 if usage else 1, debug)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers and containers send it: everything ends as after Ctrl-C."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Raise :class:`Terminated` on SIGTERM in this process; torchrun, which restarts or kills, is left alone."""
    if threading.current_thread() is not threading.main_thread() or "LOCAL_RANK" in os.environ:
        yield
        return
    own = os.getpid()

    def terminate(number: int, _frame: Any) -> None:
        if os.getpid() == own:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)  # a worker of a data loader
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _line_logging(debug: bool, quiet: bool = False) -> Iterator[None]:
    """Print log messages and warnings as lines on standard error; of other packages, only warnings.

    With `quiet`, print only warnings and errors, and no progress bars.
    """
    from samda import progress

    handler, own = _Lines(), logging.getLogger("samda")
    handler.addFilter(lambda record: record.name != "pydicom" and not MONAI_READER.match(record.getMessage()))
    before = own.level
    logging.getLogger().addHandler(handler)
    own.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    try:
        with warnings.catch_warnings(), progress.quiet(quiet):
            if not debug:
                warnings.filterwarnings("ignore", category=FutureWarning)
                warnings.filterwarnings("ignore", message=MONAI_READER.pattern)
                warnings.filterwarnings("ignore", module=r"pydicom\.")  # on the spelling of values
                warnings.showwarning = lambda message, *_: print(f"warning: {one_line(message)}", file=sys.stderr)
            yield
    finally:
        logging.getLogger().removeHandler(handler)
        own.setLevel(before)


@contextlib.contextmanager
def _profile(wanted: bool) -> Iterator[None]:
    """Show in the end where the time went."""
    from samda.progress import line, phases

    phases.clear()
    begin = time.perf_counter()
    try:
        yield
    finally:
        total = time.perf_counter() - begin
        rest = {"everything else": total - sum(phases.values()), "total": total}
        for name, seconds in ({**phases, **rest} if wanted else {}).items():
            line(f"{name:<16}{seconds:9.2f} s {100 * seconds / total:4.0f} %")


class _Spared(MetaPathFinder):
    """Packages of :data:`OPTIONAL` are missing while MONAI itself is being imported; later they are found as ever."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        spec = getattr(sys.modules.get("monai"), "__spec__", None)
        if name in OPTIONAL and getattr(spec, "_initializing", False):
            raise ModuleNotFoundError(f"{name} is not imported for this command", name=name)


class _Printable:
    """Standard output on which names from files cannot drive the terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Lines(logging.Handler):
    """Print log messages as lines on standard error, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from samda import progress

        progress.line(self.format(record) if record.exc_info else one_line(record.getMessage()))


def _report(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stdout.flush()  # keeps the order if stdout and stderr go to one file
    print(line, file=sys.stderr)
    return code


def _module(name: str) -> ModuleType:
    return importlib.import_module(COMMANDS[name])


if __name__ == "__main__":
    raise SystemExit(main())
