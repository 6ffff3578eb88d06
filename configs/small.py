"""Classification of few images: from a hundred to tens of thousands, on one CPU or GPU (docs/small.md).

  cnx2 train --config small:atto,images=3000 --config.data.root=IMAGES \\
      --config.init_from=runs/pretrained --workdir runs/mine
  cnx2 train --config small:tiny,images=3000,from=converted --config.data.root=IMAGES \\
      --config.init_from=converted --workdir runs/mine
  cnx2 train --config small:smoke --workdir runs/smoke      # a minute on a CPU

IMAGES holds a folder per class, either inside `train/` and `val/` or directly. `images=` is how many training
images there are (1000), and `from=` is what `--config.init_from` holds: `pretrain` (the default), your own
FCMAE run (`pretrain:VARIANT,images=N` on the same images, labelled or not); `converted`, weights that saw
many more images, converted by `cnx2 convert`; or `scratch`, nothing. `epochs=` overrides the epochs.
Recipes: the eight variants of the paper, timm's small, `digits` and `smoke`.

The paper fine-tunes on the 1.28 million images of ImageNet-1K, and its values are the anchor: with that many
images, `from=pretrain` is `finetune:VARIANT`, except for when it evaluates and for early stopping. Between
1000 images and that, values are linear in the logarithm of the number (`recipes.between`). The values at 1000
images are own choices, none of them tuned:

- Epochs: 100, with `converted` 30. With fewer images, as many as show 100,000 or 30,000 in all, because a
  network needs updates, and good weights need fewer.
- Batch: the square root of the number of images, at least 32, so that an epoch of few images has updates.
- Peak learning rate: by the square root of the batch, from the paper's at 1024 (`recipes.use_batch_for`).
  `converted` takes a quarter of it, to keep what the weights hold; the paper's table 13, which stays with
  the same classes, takes a 25th to a 32nd. `scratch` takes ConvNeXt's, 4e-3 at a batch of 4096.
- Learning rates by layer: the paper's; with `converted` 0.1 less, because the low layers of good weights
  have little to learn; with `scratch` all the same.
- Weight decay: at least 0.1, against overfitting; with `converted` 0.01, because decay pulls weights away
  from where they begin (table 13: 1e-8).
- Stochastic depth: 0.1 more than the paper's, against overfitting.
- Augmentation: RandAugment of magnitude 5 instead of 9, no mixup, cutmix or random erasing, and crops of at
  least 35% of the image instead of 8%: short runs do not learn from strong distortions. BiT's rule uses no
  mixup below 20,000 images either (Kolesnikov et al. 2020).
- Warm-up: 10% of the epochs, because the averages of Adam are noisy in small batches.
- Average of the weights: over the same share of the run as the paper's 0.9999, which would look back
  beyond the start of a short run.
- Held-out images: 20%, and 10% from 10,000 images on: a tenth of few is too few to choose a checkpoint by.

The run evaluates 20 times. It ends early after ten evaluations in a row without a better accuracy
(`early_stopping_patience`). docs/small.md has accuracies measured on real images.

  cnx2 train --config small:digits,images=100 --config.init_from=runs/digits --workdir runs/few

fine-tunes the network of `pretrain:digits` on 100 of scikit-learn's digits in a minute on a CPU.
"""

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.recipes import (
    FINETUNING,
    IMAGENET_IMAGES,
    between,
    parse_argument,
    use_batch_for,
    use_digits,
    use_finetuning,
    use_imagenet_recipe,
    use_smoke,
)
from cnx2_jax.sweeps import product
from cnx2_jax.tasks import defaults

STARTS = ("pretrain", "converted", "scratch")
PAPER_BATCH = 1024
EVALUATIONS = 20
DIGITS, DIGITS_CLASSES = 1438, 10


def get_config(argument="tiny"):
    names = [*FINETUNING, "digits", "smoke"]
    name, options = parse_argument(argument, names, images=0, epochs=0.0, **{"from": "pretrain"})
    images, start = options["images"] or (DIGITS if name == "digits" else 1000), options["from"]
    if start not in STARTS:
        raise UserError(f"unknown start 'from={start}'{nearest(start, STARTS)} (known: {', '.join(STARTS)})")
    converted, scratch = start == "converted", start == "scratch"

    config = defaults("classify")
    use_imagenet_recipe(config)
    recipe = use_finetuning(config, name if name in FINETUNING else "tiny" if name == "smoke" else "atto")
    optimizer = config.optimizer
    if converted:
        optimizer.base_learning_rate *= between(images, 0.25, 1.0)
        optimizer.layer_decay = between(images, recipe.layer_decay - 0.1, recipe.layer_decay)
    if scratch:
        config.model.head_init_scale = 1.0
        # A batch of 4096 has a peak of 4e-3, one of 1024 half of it.
        optimizer.base_learning_rate = 2e-3 * 256 / PAPER_BATCH
        optimizer.layer_decay = 1.0
    use_batch_for(images, config, 32, PAPER_BATCH)
    few_decay = 0.01 if converted else max(0.1, recipe.weight_decay)
    optimizer.weight_decay = between(images, few_decay, recipe.weight_decay)

    few, shown = (30, 30_000) if converted else (100, 100_000)
    config.total_epochs = options["epochs"] or max(shown / images, between(images, few, recipe.epochs))
    epochs = config.total_epochs
    optimizer.warmup_epochs = between(images, 0.1 * epochs, epochs * recipe.warmup_epochs / recipe.epochs)
    # 10,000 updates in the paper's run, the same share of this one.
    share = epochs * images / config.batch_size / (recipe.epochs * IMAGENET_IMAGES / PAPER_BATCH)
    config.ema_decay = round(1 - 1 / max(10_000 * share, 10), 5)
    config.eval_epochs = config.total_epochs / EVALUATIONS
    config.early_stopping_patience = EVALUATIONS // 2

    config.label_smoothing = recipe.label_smoothing
    config.mixup, config.cutmix = between(images, 0.0, recipe.mixup), between(images, 0.0, recipe.cutmix)
    config.model.drop_path = between(images, recipe.drop_path + 0.1, recipe.drop_path)
    config.data.augment = f"rand-m{round(between(images, 5, 9))}-mstd0.5-inc1"
    config.data.random_erasing = between(images, 0.0, 0.25)
    config.data.crop_scale = (between(images, 0.35, 0.08), 1.0)
    config.data.val_fraction = 0.2 if images < 10_000 else 0.1
    if name == "digits":
        use_digits(config)
        config.data.augment = ""  # RandAugment is for colour images
        config.data.train_per_class = max(1, images // DIGITS_CLASSES) if options["images"] else 0
    if name == "smoke":
        use_smoke(config)
        config.eval_epochs = 3 * config.batch_size / 400  # twice in its six updates
    return config


def sweep_lr():
    """The values to tune first on a set of your own: the learning rate and its decay by layer."""
    return product(
        **{
            "optimizer.base_learning_rate": (3e-4, 1e-3, 3e-3),
            "optimizer.layer_decay": (0.75, 0.9, 1.0),
        }
    )


def sweep_regularisation():
    """What keeps few images from being learnt by heart."""
    return product(
        **{
            "optimizer.weight_decay": (0.05, 0.3),
            "model.drop_path": (0.0, 0.2),
            "data.random_erasing": (0.0, 0.25),
        }
    )
