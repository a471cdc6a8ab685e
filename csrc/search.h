/* Exact nearest neighbours of a block of queries, by squared L2.
 *
 *   distance[i][j] = sum_t (queries[i][t] - keys[j][t])^2
 *   ids[i], distances[i] = the first k by (distance, id) of their old entries and of (distance[i][j], first_id + j)
 *
 * A template: search.c includes it once with `real` float and once with double. NAME(x) tells the two apart.
 * queries (n_queries, d), keys (n_keys, d), ids and distances (n_queries, k): contiguous, in a Search; k >= 1.
 * A list, one row of ids and distances, is ascending before and after, with (-1, inf) for missing entries.
 *
 * Two orders are fixed, so that the results have the same bits whatever the blocks, a key's position and the machine:
 * - column t is added to lane t % LANES, columns ascending, and the lanes are folded in half until one is left.
 *   The lanes are what the compiler vectorises. The products must not be fused with the sums (-ffp-contract=off).
 * - lists are ordered by (distance, id), so equal distances keep the lowest ids.
 */

/* The distance of a query to a key. Keys are read sequentially, at the speed of memory. */
static INLINE real NAME(distance)(const real *restrict query, const real *restrict key, ptrdiff_t d)
{
    real lanes[LANES] = {0};
    ptrdiff_t aligned = d - d % LANES;
    for (ptrdiff_t t = 0; t < aligned; t += LANES)
        for (int l = 0; l < LANES; l++) {
            real difference = query[t + l] - key[t + l];
            lanes[l] += difference * difference;
        }
    for (int l = 0; l < d - aligned; l++) {
        real difference = query[aligned + l] - key[aligned + l];
        lanes[l] += difference * difference;
    }
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++)
            lanes[l] += lanes[l + half];
    return lanes[0];
}

/* The distances of a query to a block of keys. */
VECTOR_CLONES
static void NAME(distances)(const real *restrict query, const real *restrict keys, ptrdiff_t n_keys, ptrdiff_t d,
                            real *restrict out)
{
    for (ptrdiff_t j = 0; j < n_keys; j++)
        out[j] = NAME(distance)(query, keys + j * d, d);
}

/* Whether (distance a, id i) comes after (distance b, id j). The missing id, -1, comes last as an unsigned number. */
static INLINE int NAME(farther)(real a, int64_t i, real b, int64_t j)
{
    return a > b || (a == b && (uint64_t)i > (uint64_t)j);
}

/* Replace the root of a max-heap of `count` entries by (distance, id), and sift it down. */
static void NAME(sink)(int64_t *ids, real *distances, ptrdiff_t count, real distance, int64_t id)
{
    ptrdiff_t slot = 0;
    while (slot < count / 2) {
        ptrdiff_t child = 2 * slot + 1;
        if (child + 1 < count && NAME(farther)(distances[child + 1], ids[child + 1], distances[child], ids[child]))
            child++;
        if (!NAME(farther)(distances[child], ids[child], distance, id))
            break;
        distances[slot] = distances[child];
        ids[slot] = ids[child];
        slot = child;
    }
    distances[slot] = distance;
    ids[slot] = id;
}

/* Turn a list into a max-heap by reversing it. */
static void NAME(open_list)(int64_t *ids, real *distances, ptrdiff_t k)
{
    for (ptrdiff_t low = 0, high = k - 1; low < high; low++, high--) {
        int64_t id = ids[low];
        real distance = distances[low];
        ids[low] = ids[high];
        distances[low] = distances[high];
        ids[high] = id;
        distances[high] = distance;
    }
}

/* Turn a max-heap into a list, sorted in place. */
static void NAME(close_list)(int64_t *ids, real *distances, ptrdiff_t k)
{
    for (ptrdiff_t last = k - 1; last > 0; last--) {
        int64_t id = ids[last];
        real distance = distances[last];
        ids[last] = ids[0];
        distances[last] = distances[0];
        NAME(sink)(ids, distances, last, distance, id);
    }
}

/* The first row with an entry that is NaN or infinite, or -1. */
VECTOR_CLONES
static ptrdiff_t NAME(row_not_finite)(const real *x, ptrdiff_t rows, ptrdiff_t d)
{
    for (ptrdiff_t i = 0; i < rows; i++) {
        int bad = 0;
        for (ptrdiff_t t = 0; t < d; t++)
            bad |= !(x[i * d + t] - x[i * d + t] == 0);
        if (bad)
            return i;
    }
    return -1;
}

