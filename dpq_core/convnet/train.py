"""Training and scoring of a classifier, or of the graph exported from one.

Stochastic gradient descent with Nesterov momentum 0.9, cross entropy, and a learning rate that
rises for the first tenth of the steps and then follows a cosine to zero. Cross entropy is with the
classes, or with another network's probabilities p (distillation, Hinton et al., 2015, at
temperature 1), whose gradient is that of KL(p ‖ softmax(logits)).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dpq_core.convnet.images import Images
from dpq_core.convnet.recipe import TrainingSection
from dpq_core.evaluation.scores import Scores

Step = Callable[[], None]

_MOMENTUM = 0.9
_WARM_UP = 0.1


@contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """Layers are initialised, and networks drop out, from torch's global generator: it starts at
    `seed` in the block and is what it was after it. Yields a generator for everything else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def fit(
    network: nn.Module,
    images: Images,
    section: TrainingSection,
    epochs: int,
    learning_rate: float,
    generator: torch.Generator,
    step: Step = lambda: None,
    after_step: Step = lambda: None,
    before_epoch: Callable[[int], None] = lambda epoch: None,
    targets: Tensor | None = None,
) -> None:
    """Train in place; the last images that fill no batch are left out of an epoch.

    Args:
        targets: probabilities fp32 [n, classes], in place of the images' classes.
        step: called after each epoch; progress.
        after_step: called after each change of the parameters.
        before_epoch: called with the epoch's number, from 0.
    """
    targets = images.labels if targets is None else targets
    size = min(section.batch_size, len(images))
    steps = epochs * (len(images) // size)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=learning_rate,
        momentum=_MOMENTUM,
        nesterov=True,
        weight_decay=section.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=learning_rate,
        total_steps=max(steps, 2),
        pct_start=_WARM_UP,
        cycle_momentum=False,
    )
    for epoch in range(epochs):
        before_epoch(epoch)
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(size):
            if len(chosen) < size:
                continue
            logits = network(images.inputs(chosen))
            loss = nn.functional.cross_entropy(logits, targets[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            after_step()
        step()


@torch.no_grad()
def predict(
    network: Callable[[Tensor], Tensor],
    images: Images,
    batch_size: int = 256,
    step: Step = lambda: None,
) -> Tensor:
    """Logits of all images, fp32 [n, classes]. step: called after each batch."""
    found = []
    for start in range(0, len(images), batch_size):
        found.append(network(images.inputs(slice(start, start + batch_size))))
        step()
    return torch.cat(found)


def score(logits: Tensor, images: Images, name: str) -> Scores:
    """Top-1 accuracy, picture by picture. A row that is not finite scores NaN."""
    right = (logits.argmax(dim=1) == images.labels).float()
    right[~logits.isfinite().all(dim=1)] = torch.nan
    count = len(images)
    values, ones = right.tolist(), [1.0] * count
    return Scores("acc", images.names(), [name] * count, [""] * count, values, ones)
