"""The arithmetic of docs/scale.md: the size and cost of a database in bytes, seconds and counts.

The inputs are the project's constants and the measurements in benchmarks/results/*.json. `tokens` and `keys` are
counts, and `shard` is a shard's size in bytes of text. A worker is a machine with two cores, like the one that was
measured. Keys have MiniLM's width unless another width is given.
"""

import numpy as np
from report import results

from retro_np.retrieval.config import D_KEY, BuildConfig
from retro_np.retrieval.index import EF_MARGIN

SIZES = (10**9, 10**12, 1_750 * 10**9)  # tokens
MINILM = 384  # width of MiniLM's keys
NEIGHBOUR_BYTES = 8 + 4  # an entry of a list of neighbours: an id and a distance
ID_BYTES = 8  # bytes of a document's number, an offset or a chunk's id
CORES = 2  # cores per worker
MACHINE_BYTES = 256 * 10**9  # memory of a search machine
DAY, WEEK = 86_400, 7 * 86_400  # seconds
K = 2  # neighbours per query
FILES_PER_SHARD = 7  # tokens, documents, keys, index.hnsw, equal, ids, distances
OPEN_FILES, MAPPINGS = 524_288, 65_530  # limits per process: systemd's hard limit, and Linux's default

# figures of the paper (Borgeaud et al. 2022)
PAPER_INDEX = {4 * 10**9: 215e9, 1_750 * 10**9: 93e12}  # bytes by number of tokens
PAPER_KNN_LM = 15e12  # bytes for 4 billion tokens
PAPER_TOKENS = {"Web": 977_563, "Books": 3_423_740, "News": 236_918, "Wikipedia": 13_288, "GitHub": 374_952}  # millions
PAPER_DOCUMENTS = {"Web": 1208, "Books": 20, "News": 398, "Wikipedia": 23, "GitHub": 143}  # millions
PAPER_BOOKS = 0.04  # the share of the books in the evaluation database
PAPER_VOCABULARY, WIKITEXT_WIDTH = 128_000, 1024


def chunks_of(tokens):
    """The number of chunks of the default size, without the padding at the end of documents."""
    return tokens / BuildConfig.chunk_size


def token_bytes(vocabulary=BuildConfig.vocabulary_size):
    """Bytes of a chunk's tokens: 2 per token for up to 65,536 words, otherwise 4."""
    return BuildConfig.chunk_size * (2 if vocabulary <= 2**16 else 4)


def key_bytes(width=MINILM, dtype="float32"):
    """Bytes of a chunk's key."""
    return width * np.dtype(dtype).itemsize


def code_bytes(size):
    """Bytes of a product-quantised key of `size` bytes in an inverted list, with its id."""
    return size + ID_BYTES


def link_bytes():
    """Bytes of a node in index.hnsw without its key, measured."""
    return results("scale")["node"]["file"]


def node_bytes(width=MINILM):
    """Bytes of a node in index.hnsw. hnswlib stores the key in float32, whatever the dtype of keys.npy."""
    return key_bytes(width) + link_bytes()


def node_memory(width=MINILM):
    """Bytes of a node in memory: its key, and its links as measured in memory, or else in the file."""
    return key_bytes(width) + (results("scale")["node"]["memory"] or link_bytes())


def list_bytes():
    """Bytes of a chunk's list of neighbours, including extra_candidates."""
    return (BuildConfig.neighbours + BuildConfig.extra_candidates) * NEIGHBOUR_BYTES


def document_bytes():
    """Bytes of documents.jsonl per chunk, measured."""
    database = results("scale")["database"]
    return database["document_bytes"] * database["documents"] / database["chunks"]


def database_bytes(width=MINILM, dtype="float32"):
    """Bytes per chunk of all files. documents.npy and equal.npy have ID_BYTES each."""
    other_bytes = token_bytes() + 2 * ID_BYTES + list_bytes() + document_bytes()
    return key_bytes(width, dtype) + node_bytes(width) + other_bytes


def text_bytes():
    """Bytes of text per chunk, measured."""
    build = results("build")["builds"]["hashing"]
    return build["megabytes"] * 1e6 / build["chunks"]


def keys_per_shard(shard=BuildConfig.shard_bytes):
    """The number of keys in a shard."""
    return shard / text_bytes()


def shards_of(tokens, shard=BuildConfig.shard_bytes):
    """The number of shards, at least 1."""
    return max(1.0, chunks_of(tokens) / keys_per_shard(shard))


def by_log(points, keys):
    """Interpolate measurements {keys: value} linearly over log(keys), and extrapolate beyond them."""
    x, y = np.log(sorted(points)), [points[size] for size in sorted(points)]
    last = int(np.clip(np.searchsorted(x, np.log(keys)), 1, len(x) - 1))
    slope = (y[last] - y[last - 1]) / (x[last] - x[last - 1])
    return float(y[last] + slope * (np.log(keys) - x[last]))


def query_seconds(keys, k=K):
    """The time of one query in a graph on one core, at the measured ef closest to the project's."""
    points = {}
    for table in results("search")["tables"]:
        settings = table["approximate"]["hnswlib"]["settings"]
        points[table["size"]] = min(settings, key=lambda row: abs(row["setting"] - k - EF_MARGIN))["median"]
    return by_log(points, keys)


def search_seconds(tokens, shard=BuildConfig.shard_bytes):
    """The time of one query of all shards on one core."""
    shards = shards_of(tokens, shard)
    return shards * query_seconds(chunks_of(tokens) / shards)


