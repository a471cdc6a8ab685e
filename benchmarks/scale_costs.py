"""The arithmetic of docs/scale.md: what a database of so many tokens weighs and takes. Bytes, seconds, counts.

Each function is a line or two, from constants of the project and from what the benchmarks measured, in
benchmarks/results/*.json. `chunks` and `keys` are numbers of them, `shard` is bytes of text. A worker is a machine
like the one that was measured, of two cores. "Index keys" are of MiniLM's width, unless another is given.
"""

import numpy as np
from report import results

from retro_np.retrieval.build import BuildConfig
from retro_np.retrieval.index import EF_MARGIN
from retro_np.retrieval.manifest import shard_name
from retro_np.retrieval.neighbours import NEIGHBOUR

SIZES = (10**9, 10**12, 1_750 * 10**9)  # tokens
MINILM = 384  # columns of its keys
NUMBER = 8  # bytes of a document's number, of an offset, of an id
CORES = 2  # of a worker
MACHINE = 256 * 10**9  # bytes of memory
DAY, WEEK = 86_400, 7 * 86_400  # seconds
K = 2  # neighbours that a search is for
TRAINING_SHARD = 7  # files: tokens, documents, keys, index.hnsw, equal, ids, distances
OPEN_FILES, MAPPINGS = 1024, 65_530  # Linux's usual limits for a process

# the paper's figures (Borgeaud et al. 2022), and BERT's two widths (Devlin et al. 2019)
PAPER_INDEX = {4 * 10**9: 215e9, 1_750 * 10**9: 93e12}  # bytes by tokens
PAPER_KNN_LM = 15e12  # bytes for 4 billion tokens
PAPER_TOKENS = {"Web": 977_563, "Books": 3_423_740, "News": 236_918, "Wikipedia": 13_288, "GitHub": 374_952}  # millions
PAPER_DOCUMENTS = {"Web": 1208, "Books": 20, "News": 398, "Wikipedia": 23, "GitHub": 143}  # millions
PAPER_BOOKS = 0.04  # share of the books that evaluation retrieves from
PAPER_VOCABULARY, WIKITEXT_WIDTH = 128_000, 1024


def chunks_of(tokens):
    """Chunks of the default size; a document's last one is padded, which is left out of account."""
    return tokens / BuildConfig.chunk_size


def token_bytes(vocabulary=BuildConfig.vocabulary_size):
    """Of a chunk's tokens: 2 bytes each up to 65,536 words, else 4."""
    return BuildConfig.chunk_size * (2 if vocabulary <= 2**16 else 4)


def key_bytes(width=MINILM, dtype="float32"):
    """Of a chunk's key."""
    return width * np.dtype(dtype).itemsize


def code_bytes(size):
    """Of a product-quantised key of `size` bytes in an inverted list, with the id that stands beside it."""
    return size + NUMBER


def link_bytes():
    """Of a node in index.hnsw beside its key: measured."""
    return results("scale")["node"]["file"]


def node_bytes(width=MINILM):
    """Of a node in index.hnsw: hnswlib holds its key in float32, whatever keys.npy holds."""
    return key_bytes(width) + link_bytes()


def node_memory(width=MINILM):
    """Of a node in memory: what its links and hnswlib's own lists take is measured, else what the file has."""
    return key_bytes(width) + (results("scale")["node"]["memory"] or link_bytes())


def list_bytes():
    """Of a chunk's list of neighbours, extra_candidates included."""
    return (BuildConfig.neighbours + BuildConfig.extra_candidates) * NEIGHBOUR.itemsize


def document_bytes():
    """Of documents.jsonl, a chunk: measured."""
    found = results("scale")["database"]
    return found["document_bytes"] * found["documents"] / found["chunks"]


def database_bytes(width=MINILM, dtype="float32"):
    """Of a chunk on disk, in all; two numbers: its document's, and which of equal keys stands for it."""
    rest = token_bytes() + 2 * NUMBER + list_bytes() + document_bytes()
    return key_bytes(width, dtype) + node_bytes(width) + rest


