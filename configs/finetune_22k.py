"""Intermediate fine-tuning of an FCMAE encoder on ImageNet-22K (paper, table 12).

  cnx2 train --config finetune_22k:base --config.data.root=IMAGES_22K \\
      --config.init_from=runs/pretrain --workdir runs/22k
  cnx2 train --config finetune_22k:smoke --workdir runs/smoke      # a minute on a CPU

IMAGES_22K holds a folder for each of the 21,841 classes (14.2 million images). There is no validation set,
so 1% of the images is held out (`data.val_fraction`). Continue with `finetune_22k_1k`. Recipes: the five
variants for which the paper has one. Batch 4096, 90 epochs; no average of the weights is kept. No accuracy
is published for this stage.

Uncertain values: random erasing is not in the table, and this uses the official code's default, 0.25; layers
decay by group for base and larger variants, as on ImageNet-1K.

An epoch is every image, where the official code drops each epoch's incomplete batch.
"""

from cnx2_jax.recipes import parse_argument, use_imagenet_recipe, use_smoke
from cnx2_jax.sweeps import product
from cnx2_jax.tasks import defaults

RECIPES = {
    # variant: layer decay, its type, drop path
    "nano": (0.9, "single", 0.0),
    "tiny": (0.9, "single", 0.0),
    "base": (0.8, "group", 0.1),
    "large": (0.8, "group", 0.1),
    "huge": (0.8, "group", 0.3),
}


def get_config(argument="tiny"):
    name, _ = parse_argument(argument, [*RECIPES, "smoke"])
    config = defaults("classify")
    use_imagenet_recipe(config)
    variant = "tiny" if name == "smoke" else name
    layer_decay, kind, drop_path = RECIPES[variant]
    config.model.variant = variant
    config.model.drop_path = drop_path
    config.model.head_init_scale = 0.001
    config.batch_size = 4096
    config.total_epochs = 90.0
    config.mixup, config.cutmix = 0.8, 1.0
    config.data.val_fraction = 0.01
    config.optimizer.base_learning_rate = 2.5e-4
    config.optimizer.weight_decay = 0.05
    config.optimizer.layer_decay = layer_decay
    config.optimizer.layer_decay_type = kind
    config.optimizer.warmup_epochs = 5.0
    if name == "smoke":
        use_smoke(config)
    return config


def sweep_lr():
    """Around the recipe's rate and decay by layer, for another set of images."""
    return product(
        **{
            "optimizer.base_learning_rate": (1e-4, 2.5e-4, 5e-4),
            "optimizer.layer_decay": (0.7, 0.8, 0.9),
        }
    )
