"""What a set of fine-tuned models looks like before it is merged: `evomerge inspect`.

    places.py       what a user writes for a model: `name=place`, a folder, a hub id, an adapter
    sums.py         the numbers of a cell (norms, cosine, conflicts) and the sums that they come from
    statistics.py   the one pass over the tensors that fills the sums; the only module here with torch
    differences.py  configurations and tokenizers beside the base's
    inspection.py   `inspect_models`: all of this for one set of models
    tables.py       rows for a terminal and a page, and the whole as JSON
    heatmap.py      layer x module grids and their colour scales
    page.py         one HTML page that needs no network

Imports: nothing here; never `config`.
"""
