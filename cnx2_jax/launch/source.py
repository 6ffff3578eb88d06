"""The commit to ship: the one that is checked out, if the working tree has no other changes."""

import subprocess
from pathlib import Path

from cnx2_jax.errors import UserError

SHOWN = 5


def commit_of(directory: Path) -> tuple[Path, str]:
    """Returns the root of the git repository that contains `directory`, and the commit checked out in it.

    Raises:
      UserError: there is no repository, no commit, or the working tree has uncommitted changes.
    """
    root = Path(_git(directory, "rev-parse", "--show-toplevel"))
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    changed = _git(root, "status", "--porcelain").splitlines()
    if changed:
        names = ", ".join(line.split(maxsplit=1)[1] for line in changed[:SHOWN])
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise UserError(
            f"the working tree has uncommitted changes ({names}{more}); a job runs a commit, so that its "
            "source stays known: commit them, or set them aside with `git stash -u`"
        )
    return root, commit


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", directory, *arguments], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "git failed"
        raise UserError(f"'{directory}' is not in a git repository with a commit ({reason}); launch from one")
    return done.stdout.rstrip("\n")
