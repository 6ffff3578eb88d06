"""Supervised training from scratch, the baseline for pretraining (ConvNeXt's recipe).

  cnx2 train --config scratch:base --config.data.root=IMAGES --workdir runs/scratch
  cnx2 train --config scratch:smoke --workdir runs/smoke      # a minute on a CPU

IMAGES holds a folder per class, either inside `train/` and `val/` or directly; then 10% of the images are
held out for validation. The paper trains its supervised models like ConvNeXt's (TRAINING.md of that
repository): 300 epochs, batch 4096, AdamW at 4e-3, 20 epochs of warm-up. Recipes: the nine variants. The
paper's table 3 has the accuracies to expect; not yet reproduced here.

Uncertain values: stochastic depth is published for tiny (0.1), small (0.4), base and large (0.5); this uses
0.5 for huge and 0 below tiny. The recipe gives no minimum learning rate; the official code's default is
1e-6.
"""

from cnx2_jax.recipes import parse_argument, use_imagenet_recipe, use_smoke
from cnx2_jax.sweeps import product
from cnx2_jax.tasks import defaults

DROP_PATH = {
    "atto": 0.0,
    "femto": 0.0,
    "pico": 0.0,
    "nano": 0.0,
    "tiny": 0.1,
    "small": 0.4,
    "base": 0.5,
    "large": 0.5,
    "huge": 0.5,
}


def get_config(argument="tiny"):
    name, options = parse_argument(argument, [*DROP_PATH, "smoke"], epochs=0.0)
    config = defaults("classify")
    use_imagenet_recipe(config)
    config.model.variant = "tiny" if name == "smoke" else name
    config.model.drop_path = DROP_PATH[config.model.variant]
    config.batch_size = 4096
    config.total_epochs = options["epochs"] or 300.0
    config.ema_decay = 0.9999
    config.mixup, config.cutmix = 0.8, 1.0
    config.optimizer.base_learning_rate = 4e-3 * 256 / 4096
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_epochs = 20.0
    if name == "smoke":
        use_smoke(config)
    return config


def sweep_lr():
    """Around the recipe's rate and weight decay, for a smaller set of images."""
    return product(
        **{
            "optimizer.base_learning_rate": (1e-4, 2.5e-4, 5e-4),
            "optimizer.weight_decay": (0.05, 0.1, 0.3),
        }
    )