def text_bytes():
    """Of text, a chunk: measured."""
    found = results("build")["builds"]["hashing"]
    return found["megabytes"] * 1e6 / found["chunks"]


def keys_a_shard(shard=BuildConfig.shard_bytes):
    """Chunks in so many bytes of text."""
    return shard / text_bytes()


def shards_of(tokens, shard=BuildConfig.shard_bytes):
    """How many shards, at least one."""
    return max(1.0, chunks_of(tokens) / keys_a_shard(shard))


def by_log(points, keys):
    """What was measured at some numbers of keys, {keys: value}, at another: a straight line over log(keys).

    Beyond the measured points the last line, or the first, goes on.
    """
    x, y = np.log(sorted(points)), [points[size] for size in sorted(points)]
    last = int(np.clip(np.searchsorted(x, np.log(keys)), 1, len(x) - 1))
    slope = (y[last] - y[last - 1]) / (x[last] - x[last - 1])
    return float(y[last] + slope * (np.log(keys) - x[last]))


def query_seconds(keys, k=K):
    """One query of a graph of so many keys on one core, by the measured ef that is nearest to the project's."""
    points = {}
    for table in results("search")["tables"]:
        settings = table["approximate"]["hnswlib"]["settings"]
        points[table["size"]] = min(settings, key=lambda each: abs(each["setting"] - k - EF_MARGIN))["median"]
    return by_log(points, keys)


def search_seconds(tokens, shard=BuildConfig.shard_bytes):
    """One query of every shard on one core."""
    shards = shards_of(tokens, shard)
    return shards * query_seconds(chunks_of(tokens) / shards)


def insert_seconds(keys):
    """A worker's time to add one key to a graph that becomes so large, with a thread a core."""
    points = {}
    for table in results("search")["tables"]:
        row = table["approximate"]["hnswlib"]
        points[table["size"]] = row["build_seconds"] * row["build_threads"] / CORES / table["size"]
    return by_log(points, keys)


def stage_seconds():
    """Seconds of a worker for a chunk, of the stages that take as long for the millionth chunk as for the first."""
    build, file_rate = results("build")["builds"]["hashing"], results("scale")["sha256_bytes_a_second"]
    duplicates, hashing = results("deduplicate")["speed"], results("embed_hashing")["rows"]
    return {
        "reading": build["stages"]["reading"] / build["chunks"],
        "tokenising": build["stages"]["tokenising"] / build["chunks"],
        "near-duplicates": text_bytes() / (1e6 * duplicates[str(CORES)]["files"]),
        "keys by hashing": 1 / hashing[f"hashing, {BuildConfig.d_key}"]["chunks_a_second"],
        "keys by MiniLM": 1 / results("embed")["rows"]["retro_np"]["chunks_a_second"],
        "indexing": insert_seconds(keys_a_shard()),
        "hashing of files": database_bytes() / (CORES * file_rate),
    }


def neighbours_seconds(tokens, shard=BuildConfig.shard_bytes):
    """Seconds of a worker to ask every shard for the neighbours and extra_candidates of every chunk.

    What a build's stage took for a chunk and a shard is scaled as a query is, from its graphs to these.
    """
    found, k = results("build")["builds"]["hashing"], BuildConfig.neighbours + BuildConfig.extra_candidates
    measured = found["stages"]["neighbours"] / found["chunks"] / found["shards"]
    shards = shards_of(tokens, shard)
    grown = query_seconds(chunks_of(tokens) / shards, k) / query_seconds(found["retrievable"] / found["shards"], k)
    return chunks_of(tokens) * shards * measured * grown


