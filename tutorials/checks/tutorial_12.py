"""Checks of tutorial 12's exercises. Ground truth: the library's exact search, and sums by hand."""

import numpy as np

from retro_np.kernels.search import exact_search
from retro_np.retrieval.build import BuildConfig
from retro_np.tutorials.checks.judge import compare, exercise


def some_keys(count):
    """Queries (10, 8) and keys (count, 8)."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((10, 8)).astype(np.float32), rng.standard_normal((count, 8)).astype(np.float32)


@exercise("12.1", "search_shards", right="however the keys are cut, as if there were one shard")
def check_12_1(search_shards):
    queries, keys = some_keys(900)
    expected = exact_search(queries, keys, 5)[0]
    for bounds in ([], [300, 600], [1, 2, 450], [0, 450]):
        shards = np.split(keys, bounds)
        where = f"shards of {', '.join(str(len(shard)) for shard in shards)} rows"
        for query, ids in zip(queries, expected, strict=True):
            yield compare(search_shards(query, shards, 5), ids, "the list of ids", where=where)
    keys, query = np.round(0.4 * keys), np.zeros(8, np.float32)  # Many of these keys are equally near.
    ids = np.argsort(np.sum(keys**2, axis=1), kind="stable")[:20]
    got = search_shards(query, np.split(keys, [300, 600]), 20)
    yield compare(got, ids, "the list of ids", where="shards of 300, 300, 300 rows, many of them equally near")


@exercise("12.2", "bytes_a_chunk", right="as the files have it")
def check_12_2(bytes_a_chunk):
    for given, expected, where in (
        ((BuildConfig(), 1024, 128), 128 + 512 + 384, "the database of this tutorial"),
        ((BuildConfig(key_dtype="float16"), 128_000, 384), 256 + 768 + 384, "128,000 words, float16 keys of 384"),
        ((BuildConfig(chunk_size=16, neighbours=2, extra_candidates=0), 65_536, 64), 32 + 256 + 24, "chunks of 16"),
    ):
        yield compare(bytes_a_chunk(*given), expected, "the sum", where=where)


@exercise("12.3", "inverted_search", right="the nearest keys of the chosen lists, and how many keys were compared")
def check_12_3(inverted_search):
    queries, keys = some_keys(900)
    centroids = keys[::60]
    owner = exact_search(keys, centroids, 1)[0][:, 0]
    for probes in (1, 4, len(centroids)):
        for query in queries:
            members = np.flatnonzero(np.isin(owner, exact_search(query[None], centroids, probes)[0][0]))
            nearest = members[exact_search(query[None], keys[members], 3)[0][0]]
            result = inverted_search(query, keys, centroids, owner, probes, 3)
            expected = nearest, len(members)
            yield compare(result, expected, parts=("the list of ids", "the number of keys"), where=f"probes = {probes}")