/* Measure every key. Returns the first row of keys with an entry that is not finite, or -1. */
static ptrdiff_t NAME(search)(const Search *call, ptrdiff_t first_query, ptrdiff_t n_queries)
{
    ptrdiff_t n_keys = call->n_keys, d = call->d, k = call->k;
    const real *queries = (const real *)call->queries + first_query * d, *keys = call->keys;
    real *distances = (real *)call->distances + first_query * k;
    int64_t *ids = call->ids + first_query * k, first_id = call->first_id;
    real tile[KEY_BLOCK];
    for (ptrdiff_t i = 0; i < n_queries; i++)
        NAME(open_list)(ids + i * k, distances + i * k, k);
    for (ptrdiff_t first = 0; first < n_keys; first += KEY_BLOCK) {
        ptrdiff_t block = n_keys - first < KEY_BLOCK ? n_keys - first : KEY_BLOCK;
        for (ptrdiff_t i = 0; i < n_queries; i++) {
            int64_t *heap_ids = ids + i * k;
            real *heap = distances + i * k;
            NAME(distances)(queries + i * d, keys + first * d, block, d, tile);
            /* A key that is not finite has no finite distance. A finite key may have an infinite one. */
            if (i == 0 && NAME(row_not_finite)(tile, 1, block) == 0) {
                ptrdiff_t row = NAME(row_not_finite)(keys + first * d, block, d);
                if (row >= 0)
                    return first + row;
            }
            for (ptrdiff_t j = 0; j < block; j++)
                if (NAME(farther)(heap[0], heap_ids[0], tile[j], first_id + first + j))
                    NAME(sink)(heap_ids, heap, k, tile[j], first_id + first + j);
        }
    }
    for (ptrdiff_t i = 0; i < n_queries; i++)
        NAME(close_list)(ids + i * k, distances + i * k, k);
    return -1;
}

/* The largest value of (key's norm - 2 * product) that does not exclude a key: the list's last distance minus the
 * query's norm. The distance is raised first, because the distance, and so its rounding error, may exceed N below. */
static INLINE real NAME(limit)(real last, real query_norm)
{
    return last + 4 * EPSILON * last - query_norm;
}

/* The same search with screening, for finite keys: a key is measured only if a lower bound of its distance does not put
 * the key after the list's last entry. Returns -1.
 *
 * products[i][j] is q.k, by any matrix product that adds d products in some order, fused or not. query_norms and
 * key_norms are lower bounds of |q|^2 and |k|^2: each is the norm in type real, minus a share c of it, minus a slack,
 *   c = (4 d + 64) u,  slack = 8 (d + 8) times the smallest normal number,  where u is half of EPSILON and c < 1/8.
 * Then, for the distance that is computed here,
 *   distance >= key_norms[j] - 2 products[i][j] + query_norms[i]
 * Proof. Let N = |q|^2 + |k|^2, so that |2 q.k| <= N and |q - k|^2 <= 2 N. The roundings are, in units of u N and to
 * first order, at most d of the product, d of the two norms, 2 (d / LANES + 8) of the distance, which is at most 2 N
 * and each of whose terms is rounded d / LANES + 8 times, and 6 of the sums with c, the slack and the limit: together
 * 2.125 d + 22. That is little more than half of c, which leaves room for the higher orders. Underflow, or flushing to
 * zero, loses less than the smallest normal number in each of about 8 d operations, together less than the two slacks.
 * If a product could overflow, the caller gives a norm of -inf: a comparison with it, or with a NaN that results from
 * it, excludes no key. */
VECTOR_CLONES
static ptrdiff_t NAME(search_screened)(const Search *call, ptrdiff_t first_query, ptrdiff_t n_queries)
{
    ptrdiff_t n_keys = call->n_keys, d = call->d, k = call->k;
    const real *keys = call->keys, *query_norms = call->query_norms, *key_norms = call->key_norms;
    for (ptrdiff_t i = first_query; i < first_query + n_queries; i++) {
        const real *query = (const real *)call->queries + i * d, *products = (const real *)call->products + i * n_keys;
        int64_t *heap_ids = call->ids + i * k;
        real *heap = (real *)call->distances + i * k, limit = NAME(limit)(heap[k - 1], query_norms[i]);
        int open = 0;
        for (ptrdiff_t first = 0; first < n_keys; first += KEY_BLOCK) {
            ptrdiff_t block = n_keys - first < KEY_BLOCK ? n_keys - first : KEY_BLOCK;
            const real *product = products + first, *norms = key_norms + first;
            int within = 0; /* counted first, because a loop without branches can be vectorised */
            for (ptrdiff_t j = 0; j < block; j++)
                within += !(norms[j] - 2 * product[j] > limit);
            if (within == 0)
                continue;
            if (!open)
                NAME(open_list)(heap_ids, heap, k);
            open = 1;
            for (ptrdiff_t j = 0; j < block; j++) {
                if (norms[j] - 2 * product[j] > limit)
                    continue;
                real distance = NAME(distance)(query, keys + (first + j) * d, d);
                if (NAME(farther)(heap[0], heap_ids[0], distance, call->first_id + first + j)) {
                    NAME(sink)(heap_ids, heap, k, distance, call->first_id + first + j);
                    limit = NAME(limit)(heap[0], query_norms[i]);
                }
            }
        }
        if (open)
            NAME(close_list)(heap_ids, heap, k);
    }
    return -1;
}
