"""Random mergekit files: our merge has the weights of mergekit 0.1.5, by class (see `compare`)."""

from __future__ import annotations

import pytest
import torch

from evomerge.export.mergekit_reader import read_mergekit
from evomerge.model import merge_model
from evomerge.recipe import Setting
from tests.export.conftest import weights_of
from tests.parity.compare import COUNTS, at_the_cut, beyond_rounding, checked_form, unequal_bits
from tests.parity.conftest import FILES, SEED, Case, World
from tests.parity.files import RANDOM, File
from tests.parity.sce import with_their_choice


def merged(case: Case) -> dict[str, torch.Tensor]:
    assert isinstance(case.drawn, File)
    seed = SEED if case.drawn.methods & set(RANDOM) else None
    folder = case.path.with_name("ours")
    if not folder.exists():
        merge_model(case.path, folder, mergekit_rng=seed)
    return weights_of(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_mergekits_weights(world: World, name: str):
    case = world.cases[f"file/{name}"]
    ours = merged(case)
    theirs = checked_form(case.theirs, ours)
    total = sum(tensor.numel() for tensor in ours.values())
    if case.drawn.bits:
        assert unequal_bits(theirs, ours) == {}, case.text
        COUNTS["files, bit-equal"] += total
        return
    sources, wrong = world.home.sources(case.family), {}
    asked = settings(world, case)
    for tensor, value in ours.items():
        unclear = torch.zeros(value.shape, dtype=torch.bool)
        for setting in asked[tensor]:
            unclear |= at_the_cut(sources, tensor, setting)
        if case.drawn.methods == {"sce"}:
            chosen = with_their_choice(sources, tensor, asked[tensor][0], theirs[tensor])
            value = value if chosen is None else chosen[0]
            COUNTS["sce, entries of equal variance at a cut"] += 0 if chosen is None else chosen[1]
        differ = beyond_rounding(theirs[tensor], value)
        COUNTS["files, differing at a cut"] += int((differ & unclear).sum())
        if (differ & ~unclear).any():
            wrong[tensor] = int((differ & ~unclear).sum())
    assert wrong == {}, case.text
    COUNTS["files, equal to rounding"] += total


def settings(world: World, case: Case) -> dict[str, list[Setting]]:
    """Per tensor, what each document does with it; models have the names of the family's folders."""
    sources = world.home.sources(case.family)
    labels = {
        world.home.place(case.family, name): name
        for folder in sources.folders
        for name in (folder, f"{folder}+lora")
    }
    layout = sources.layout()
    last = layout.n_layers - 1
    result: dict[str, list[Setting]] = {name: [] for name in layout.tensors}
    for document in read_mergekit(case.path):
        names = {ref: labels.get(str(ref), str(ref)) for ref in document.refs}
        for tensor in layout.tensors:
            layer = layout.cell(tensor).layer
            t = 0.0 if layer is None else layer / last if last else 1.0
            result[tensor].append(document.setting(tensor, t, names))
    return result
