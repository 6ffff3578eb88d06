"""The command `cnx2 VERB`: a table of verbs."""

import argparse
import importlib
import sys

from absl import logging

from cnx2_jax.commandline import Parser, run
from cnx2_jax.compilation_cache import keep_compiled
from cnx2_jax.errors import UserError

# Modules are imported only when their verb runs: `--help` should not wait for JAX and TensorFlow.
VERBS = {
    "data": "look at training images, and check and time their pipeline",
    "train": "train a model as a config says, or resume a workdir's run",
    "evaluate": "evaluate a checkpoint on its run's images or on other sets",
    "analyse": "measure and draw what the channels of every layer do",
    "predict": "name the top classes of image files",
    "reconstruct": "mask images and draw the reconstructions of a pretrained model",
    "convert": "take weights from PyTorch, timm or Hugging Face, as a checkpoint",
    "export": "write a checkpoint for another library, and check it there",
    "preflight": "compile a run for absent TPUs or GPUs: memory and cost",
    "launch": "run a command on hosts, and again when a host dies",
    "sweep": "train a config with each override of a sweep; compare",
}


def main(argv: list[str] | None = None) -> int:
    """Runs `cnx2` with these arguments (the process's by default) and returns its exit status."""
    return run(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int | None:
    # `--config.KEY=VALUE` belongs to the config, everything else to the verb, and what follows `--` is a
    # command to launch, passed on as it is.
    own = argv[: argv.index("--")] if "--" in argv else argv
    own, overrides = _take_overrides(own)
    width = max(map(len, VERBS))
    parser = Parser(
        prog="cnx2",
        description="ConvNeXt V2 and FCMAE in JAX.",
        # A list of our own: argparse would wrap it.
        epilog="verbs:\n" + "\n".join(f"  {verb:<{width}}  {line}" for verb, line in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(
        dest="verb", metavar="VERB", required=True, help="see below; `cnx2 VERB --help` says more"
    )
    chosen = next((word for word in own if word in VERBS), None)
    command = None
    for verb, line in VERBS.items():
        verb_parser = verbs.add_parser(
            verb,
            description=f"{line[0].upper()}{line[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if verb == chosen:
            logging.set_verbosity(logging.ERROR)  # Orbax logs much for itself
            keep_compiled()
            command = importlib.import_module(f"cnx2_jax.commands.{verb}")
            command.add_arguments(verb_parser)
    args = parser.parse_args(own)
    assert command is not None
    if overrides and not command.TAKES_OVERRIDES:
        parser.error(f"{args.verb} takes no {overrides[0].partition('=')[0]}")
    if getattr(command, "TAKES_COMMAND", False):
        args.command = argv[argv.index("--") + 1 :] if "--" in argv else []
    elif "--" in argv:
        raise UserError(f"{args.verb} takes no command after --")
    return command.run(args, overrides)


def _take_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Separates `--config.KEY=VALUE` and `--config.KEY VALUE` from the other arguments."""
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
