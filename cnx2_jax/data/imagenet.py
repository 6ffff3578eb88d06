"""The names of the classes of ImageNet-1K."""

from importlib import resources

# One `ID NAME` per line, in the order of the labels. A name is WordNet's first lemma, except for the four
# classes that would share it with another: the two cranes, the tank suit (maillot) and the corgi (Cardigan).
_LINES = resources.files(__package__).joinpath("imagenet1k.txt").read_text().splitlines()
_NAMES = dict(line.split(" ", 1) for line in _LINES)

# The WordNet id of each label.
CLASS_IDS: tuple[str, ...] = tuple(_NAMES)


def describe(class_name: str) -> str:
    """Returns the plain name of an ImageNet-1K class given by its WordNet id, and anything else unchanged."""
    return _NAMES.get(class_name, class_name)
