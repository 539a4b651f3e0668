"""What a person reads when a command fails: one line, and the exit code."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import click
import typer

from orchard.extras import what_brings

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
TRACEBACK = "traceback"  # of the whole command, as an option of its own

_SEE_WHERE = "--traceback shows where"
# What a library could not do with what it was given: a name, a rule, and what to do.
_LIBRARIES = {
    "jinja2": (
        "the chat template of the tokenizer",
        "render",
        "mend it, or choose another data.template",
    ),
    "safetensors": (
        "each tensor file of the model",
        "be a whole safetensors file",
        "copy it again",
    ),
    "tokenizers": (
        "the tokenizer's files",
        "be of a kind that the installed tokenizers reads",
        "copy them again, or install the version that wrote them",
    ),
    "datasets": ("the data set", "be one that datasets reads", "check data.path and data.split"),
    "pyarrow": ("the data", "be whole and of the type that its name says", "check data.path"),
    "json": ("a JSON file", "be valid JSON", "mend it"),
    "huggingface_hub": (
        "the model or the data set",
        "be in a folder here, or on a hub that can be reached",
        "check model.path and data.path",
    ),
    "transformers": (
        "the model's files",
        "be what the installed transformers reads",
        "check config.json and the version",
    ),
}
_NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_NO_RIGHT = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))


@contextmanager
def clear_errors(
    *, code: int, traceback: bool, stopped: Callable[[], str] = lambda: "stopped"
) -> Iterator[None]:
    """Print an error as one line and leave with ``code``; with 1 where it is nobody's input.

    An interrupt is one line too, and leaves with 130, as shells do.

    Args:
        code: What the command leaves with where something was refused or failed.
        traceback: Whether to raise the error as it is.
        stopped: What is said of an interrupt.
    """
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
        raise  # click ends quietly where nobody reads on, as behind orchard ls | head -1
    except KeyboardInterrupt:
        print(f"\n{stopped()}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if traceback or _is_asked_for():
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        from orchard.engine.processes import InUseError  # a help does not wait for it

        is_input = _is_foreseen(error) and not isinstance(error, InUseError)
        raise typer.Exit(code if is_input else FAILED) from None


def describe(error: BaseException) -> str:
    """Return an error as one line, with its notes: what must be, what was, what to do."""
    text = " ".join(_message(error).split())
    return text + "".join(f" ({note})" for note in getattr(error, "__notes__", ()))


def _message(error: BaseException) -> str:
    if isinstance(error, ImportError) and (lacking := what_brings(error)):
        return lacking
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return _system_message(error)
    library = _library_of(error)
    if isinstance(error, UnicodeDecodeError):
        return (
            f"text must be UTF-8, got byte {error.object[error.start]:#04x} at place {error.start}"
            f"; convert the file ({_SEE_WHERE})"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"memory must suffice for this run, got {str(error) or 'none left'}; lower "
            "client.batch_size or data.max_tokens, or see orchard plan RECIPE"
        )
    if library in _LIBRARIES:
        name, rule, what_to_do = _LIBRARIES[library]
        return f"{name} must {rule}, got {_named(error)}; {what_to_do} ({_SEE_WHERE})"
    if library == "orchard" and _is_foreseen(error):
        return str(error)
    return f"{library} failed, got {_named(error)}; {_SEE_WHERE}"


def _system_message(error: OSError) -> str:
    """Return what the system says of a file, in our form."""
    what = error.filename or "a file of this command"
    if isinstance(error, ConnectionError | TimeoutError):
        return f"the other side must answer, got {error.strerror}; check address and network"
    if error.errno in _NO_SPACE:
        return (
            f"{what} must be where there is space left, got {error.strerror}; free some and go on "
            "with orchard resume FOLDER, or choose another folder"
        )
    if error.errno == errno.ENOENT:
        return f"{what} must exist, got {error.strerror}; check the path"
    if error.errno in _NO_RIGHT:
        return (
            f"{what} must be open to this user, got {error.strerror}; change its rights, or "
            "choose another path"
        )
    return f"{what} must be usable, got {error.strerror}; choose another path ({_SEE_WHERE})"


def _named(error: BaseException) -> str:
    """Return an error with its kind, which is often the better half of what it says."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_foreseen(error: BaseException) -> bool:
    """Say whether somebody's input or machine may be the cause, and not a mistake of Orchard's."""
    if isinstance(error, ValueError | OSError | FloatingPointError | ImportError | MemoryError):
        return True
    return _library_of(error) in _LIBRARIES


def _library_of(error: BaseException) -> str:
    """Return the package that raised an error: of its class, or of the code that raised it."""
    own = type(error).__module__.partition(".")[0].removesuffix("_rust")
    if own in _LIBRARIES:
        return own
    raised_in = _innermost(error.__traceback__)
    # What is written in Rust raises Exception itself, from the line that called it.
    return "tokenizers" if type(error) is Exception and raised_in == "transformers" else raised_in


def _innermost(trace: TracebackType | None) -> str:
    """Return the package whose code raised, leaving out Python's own that it called."""
    found = "orchard"
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if name not in sys.stdlib_module_names:
            found = name
        trace = trace.tb_next
    return "orchard" if found == "__main__" else found


def _is_asked_for() -> bool:
    """Say whether the command was called as ``orchard --traceback COMMAND``."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.find_root().params.get(TRACEBACK))
