"""ImageNet-1K fine-tuning of an FCMAE encoder (paper, tables 9 to 11; official TRAINING.md).

  cnx2 train --config configs/finetune.py:tiny --config.data.root=IMAGES \
      --config.init_from=runs/pretrain --workdir runs/finetune

IMAGES holds a folder per class, under `train/` and `val/` or split here. `--config.init_from=` (empty) trains
from scratch. Recipes: the eight variants of the paper (top-1 on ImageNet-1K in the table below) and timm's
small, which has no published recipe and takes tiny's here.

  cnx2 train --config configs/finetune.py:digits --config.init_from=runs/digits --workdir runs/finetuned

fine-tunes the digits network in about a minute on a CPU; `digits,labels=10` on ten labels per class.

All with RandAugment rand-m9-mstd0.5-inc1 and random erasing 0.25. Not in these recipes yet, and needed for
the paper's accuracy: layer-wise decay of the learning rate and EMA of the weights.

Uncertain: the paper prints a learning rate of 6.25e-3 for base and large, TRAINING.md 6.25e-4 for base, and
mmpretrain's absolute 2.5e-3 at batch 1024 agrees with the latter; 6.25e-4 is taken. Huge's 1.25e-3 rests
on the paper alone.
"""

from cnx2_jax.configuration import defaults, parse_argument, use_digits

RECIPES = {
    # variant: base lr, weight decay, warmup epochs, epochs, smoothing, mixup, cutmix, drop path; top-1
    "atto": (2e-4, 0.3, 0, 600, 0.2, 0.0, 0.0, 0.1),  # 76.7
    "femto": (2e-4, 0.05, 0, 600, 0.2, 0.3, 0.3, 0.0),  # 78.5
    "pico": (2e-4, 0.3, 0, 600, 0.2, 0.3, 0.3, 0.0),  # 80.3
    "nano": (2e-4, 0.3, 0, 600, 0.2, 0.5, 0.5, 0.1),  # 81.9
    "tiny": (8e-4, 0.05, 40, 300, 0.1, 0.8, 1.0, 0.2),  # 83.0
    "small": (8e-4, 0.05, 40, 300, 0.1, 0.8, 1.0, 0.2),
    "base": (6.25e-4, 0.05, 20, 100, 0.1, 0.8, 1.0, 0.1),  # 84.9
    "large": (6.25e-4, 0.05, 20, 100, 0.1, 0.8, 1.0, 0.2),  # 85.8
    "huge": (1.25e-3, 0.05, 10, 50, 0.1, 0.8, 1.0, 0.3),  # 86.3
}


def get_config(argument="tiny"):
    name, options = parse_argument(argument, [*RECIPES, "digits"], epochs=0.0, labels=0)
    config = defaults("classify")
    config.model.head_init_scale = 0.001
    config.optimizer.min_learning_rate = 1e-6
    config.data.train_per_class = options["labels"]
    if name == "digits":
        use_digits(config)
        config.batch_size = 64
        config.total_epochs = options["epochs"] or (60.0 if options["labels"] else 20.0)
        config.eval_epochs = 20.0 if options["labels"] else 5.0
        config.label_smoothing = 0.1
        config.model.drop_path = 0.1
        config.model.head_init_scale = 1.0
        config.optimizer.base_learning_rate = 8e-3
        config.optimizer.warmup_epochs = 2.0
        config.data.crop_scale = (0.6, 1.0)
        return config

    rate, decay, warmup, epochs, smoothing, mixup, cutmix, drop_path = RECIPES[name]
    config.model.variant = name
    config.model.drop_path = drop_path
    config.batch_size = 1024
    config.total_epochs = options["epochs"] or float(epochs)
    config.label_smoothing = smoothing
    config.mixup, config.cutmix = mixup, cutmix
    config.data.augment = "rand-m9-mstd0.5-inc1"
    config.data.random_erasing = 0.25
    config.optimizer.base_learning_rate = rate
    config.optimizer.weight_decay = decay
    config.optimizer.warmup_epochs = float(warmup)
    return config
