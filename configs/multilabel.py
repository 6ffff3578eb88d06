"""Multi-label classification: any number of classes per image, from a CSV file (docs/labels.md).

  cnx2 train --config multilabel:tiny --config.data.root=IMAGES --config.data.labels=labels.csv \\
      --config.init_from=runs/pretrain --workdir runs/tags
  cnx2 train --config multilabel:digits --workdir runs/tags     # minutes on a CPU, needs no data
  cnx2 train --config multilabel:smoke --workdir runs/smoke     # a minute on a CPU

Recipes: the eight variants of the paper, timm's small, and `digits`. Learning rate, weight decay, learning
rates by layer and stochastic depth are those that the paper fine-tunes the variant with on ImageNet-1K
(`finetune:VARIANT`).

Own choices, not tuned: batch 256, 50 epochs with 5 of warm-up, crops of at least 35% of the image, because
smaller ones leave out what the labels name, no label smoothing, and neither mixup nor cutmix.

`digits` marks which of scikit-learn's digits are in a row of one to three; docs/labels.md has its result.
"""

from cnx2_jax.recipes import (
    FINETUNING,
    parse_argument,
    use_digit_rows,
    use_finetuning,
    use_imagenet_recipe,
    use_smoke,
)
from cnx2_jax.sweeps import product
from cnx2_jax.tasks import defaults


def get_config(argument="tiny"):
    name, options = parse_argument(argument, [*FINETUNING, "digits", "smoke"], epochs=0.0)
    config = defaults("multilabel")
    if name == "digits":
        use_digit_rows(config)
        config.batch_size = 64
        config.total_epochs = options["epochs"] or 20.0
        config.eval_epochs = 5.0
        config.model.drop_path = 0.1
        config.optimizer.base_learning_rate = 8e-3
        config.optimizer.min_learning_rate = 1e-6
        config.optimizer.warmup_epochs = 2.0
        return config

    use_imagenet_recipe(config)
    use_finetuning(config, "tiny" if name == "smoke" else name)
    config.label_smoothing = 0.0
    config.total_epochs = options["epochs"] or 50.0
    config.optimizer.warmup_epochs = 5.0
    config.ema_decay = 0.9999
    config.data.crop_scale = (0.35, 1.0)
    if name == "smoke":
        use_smoke(config)
        config.model.in_chans = 1
        config.data.mean, config.data.std = (0.3,), (0.35,)
        config.data.augment = ""  # RandAugment is for colour images
        config.data.source = "digit_rows"
    return config


def sweep_lr():
    """The learning rate and its decay per layer, over the values that the paper's fine-tuning tuned."""
    return product(
        **{
            "optimizer.base_learning_rate": (2e-4, 4e-4, 8e-4),
            "optimizer.layer_decay": (0.7, 0.8, 0.9),
        }
    )
