"""From a recipe to tensors: merge methods, the plan of a recipe, and the merger that carries it out.

    methods/       pure functions of one tensor, one file a family; their specs are readable without torch
    mask.py        random keep-masks as a function of (seed, flat index): no generator, no state
    magnitude.py   which entries of a task vector are its k largest, answered fast for many k
    plan.py        recipe x layout -> one checked operation per tensor (no torch)
    merger.py      carries a plan out, tensor after tensor, with what depends only on the sources cached
    writer.py      the merged model as a folder
    fingerprint.py a cheap check that an engine holds the weights that were merged

Imports: nothing here, so that `evomerge.merge.methods` and `evomerge.merge.plan` stay free of torch; never
`evomerge.space` or `evomerge.search`.
"""
