"""Checks of the exercises, a module per tutorial. They judge what the reader wrote."""
