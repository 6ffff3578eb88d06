"""ImageNet-1K fine-tuning after ImageNet-22K, at 224, 384 or 512 pixels (paper, table 13).

  cnx2 train --config finetune_22k_1k:base,image_size=384 --config.data.root=IMAGES \\
      --config.init_from=runs/22k --workdir runs/384
  cnx2 train --config finetune_22k_1k:smoke --workdir runs/smoke      # a minute on a CPU

`--config.init_from` is a run of `finetune_22k`: all of it is taken but the head, which begins at
0.001 times its usual size. Recipes: the five variants for which the paper has one. Batch 512.

Expected, in percent, at 224 / 384: nano 82.1 / 83.4, tiny 83.9 / 85.1, base 86.8 / 87.7, large 87.3 /
88.2; huge 88.7 at 384 and 88.9 at 512. Not yet reproduced here. From 384 pixels on, images are warped to
the square for evaluation instead of cropped.

Uncertain, and what is taken: one set of values is published for all image sizes, and is used for all.
Random erasing is not in the table; the official code's default is 0.25. Layers decay by group from base
on, as on ImageNet-1K.
"""

from cnx2_jax.recipes import parse_argument, use_imagenet_recipe, use_smoke
from cnx2_jax.sweeps import product
from cnx2_jax.tasks import defaults

RECIPES = {
    # variant: layer decay, its type, epochs, drop path, decay of the average
    "nano": (0.9, "single", 90, 0.1, 0.9999),
    "tiny": (0.9, "single", 90, 0.1, 0.9999),
    "base": (0.8, "group", 30, 0.2, 0.9999),
    "large": (0.8, "group", 30, 0.3, 0.9999),
    "huge": (0.85, "group", 30, 0.5, 0.0),
}


def get_config(argument="tiny"):
    name, options = parse_argument(argument, [*RECIPES, "smoke"], image_size=224)
    config = defaults("classify")
    use_imagenet_recipe(config)
    variant = "tiny" if name == "smoke" else name
    layer_decay, kind, epochs, drop_path, ema_decay = RECIPES[variant]
    config.image_size = (options["image_size"], options["image_size"])
    config.model.variant = variant
    config.model.drop_path = drop_path
    config.model.head_init_scale = 0.001
    config.batch_size = 512
    config.total_epochs = float(epochs)
    config.ema_decay = ema_decay
    config.optimizer.base_learning_rate = 2.5e-5
    config.optimizer.weight_decay = 1e-8
    config.optimizer.layer_decay = layer_decay
    config.optimizer.layer_decay_type = kind
    if name == "smoke":
        use_smoke(config)
    return config


def sweep_lr():
    """Around the recipe's rate and decay by layer, for another set of images."""
    return product(
        **{
            "optimizer.base_learning_rate": (1e-5, 2.5e-5, 5e-5),
            "optimizer.layer_decay": (0.7, 0.8, 0.9),
        }
    )
