"""Writes tests/golden/recipes/*.txt: every key of every named recipe, and its learning rates.

    python tests/make_recipe_golden.py

Run it again when a recipe is meant to change; the difference shows what did.
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from cnx2_jax.configuration import flatten, load_config, total_steps, warmup_steps
from cnx2_jax.errors import UserError
from cnx2_jax.train.optimizer import learning_rate_schedule

TESTS = Path(__file__).parent
CONFIGS = TESTS.parent / "configs"
GOLDEN = TESTS / "golden" / "recipes"
IMAGES = {"finetune_22k": 14_197_122 * 99 // 100, "small": 1000}  # for training; ImageNet-1K's otherwise
IMAGENET_1K = 1_281_167
SOURCES = {
    "digits": 1438,
    "digit_rows": 2000,
    "synthetic": 400,
    "scenes": 8000,
    "ade20k": 20_210,
    "coco": 117_266,
}


def recipes(path: Path) -> list[str]:
    """The names that a config file knows, as it says itself."""
    try:
        load_config(f"{path}:?")
    except UserError as error:
        return str(error).partition("(known: ")[2].rstrip(")").split(", ")
    raise AssertionError(f"{path} takes any name")


def learning_rates(config: ConfigDict, images: int) -> dict[str, float]:
    """The learning rate at the start, the peak, the end, and three steps between."""
    total = total_steps(config, images)
    warmup = warmup_steps(config, images)
    schedule = learning_rate_schedule(config.optimizer, config.batch_size, warmup, total)
    between = {f"at {share:.0%}": round(share * total) for share in (0.25, 0.5, 0.75)}
    steps = {"at start": 0, "after warmup": min(warmup, total), **between, "at end": total}
    return {f"learning rate {name}": float(f"{float(schedule(step)):.6g}") for name, step in steps.items()}


def dump(path: Path) -> str:
    """A line per key: one value where all recipes agree, else one per recipe."""
    names = recipes(path)
    columns = []
    for name in names:
        config = load_config(f"{path}:{name}")
        images = SOURCES.get(config.data.source.partition(":")[0]) or IMAGES.get(path.stem, IMAGENET_1K)
        columns.append({**flatten(config), **learning_rates(config, images)})
    lines = [f"recipes: {' | '.join(names)}"]
    for key in columns[0]:
        values = [repr(column[key]) for column in columns]
        lines.append(f"{key}: {values[0] if len(set(values)) == 1 else ' | '.join(values)}")
    return "\n".join(lines) + "\n"


def main() -> int:
    GOLDEN.mkdir(exist_ok=True)
    for path in sorted(CONFIGS.glob("*.py")):
        (GOLDEN / f"{path.stem}.txt").write_text(dump(path))
        print(GOLDEN / f"{path.stem}.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
