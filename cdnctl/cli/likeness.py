"""What compare --weights tells: whether two networks have learnt the same directions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cdnctl.cli.tables import Column, plain, print_table, protocol
from cdnctl.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from cdnctl.analysis.encoding import Likeness
    from cdnctl.api import Model
    from cdnctl.training.config import TrainConfig

COLUMNS = {
    "layer": Column("layer"),
    "rank_a": Column("rank of A", ".1f"),
    "rank_b": Column("rank of B", ".1f"),
    "explained": Column("activations explained", ".1%"),
    "cosine": Column("cosine", ".2f"),
    "chance": Column("chance", ".2f"),
    "ceiling": Column("ceiling", ".2f"),
    "similarity": Column("similarity", ".2f"),
    "least": Column("a sign above", ".2f"),
    "reason": Column("why nothing is said", missing=""),
}


def training_config(model: Model) -> TrainConfig:
    """How a model was trained; UsageError if its weights file does not say."""
    from cdnctl.training.config import parse

    config = model.header.training.get("config")
    if not isinstance(config, Mapping):
        raise UsageError(
            f"the weights of model {model.name!r} do not say how they were trained: give weights "
            "that 'cdnctl train' wrote"
        )
    return parse(config)


def measure(
    models: Sequence[Model], pictures: Sequence[tuple[str, np.ndarray]], seed: int
) -> list[Likeness]:
    """The weights of two models, layer by layer; pictures: (name, (S, S, C) in [0, 1]).

    UsageError where they can tell nothing, or nothing of any layer.
    """
    import numpy as np
    import torch

    from cdnctl.analysis.encoding import compare, objection
    from cdnctl.analysis.stages import stages

    chains = []
    for model in models:
        optim = training_config(model).optim
        against = objection(optim.kind, optim.weight_decay)
        if against is not None:
            raise UsageError(
                f"--weights says nothing of model {model.name!r}: {against}; train with --set "
                "optim.kind=sgd --set optim.weight_decay=0"
            )
        try:
            chains.append(stages(model.module))
        except ValueError as error:
            raise UsageError(f"--weights says nothing of model {model.name!r}: {error}") from None
    x = np.stack([pixels for _, pixels in pictures]).transpose(0, 3, 1, 2)
    batches = torch.from_numpy(np.ascontiguousarray(x)).to(models[0].device).split(64)
    try:
        found = compare(chains[0], chains[1], batches, torch.Generator().manual_seed(seed))
    except ValueError as error:
        raise UsageError(f"--weights: {error}") from None
    if found and all(one.reason is not None for one in found):
        raise UsageError(f"--weights says nothing of any layer; of the first: {found[0].reason}")
    return found


def tell(about: Mapping[str, Any], found: Sequence[Likeness], as_json: bool, quiet: bool) -> None:
    """Print it, as one JSON object or as a table and a sentence."""
    rows = [{**asdict(one), "rank_a": one.ranks[0], "rank_b": one.ranks[1]} for one in found]
    if as_json:
        print(json.dumps(plain({"protocol": about, "layers": rows})))
        return
    print_table(COLUMNS, [plain(row) for row in rows])
    known = [one for one in found if one.reason is None]
    like = [one.layer for one in known if one.similarity > one.least]
    print(
        f"Verdict: {len(like)} of {len(known)} layers of which something can be said have learnt "
        f"the same directions{': ' if like else ''}{', '.join(like)}."
    )
    if not quiet:
        print(protocol(about))
