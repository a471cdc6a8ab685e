"""The data layer: corpora, chunks, embedders, indexes, databases and their neighbours."""