def insert_seconds(keys):
    """A worker's time to add one key to a graph that will have `keys` keys, with one thread per core."""
    points = {}
    for table in results("search")["tables"]:
        row = table["approximate"]["hnswlib"]
        points[table["size"]] = row["build_seconds"] * row["build_threads"] / CORES / table["size"]
    return by_log(points, keys)


def stage_seconds():
    """A worker's time per chunk for the stages whose cost is proportional to the number of chunks."""
    build, file_rate = results("build")["builds"]["hashing"], results("scale")["sha256_bytes_a_second"]
    duplicates, hashing = results("deduplicate")["speed"], results("embed_hashing")["rows"]
    return {
        "reading": build["stages"]["reading"] / build["chunks"],
        "tokenising": build["stages"]["tokenising"] / build["chunks"],
        "near-duplicates": text_bytes() / (1e6 * duplicates[str(CORES)]["files"]),
        "keys by hashing": 1 / hashing[f"hashing, {D_KEY}"]["chunks_a_second"],
        "keys by MiniLM": 1 / results("embed")["rows"]["retro_np"]["chunks_a_second"],
        "indexing": insert_seconds(keys_per_shard()),
        "hashing of files": database_bytes() / (CORES * file_rate),
    }


def neighbours_seconds(tokens, shard=BuildConfig.shard_bytes):
    """A worker's time to search all shards for the neighbours and extra_candidates of all chunks.

    The time per chunk and shard is measured in a build and scaled like the time of a query in a graph of this size.
    """
    build, k = results("build")["builds"]["hashing"], BuildConfig.neighbours + BuildConfig.extra_candidates
    measured = build["stages"]["neighbours"] / build["chunks"] / build["shards"]
    shards = shards_of(tokens, shard)
    growth = query_seconds(chunks_of(tokens) / shards, k) / query_seconds(build["retrievable"] / build["shards"], k)
    return chunks_of(tokens) * shards * measured * growth


def build_seconds(tokens, shard, keys):
    """A worker's time for a whole build. keys: the stage that makes the keys."""
    stages = stage_seconds() | {"indexing": insert_seconds(chunks_of(tokens) / shards_of(tokens, shard))}
    others = {"keys by hashing", "keys by MiniLM"} - {keys}
    linear = sum(seconds for name, seconds in stages.items() if name not in others)
    return chunks_of(tokens) * linear + neighbours_seconds(tokens, shard)


def temporary_list_bytes(tokens, shard=BuildConfig.shard_bytes):
    """Bytes of the lists before and after the search of a shard, which are there at once."""
    return chunks_of(tokens) * min(2, shards_of(tokens, shard)) * list_bytes()


def scan_seconds(size):
    """A core's time to scan one code of `size` bytes, from the difference of the longest and shortest scan."""
    table = results("scale")["quantised"][0]
    settings = next(row for row in table["rows"] if row["code_bytes"] == size)["settings"]
    shortest, longest = settings[0], settings[-1]
    codes = (longest["lists"] - shortest["lists"]) * table["size"] / longest["lists"]
    return (longest["seconds"] - shortest["seconds"]) / codes


def inverted_seconds(tokens, code, lists=2**20, probes=64):
    """The time of one query of an inverted file on one core: search the centroids' graph, scan the chosen lists."""
    return query_seconds(lists) + chunks_of(tokens) * probes / lists * scan_seconds(code)


def machines_for(tokens, chunk_bytes):
    """The number of machines with enough memory for chunk_bytes per chunk."""
    return max(1, int(np.ceil(chunks_of(tokens) * chunk_bytes / MACHINE_BYTES)))


def tokens_in(memory, chunk_bytes):
    """The number of tokens whose chunks fit into `memory` bytes."""
    return memory / chunk_bytes * BuildConfig.chunk_size


def paper_tokens():
    """The numbers of tokens and documents in MassiveText, with the share of books that the evaluation uses."""
    tokens = sum(PAPER_TOKENS.values()) - (1 - PAPER_BOOKS) * PAPER_TOKENS["Books"]
    return 1e6 * tokens, 1e6 * (sum(PAPER_DOCUMENTS.values()) - (1 - PAPER_BOOKS) * PAPER_DOCUMENTS["Books"])


def paper_value_bytes(width, dtype, chunks):
    """Bytes per chunk in the paper's setup: a key, and the tokens of `chunks` chunks (1: only N, 2: N and F)."""
    return key_bytes(width, dtype) + chunks * token_bytes(PAPER_VOCABULARY)


def knn_lm_bytes():
    """Bytes per token in kNN-LM: a float32 key as wide as the Wikitext model, and the next token."""
    return key_bytes(WIKITEXT_WIDTH) + 4


def limits():
    """{limit: number of tokens at which it is reached with the default settings}."""
    shard_tokens = keys_per_shard() * BuildConfig.chunk_size
    open_files = results("scale")["database"].get("open_files") or 2 * FILES_PER_SHARD
    rate = CORES * results("scale")["sha256_bytes_a_second"]
    task = results("scale")["task_seconds"] or 0.001
    return {
        "files": OPEN_FILES / open_files * shard_tokens,
        "lists": tokens_in(10e12, 2 * list_bytes()),
        "search": 0.010 / query_seconds(keys_per_shard()) * shard_tokens,
        "memory": tokens_in(MACHINE_BYTES, node_memory()),
        "opening": tokens_in(600 * rate, database_bytes()),
        "mappings": MAPPINGS / open_files * shard_tokens,
        "tasks": (DAY / task) ** 0.5 * shard_tokens,
        "reading": DAY / stage_seconds()["reading"] * BuildConfig.chunk_size,
        "offsets": 16e9 / ID_BYTES * paper_tokens()[0] / paper_tokens()[1],
        "numbers": tokens_in(16e9, ID_BYTES),
    }
