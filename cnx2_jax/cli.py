"""The command `cnx2 VERB`: a table of verbs."""

import argparse
import importlib
import sys
from typing import NoReturn

from absl import logging

from cnx2_jax.errors import RunError, UserError, tell

# Modules are imported only when their verb runs: `--help` should not wait for JAX and TensorFlow.
VERBS = {
    "data": "look at training images, and check and time their pipeline",
    "train": "train a model as a config says, or go on with a workdir's run",
    "evaluate": "evaluate a checkpoint on its run's images or on other sets",
    "predict": "name the top classes of image files",
    "reconstruct": "mask images and draw what a pretrained model makes of them",
    "convert": "take weights from PyTorch, timm or Hugging Face, as a checkpoint",
    "export": "write a checkpoint for use elsewhere, and check it there",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all errors are said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.split()[0]}: error: {message}; see `{self.prog} --help`\n")


def main(argv: list[str] | None = None) -> int:
    """Runs `cnx2` with these arguments (the process's by default) and returns its exit status."""
    try:
        _run(sys.argv[1:] if argv is None else argv)
    except (UserError, RunError, BrokenPipeError, KeyboardInterrupt) as error:
        return tell(error)
    return 0


def _run(argv: list[str]) -> None:
    # `--config.KEY=VALUE` is the config's to read; everything else is the verb's. Both `--config.KEY=VALUE`
    # and `--config.KEY VALUE` are common, so the second form is joined into the first.
    argv, overrides = _take_overrides(argv)
    width = max(map(len, VERBS))
    parser = _Parser(
        prog="cnx2",
        description="ConvNeXt V2 and FCMAE in JAX.",
        # A list of our own: argparse would wrap it.
        epilog="verbs:\n" + "\n".join(f"  {verb:<{width}}  {line}" for verb, line in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(
        dest="verb", metavar="VERB", required=True, help="see below; `cnx2 VERB --help` says more"
    )
    chosen = next((word for word in argv if word in VERBS), None)
    command = None
    for verb, line in VERBS.items():
        verb_parser = verbs.add_parser(verb, description=f"{line[0].upper()}{line[1:]}.")
        if verb == chosen:
            logging.set_verbosity(logging.ERROR)  # Orbax notes much for itself
            command = importlib.import_module(f"cnx2_jax.commands.{verb}")
            command.add_arguments(verb_parser)
    args = parser.parse_args(argv)
    assert command is not None
    if overrides and not command.TAKES_OVERRIDES:
        parser.error(f"{args.verb} takes no {overrides[0].partition('=')[0]}")
    command.run(args, overrides)


def _take_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    rest: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
        else:
            overrides.append(word if "=" in word else f"{word}={next(words, '')}")
    return rest, overrides


if __name__ == "__main__":
    sys.exit(main())
