"""The command ``convatlas``: finds the verb and turns errors into one line and an exit code."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from convatlas import __version__
from convatlas.allocator import keep_large_blocks
from convatlas.catalog import DESIGNS, TASKS
from convatlas.cli.parser import UsageError
from convatlas.errors import Interrupted, unknown
from convatlas.training.settings import SettingsError

__all__ = ["VERBS", "main"]

#: Verb -> what it does. Each has a file in this folder with a function ``run(argv)``.
VERBS = {
    "list": "what convatlas holds",
    "show": "one system: its papers, what it offers, its models",
    "train": "train a task on your data: convatlas train recognition --data photos/ --model inceptionnext_tiny",
    "pretrain": "train a network without labels: convatlas pretrain --method spark --model resnet50 --data photos/",
    "evaluate": "measure a trained run on held-out data",
    "predict": "apply a trained run to your files",
    "compare": "train several models under one budget and show them side by side",
    "bench": "speed and memory beside what one would use instead",
    "design": "search for an architecture: convatlas design deepmad --params 5e6 --flops 5e8",
    "reproduce": "test the central claim of a paper in a small experiment",
    "inspect": "what a model costs, layer by layer, and what can be changed in it",
    "export": "write a model as ONNX or as a torch program, checked against the original",
    "separate": "the voices of recordings: convatlas separate mix.wav --checkpoint hf://owner/name -o separated/",
    "spectrogram": "the spectrogram of an audio file: convatlas spectrogram in.wav --kind cqt -o out.npy",
    "convert": "turn a published checkpoint into safetensors",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 only when the job is done."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"convatlas {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        return _fail("convatlas", unknown("verb", verb, VERBS), 2)
    command = f"convatlas {verb}"
    keep_large_blocks()
    told = logging.StreamHandler()  # what the library warns of, e.g. files that are left out
    told.setFormatter(logging.Formatter(f"{command}: %(message)s"))
    logging.getLogger("convatlas").addHandler(told)
    try:
        code: int = importlib.import_module(f"convatlas.cli.{verb}").run(rest)
        sys.stdout.flush()
    except Interrupted as interrupted:
        return _fail(command, interrupted, interrupted.exit_code)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as end:  # of --help; or of rich, instead of a broken pipe
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        return 0
    except KeyboardInterrupt:
        return _fail(command, "stopped", 130)
    except (UsageError, SettingsError) as error:
        task = rest[:1] if rest and rest[0] in {**TASKS, **DESIGNS} else []
        return _fail(command, f"{error} (see '{' '.join([command, *task])} --help')", 2)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        if os.environ.get("CONVATLAS_TRACEBACK"):
            raise
        return _fail(command, error, 1)
    except Exception as error:  # one that nobody has foreseen
        if os.environ.get("CONVATLAS_TRACEBACK"):
            raise
        return _fail(command, f"{type(error).__name__}: {error} (CONVATLAS_TRACEBACK=1 shows where)", 1)
    finally:
        logging.getLogger("convatlas").removeHandler(told)
    return code


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {meaning}" for verb, meaning in VERBS.items())
    return (
        "usage: convatlas VERB ...\n\n"
        "One maintained, exact and fast home for the convolution literature.\n\n"
        f"{verbs}\n\n"
        "'convatlas VERB --help' explains a verb; 'convatlas --version' tells the version."
    )


def _fail(command: str, error: BaseException | str, code: int) -> int:
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    print(f"{command}: error: {' '.join(text.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
