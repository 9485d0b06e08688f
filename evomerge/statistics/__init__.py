"""What a model is like on texts, for the merge methods that ask: `evomerge statistics`.

    texts.py     texts of a file, as tokens of which some are scored
    fisher.py    the diagonal of the Fisher information
    gram.py      Gram matrices of the inputs of linear layers
    measure.py   `measure`: a model opened, run over texts, and what was found written to a file

The files are read, and their form is described, in `evomerge.sources.statistics`.

Imports: nothing here.
"""
