"""The working tree as a commit: what is shipped is what git knows."""

import subprocess
from pathlib import Path

from cnx2_jax.errors import UserError

SHOWN = 5


def commit_of(directory: Path) -> tuple[Path, str]:
    """Returns the root of the git repository around `directory`, and the commit that is its working tree.

    Raises:
      UserError: there is no repository, or its tree has changes that no commit holds.
    """
    root = Path(_git(directory, "rev-parse", "--show-toplevel"))
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    changed = _git(root, "status", "--porcelain").splitlines()
    if changed:
        names = ", ".join(line.split(maxsplit=1)[1] for line in changed[:SHOWN])
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise UserError(
            f"the working tree has changes that no commit holds ({names}{more}); a job runs a commit, so "
            "that it can be told later what ran: commit them, or put them aside with `git stash -u`"
        )
    return root, commit


def _git(directory: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", directory, *words], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "git failed"
        raise UserError(f"'{directory}' is not in a git repository with a commit ({reason}); launch from one")
    return done.stdout.rstrip("\n")
