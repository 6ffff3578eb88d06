"""ImageNet-1K fine-tuning after ImageNet-22K, at 224, 384 or 512 pixels (paper, table 13).

  cnx2 train --config finetune_22k_1k:base,image_size=384 --config.data.root=IMAGES \\
      --config.init_from=runs/22k --workdir runs/384
  cnx2 train --config finetune_22k_1k:smoke --workdir runs/smoke      # a minute on a CPU

`--config.init_from` is a run of `finetune_22k`. All its weights are used except the head's, which start at
0.001 times their usual size. Recipes: the five variants for which the paper has one. Batch 512.

Expected accuracy in percent at 224 / 384: nano 82.1 / 83.4, tiny 83.9 / 85.1, base 86.8 / 87.7, large 87.3 /
88.2; huge 88.7 at 384 and 88.9 at 512. Not yet reproduced here. From 384 pixels on, evaluation
resizes images to the square instead of cropping them.

Uncertain values: one set of values is published for all image sizes, so all use it. Random erasing is not in
the table, and this uses the official code's default, 0.25. Layers decay by group for base and larger
variants, as on ImageNet-1K.

An epoch is every image, where the official code drops each epoch's incomplete batch: 30 epochs of ImageNet
are 75,068 steps here and 75,060 there. Without a validation split, 10% of the images are held out.
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