def build_seconds(tokens, shard, keys):
    """Seconds of a worker for a whole build. keys: which stage makes them."""
    stages = stage_seconds() | {"indexing": insert_seconds(chunks_of(tokens) / shards_of(tokens, shard))}
    others = {"keys by hashing", "keys by MiniLM"} - {keys}
    linear = sum(seconds for name, seconds in stages.items() if name not in others)
    return chunks_of(tokens) * linear + neighbours_seconds(tokens, shard)


def partial_list_bytes(tokens, shard=BuildConfig.shard_bytes):
    """Of the lists in work/ before they are merged: one for each chunk and each shard."""
    return chunks_of(tokens) * shards_of(tokens, shard) * list_bytes()


def scanned_seconds(size):
    """A core's time to look through one code of `size` bytes: the longest scan that was measured over its codes."""
    table = results("scale")["quantised"][0]
    settings = next(row for row in table["rows"] if row["code_bytes"] == size)["settings"]
    least, most = settings[0], settings[-1]
    codes = (most["lists"] - least["lists"]) * table["size"] / most["lists"]
    return (most["seconds"] - least["seconds"]) / codes


def inverted_seconds(tokens, code, lists=2**20, probes=64):
    """One query of an inverted file on one core: a graph of its centroids, and the codes of the lists looked in."""
    return query_seconds(lists) + chunks_of(tokens) * probes / lists * scanned_seconds(code)


def machines_for(tokens, bytes_a_chunk):
    """Machines whose memory holds so many bytes a chunk."""
    return max(1, int(np.ceil(chunks_of(tokens) * bytes_a_chunk / MACHINE)))


def tokens_in(memory, bytes_a_chunk):
    """How many tokens' chunks so much memory holds."""
    return memory / bytes_a_chunk * BuildConfig.chunk_size


def paper_tokens():
    """Of MassiveText with the part of the books that evaluation retrieves from; and documents."""
    tokens = sum(PAPER_TOKENS.values()) - (1 - PAPER_BOOKS) * PAPER_TOKENS["Books"]
    return 1e6 * tokens, 1e6 * (sum(PAPER_DOCUMENTS.values()) - (1 - PAPER_BOOKS) * PAPER_DOCUMENTS["Books"])


def paper_value_bytes(width, dtype, chunks):
    """Of a chunk in the paper's set-up: a key, and the tokens of `chunks` chunks (1: N alone; 2: N and F)."""
    return key_bytes(width, dtype) + chunks * token_bytes(PAPER_VOCABULARY)


def knn_lm_bytes():
    """Of a token in kNN-LM: a float32 key as wide as the Wikitext model, and the token that follows."""
    return key_bytes(WIKITEXT_WIDTH) + 4


def limits():
    """What breaks in the order in which it does, with default settings: {what: tokens}."""
    a_shard = chunks_of(1) * text_bytes() / BuildConfig.shard_bytes  # shards a token
    opened = results("scale")["database"]
    shard_open = opened.get("open_files") or 2 * TRAINING_SHARD
    per_query = query_seconds(keys_a_shard())
    rate = CORES * results("scale")["sha256_bytes_a_second"]
    pairs = list_bytes() * chunks_of(1) * a_shard  # bytes of unmerged lists, over tokens squared
    tasks = results("scale")["task_seconds"] or 0.001
    return {
        "files": OPEN_FILES / shard_open / a_shard,
        "lists": (10e12 / pairs) ** 0.5,
        "search": 0.010 / per_query / a_shard,
        "memory": tokens_in(MACHINE, node_memory()),
        "opening": 600 * rate / database_bytes() * BuildConfig.chunk_size,
        "mappings": MAPPINGS / shard_open / a_shard,
        "names": 10 ** len(shard_name(0)) / a_shard,
        "tasks": (DAY / tasks) ** 0.5 / a_shard,
        "reading": DAY / stage_seconds()["reading"] * BuildConfig.chunk_size,
        "offsets": 16e9 / NUMBER * paper_tokens()[0] / paper_tokens()[1],
        "numbers": 16e9 / NUMBER * BuildConfig.chunk_size,
    }
