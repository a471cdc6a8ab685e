"""Chunks, the frozen BERT, the index, the database and its neighbours."""
