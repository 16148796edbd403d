"""What each layer of a classifier loses in so many bits: measured once, for all rounds."""

import json
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from dpq_core.convnet.quantize import post_training
from dpq_core.convnet.recipe import ConvRecipe
from dpq_core.convnet.repair import Trial, trials
from dpq_core.digests import digest, write_json
from dpq_core.machine.device import freed_memory_kept
from infra.store import ArtifactRef, Store
from tasks.convnet import FLOAT, by_cpu, open_images, open_network
from tasks.support.progress import stepper

_LOSSES = "losses.json"


@task(name="layer losses", cache_policy=NO_CACHE)
def layer_losses(recipe: ConvRecipe, pictures: ArtifactRef, trained: ArtifactRef) -> list[Trial]:
    """Every layer in the scheme's own bits and in those of `repair.candidates`."""
    store = Store(recipe.execution.store)
    about = {
        "scheme": recipe.scheme.model_dump(mode="json"),
        "network": recipe.network.model_dump(mode="json"),
        **recipe.repair.model_dump(mode="json", include={"candidates", "pictures"}),
    }
    made_of = {"trained": trained.sha256, "images": pictures.sha256}
    key = digest({**by_cpu("layer-losses"), **made_of, **about})

    def make(folder: Path) -> None:
        found = open_images(pictures, store)
        network = open_network(recipe, found, trained)
        before = post_training(network, found.train, FLOAT, recipe.calibration)
        x = found.train.inputs(slice(recipe.repair.pictures))
        step = stepper("layers", len(before.layers))
        with freed_memory_kept():
            measured = trials(before, recipe.scheme, recipe.repair.candidates, x, step)
        write_json(folder / _LOSSES, [each.as_dict() for each in measured])

    folder = store.open(store.get_or_make("layer-losses", key, make)[0])
    return [Trial(**row) for row in json.loads((folder / _LOSSES).read_text("utf-8"))]
