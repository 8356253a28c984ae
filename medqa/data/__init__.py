"""From files, Kaggle and the Hugging Face Hub to rows, splits, examples and the micro-batches of an update.

A *record* is one entry of a source as read; a *row* is a cleaned question with its answer; an *example* is a tokenized
row. Read in this order: `sources.py` (which sources, and which rows are kept), `readers.py` (files and formats to
records), `splits.py` (train, validation and test, and what they share), `tokens.py` (rows to examples), `batches.py`.
"""
