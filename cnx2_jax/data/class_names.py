"""Files of class names."""

import os

from cnx2_jax.errors import UserError


def read_class_names(path: str) -> tuple[str, ...]:
    """Reads a text file with one class name per line; ignores blank lines at its end.

    Raises:
      UserError: `path` is empty, cannot be read as text, or has no names, a blank line between names, or the
        same name twice.
    """
    if not path:
        raise UserError("data.classes is not set; pass --config.data.classes=FILE with a class name per line")
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            names = [line.strip() for line in file.read().rstrip().splitlines()]
    except OSError as error:
        raise UserError(f"cannot read data.classes '{path}': {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data.classes '{path}' is not UTF-8 text; give a file of class names") from error
    if not names:
        raise UserError(f"data.classes '{path}' has no names; write one class name per line")
    for line, name in enumerate(names):
        if not name:
            raise UserError(f"line {line + 1} of data.classes '{path}' is blank; every line names a class")
        if (first := names.index(name)) < line:
            raise UserError(
                f"class '{name}' is on lines {first + 1} and {line + 1} of data.classes '{path}'; rename one"
            )
    return tuple(names)
